"""Filters against slow readings of what they promise."""

import random

import pytest

from cai_jax.config import Filters
from cai_jax.filters import RATIO_EDGES, counts, dropped_by

OFF = Filters(duplicates=False, ties=False)


def row(name, probability, a="first", b="second", tokens=(5, 5), consistent=True, prompt="Hi"):
    return {
        "id": name, "messages": [{"role": "user", "content": prompt}], "probability_a": probability,
        "response_a": {"text": a, "tokens": tokens[0]}, "response_b": {"text": b, "tokens": tokens[1]},
        "consistent": consistent,
    }  # fmt: skip


def many(seed, count=200):
    rng = random.Random(seed)
    return [
        row(f"r{i}", round(rng.betavariate(2, 2), 2), f"a{rng.randrange(8)}", f"a{rng.randrange(8)}",
            (rng.randint(0, 40), rng.randint(1, 60)), rng.random() < 0.7, f"prompt {rng.randrange(6)}")
        for i in range(count)
    ]  # fmt: skip


def test_nothing_is_dropped_by_filters_that_are_off():
    rows = [row("a", 0.5, "same", "same"), row("b", 0.5, consistent=False)]
    assert dropped_by(rows, OFF) == ["", ""] and counts(["", ""], OFF) == []


def test_each_filter_drops_what_it_says():
    rows = [
        row("kept", 0.9), row("twin", 0.9), row("turned", 0.1, "second ", "first"),
        row("other prompt", 0.9, prompt="Oh"),
        row("identical", 0.9, "x", " x\n"), row("tie", 0.5004, "t", "u"), row("flips", 0.8, "v", "w", consistent=False),
        row("unsure", 0.55, "y", "z"), row("unsure of a", 0.45, "y2", "z"), row("sure of b", 0.05, "y3", "z"),
    ]  # fmt: skip
    settings = Filters(consistent=True, least_confidence=0.6)
    reasons = dict(zip((r["id"] for r in rows), dropped_by(rows, settings), strict=True))
    assert reasons == {
        "kept": "", "twin": "duplicates", "turned": "duplicates", "other prompt": "", "identical": "duplicates",
        "tie": "ties", "flips": "consistent", "unsure": "least_confidence", "unsure of a": "least_confidence",
        "sure of b": "",
    }  # fmt: skip
    assert counts(list(reasons.values()), settings) == [
        {"filter": "duplicates", "dropped": 3, "left": 7}, {"filter": "ties", "dropped": 1, "left": 6},
        {"filter": "consistent", "dropped": 1, "left": 5}, {"filter": "least_confidence", "dropped": 2, "left": 3},
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_an_earlier_filter_hides_rows_from_later_ones(seed):
    """All at once is one after the other, each on what is left."""
    rows, settings = many(seed), Filters(consistent=True, least_confidence=0.55, length_matched=True)
    left = rows
    for alone in (
        Filters(ties=False), Filters(duplicates=False), Filters(duplicates=False, ties=False, consistent=True),
        Filters(duplicates=False, ties=False, least_confidence=0.55),
        Filters(duplicates=False, ties=False, length_matched=True),
    ):  # fmt: skip
        left = [r for r, reason in zip(left, dropped_by(left, alone), strict=True) if not reason]
    together = [r for r, reason in zip(rows, dropped_by(rows, settings), strict=True) if not reason]
    assert together == left and 0 < len(left) < len(rows)
    assert sum(entry["dropped"] for entry in counts(dropped_by(rows, settings), settings)) == len(rows) - len(left)


def bin_of(r):
    short, long = sorted((r["response_a"]["tokens"], r["response_b"]["tokens"]))
    ratio = long / short if short else float("inf")
    return next((i for i, edge in enumerate(RATIO_EDGES) if ratio < edge), len(RATIO_EDGES))


@pytest.mark.parametrize("seed", range(5))
def test_after_length_matching_no_rule_on_lengths_beats_a_coin(seed):
    rows = many(seed)
    reasons = dropped_by(rows, Filters(duplicates=False, ties=False, length_matched=True))
    before, after = {}, {}
    for r, reason in zip(rows, reasons, strict=True):
        longer = r["response_a"]["tokens"] - r["response_b"]["tokens"]
        if longer == 0 or r["probability_a"] == 0.5:
            assert not reason
            continue
        kind = (longer > 0) == (r["probability_a"] > 0.5)
        for tally, counted in ((before, True), (after, not reason)):
            tally.setdefault(bin_of(r), [0, 0])[kind] += counted
    assert before != after
    for place, kinds in before.items():
        assert after[place] == [min(kinds)] * 2


def test_who_is_dropped_for_length_does_not_depend_on_the_order_of_rows():
    rows = many(0)
    settings = Filters(duplicates=False, ties=False, length_matched=True)
    reasons = {r["id"]: reason for r, reason in zip(rows, dropped_by(rows, settings), strict=True)}
    shuffled = random.Random(1).sample(rows, len(rows))
    assert {r["id"]: x for r, x in zip(shuffled, dropped_by(shuffled, settings), strict=True)} == reasons
