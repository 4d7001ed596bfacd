"""Errors that a person is meant to read."""

from __future__ import annotations

from typing import Any

_LONGEST = 200


class UserError(ValueError):
    """A mistake of the caller's: one clear line that says what is wrong and what to do.

    The command line prints the message alone (no traceback) and exits with code 2.
    """


class RunError(RuntimeError):
    """A run went wrong through nobody's slip (the loss became NaN, say): one clear line, exit code 1."""


def shown(value: Any) -> str:
    """A value for a message: on one line, and not too long."""
    return brief(repr(value))


def brief(text: str) -> str:
    """A text for a message: not too long."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"


def first_line(error: BaseException) -> str:
    """What an error of a library's says, in one line."""
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
