"""Exact rules on a text, no model involved: what a principle's `check` may ask for, and whether a text keeps it."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Check:
    """A rule on a response text; every bound that is set must hold. `satisfies` decides, `explain` says it.

    White space around the text does not count. A word is what stands between white space, a character is a
    Unicode code point, a pattern is a Python regular expression searched anywhere in the text.
    """

    max_words: int | None = None
    min_words: int | None = None
    max_characters: int | None = None
    required_pattern: str | None = None
    forbidden_pattern: str | None = None
    starts_with: str | None = None
    ends_with: str | None = None


def satisfies(check: Check, text: str) -> bool:
    """Whether the text keeps the rule: exact, no model involved."""
    text = text.strip()
    return all(RULES[name].holds(bound, text) for name, bound in set_bounds(check).items())


def explain(check: Check) -> str:
    """The rule as one sentence for people."""
    clauses = [RULES[name].clause(bound) for name, bound in set_bounds(check).items()]
    return f"The text {listed(clauses)}."


@dataclass(frozen=True)
class _Rule:
    type: type
    holds: Callable[[int | str, str], bool]
    clause: Callable[[int | str], str]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


RULES = {
    "max_words": _Rule(
        int, lambda n, text: len(text.split()) <= n, lambda n: f"has at most {_counted(n, 'word')}"
    ),
    "min_words": _Rule(
        int, lambda n, text: len(text.split()) >= n, lambda n: f"has at least {_counted(n, 'word')}"
    ),
    "max_characters": _Rule(
        int, lambda n, text: len(text) <= n, lambda n: f"has at most {_counted(n, 'character')}"
    ),
    "required_pattern": _Rule(
        str,
        lambda pattern, text: re.search(pattern, text) is not None,
        lambda pattern: f"holds something that matches the pattern `{pattern}`",
    ),
    "forbidden_pattern": _Rule(
        str,
        lambda pattern, text: re.search(pattern, text) is None,
        lambda pattern: f"holds nothing that matches the pattern `{pattern}`",
    ),
    "starts_with": _Rule(
        str, lambda start, text: text.startswith(start), lambda start: f'starts with "{start}"'
    ),
    "ends_with": _Rule(str, lambda end, text: text.endswith(end), lambda end: f'ends with "{end}"'),
}


def set_bounds(check: Check) -> dict:
    """The bounds that are set, by name."""
    return {f.name: bound for f in fields(check) if (bound := getattr(check, f.name)) is not None}


def contradiction(check: Check) -> str | None:
    """Why no text could keep the rule, where that is plain from the bounds."""
    ends = {name: value for name in ("starts_with", "ends_with") if (value := getattr(check, name))}
    if ends.get("starts_with", "x")[0].isspace() or ends.get("ends_with", "x")[-1].isspace():
        return "starts_with cannot begin, nor ends_with end, with white space: the check does not see it"
    most_words = check.max_words or math.inf
    most_characters = check.max_characters or math.inf
    least_words = check.min_words or 0
    if least_words > most_words:
        return f"min_words {least_words} is more than max_words {most_words}"
    if 2 * least_words - 1 > most_characters:
        return f"{_counted(least_words, 'word')} need more than max_characters {most_characters}"
    for name, value in ends.items():
        if len(value) > most_characters or len(value.split()) > most_words:
            return f"{name} is longer than the check allows a text to be"
    return None


def listed(names, last: str = "and") -> str:
    """`a, b and c`"""
    *head, tail = names
    return f"{', '.join(head)} {last} {tail}" if head else tail
