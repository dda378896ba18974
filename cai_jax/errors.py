"""Errors that a user can mend."""

import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in the input: one line that says what, where and how to mend it. Exit code 2, no traceback."""


def exit_code(main: Callable) -> int:
    """What a small command ends with: what `main` returns, or 0; 2 for a UserError, which it tells in a line."""
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error line: "; did you mean X?" for the nearest known name, or nothing."""
    nearest = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]}?" if nearest else ""
