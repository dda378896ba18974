"""Rules on a text against a slow reading of each, and the sentences that explain them."""

import re
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_jax.rules import Check, explain, satisfies


def slow_words(text: str) -> int:
    """Words counted a character at a time."""
    inside, count = False, 0
    for character in text:
        if not character.isspace() and not inside:
            count += 1
        inside = not character.isspace()
    return count


def slow_trim(text: str) -> str:
    while text and text[0].isspace():
        text = text[1:]
    while text and text[-1].isspace():
        text = text[:-1]
    return text


def slow_holds(name: str, bound, text: str) -> bool:
    text = slow_trim(text)
    match name:
        case "max_words":
            return not slow_words(text) > bound
        case "min_words":
            return not slow_words(text) < bound
        case "max_characters":
            return sum(1 for _ in text) <= bound
        case "required_pattern":
            return any(re.compile(bound).match(text, at) for at in range(len(text) + 1))
        case "forbidden_pattern":
            return not any(re.compile(bound).match(text, at) for at in range(len(text) + 1))
        case "starts_with":
            return list(text[: len(bound)]) == list(bound)
        case "ends_with":
            return len(text) >= len(bound) and list(text[len(text) - len(bound) :]) == list(bound)


TEXTS = st.lists(st.sampled_from(["a", "b", "ab", "7", "!", ".", " ", "\n", "\t", "\u3000", "\u00e9"])).map("".join)
ENDS = st.text("ab7!", min_size=1, max_size=2)
PATTERNS = st.sampled_from(["a", "b+", r"\d", "^a", "b$", r"(?m)^7", r"\ba\b", "[!.]", "a.b", "(?s)a.b", "a|7$"])
BOUNDS = {
    "max_words": st.integers(1, 6),
    "min_words": st.integers(1, 6),
    "max_characters": st.integers(1, 12),
    "required_pattern": PATTERNS,
    "forbidden_pattern": PATTERNS,
    "starts_with": ENDS,
    "ends_with": ENDS,
}


def test_every_bound_is_tested():
    assert set(BOUNDS) == {f.name for f in fields(Check)}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_bound_agrees_with_a_slow_reading(name):
    seen = set()

    @given(BOUNDS[name], TEXTS)
    def agrees(bound, text):
        held = satisfies(Check(**{name: bound}), text)
        assert held == slow_holds(name, bound, text)
        seen.add(held)

    agrees()
    assert seen == {True, False}


@given(st.fixed_dictionaries({}, optional=BOUNDS), TEXTS)
def test_several_bounds_must_all_hold(bounds, text):
    assert satisfies(Check(**bounds), text) == all(slow_holds(*bound, text) for bound in bounds.items())


@given(st.fixed_dictionaries({}, optional=BOUNDS), TEXTS, st.text(" \n\t", max_size=3), st.text(" \n", max_size=3))
def test_white_space_around_a_text_does_not_count(bounds, text, before, after):
    assert satisfies(Check(**bounds), before + text + after) == satisfies(Check(**bounds), text)


@given(st.fixed_dictionaries({}, optional=BOUNDS).filter(bool))
def test_explanation_is_one_sentence_that_names_every_bound(bounds):
    sentence = explain(Check(**bounds))
    assert sentence.startswith("The text ") and sentence.endswith(".")
    assert "\n" not in sentence
    for bound in bounds.values():
        assert str(bound) in sentence


def test_explanations_read_like_english():
    assert explain(Check(max_words=1)) == "The text has at most 1 word."
    check = Check(min_words=2, forbidden_pattern=r"\d", ends_with="Bye.")
    expected = r'has at least 2 words, holds nothing that matches the pattern `\d` and ends with "Bye."'
    assert explain(check) == f"The text {expected}."
