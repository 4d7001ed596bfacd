"""Errors that a person is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the caller's: one clear line that says what is wrong and what to do.

    The command line prints the message alone (no traceback) and exits with code 2.
    """
