"""Errors that a user can mend."""


class UserError(Exception):
    """A mistake in the input: one line that says what, where and how to mend it. Exit code 2, no traceback."""
