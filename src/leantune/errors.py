"""Errors that a person is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the caller's: one clear line that says what is wrong and what to do.

    The command line prints the message alone (no traceback) and exits with code 2.
    """


class RunError(RuntimeError):
    """A run went wrong through nobody's slip (the loss became NaN, say): one clear line, exit code 1."""
