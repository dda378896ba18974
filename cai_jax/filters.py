"""Which labelled pairs are fit to train on: pure functions on rows of preferences, each drop with its reason."""

import math
from collections import defaultdict
from collections.abc import Sequence

from cai_jax.config import Filters
from cai_jax.provenance import content_hash

TIE = 1e-3  # a probability this near to one half says nothing
RATIO_EDGES = (1.25, 1.5, 2.0, 4.0)  # between the bins of length ratios, longer over shorter


def dropped_by(rows: Sequence[dict], settings: Filters) -> list[str]:
    """For each row the name of the first filter that drops it, "" where it is kept.

    rows: {"id", "messages", "response_a": {"text", "tokens"}, "response_b": {...}, "probability_a", and "consistent" if
    that filter is on}. A filter sees what those before it have left; only `length_matched` looks at several rows.
    """
    reasons = [""] * len(rows)
    for name, find in _FILTERS.items():
        if _is_on(settings, name):
            left = [place for place, reason in enumerate(reasons) if not reason]
            for index in find([rows[place] for place in left], settings):
                reasons[left[index]] = name
    return reasons


def counts(reasons: Sequence[str], settings: Filters) -> list[dict]:
    """What each filter that is on has dropped, in order: {"filter", "dropped", "left"}."""
    left, found = len(reasons), []
    for name in _FILTERS:
        if _is_on(settings, name):
            dropped = sum(reason == name for reason in reasons)
            left -= dropped
            found.append({"filter": name, "dropped": dropped, "left": left})
    return found


def _is_on(settings: Filters, name: str) -> bool:
    return settings.least_confidence > 0.5 if name == "least_confidence" else getattr(settings, name)


def _duplicates(rows, settings):
    """Pairs of identical responses, and pairs whose prompt and responses, in either order, an earlier row has."""
    seen = set()
    for index, row in enumerate(rows):
        texts = sorted(row[side]["text"].strip() for side in ("response_a", "response_b"))
        key = content_hash([row["messages"], texts])
        if texts[0] == texts[1] or key in seen:
            yield index
        seen.add(key)


def _ties(rows, settings):
    return (index for index, row in enumerate(rows) if abs(row["probability_a"] - 0.5) < TIE)


def _inconsistent(rows, settings):
    return (index for index, row in enumerate(rows) if not row["consistent"])


def _unsure(rows, settings):
    for index, row in enumerate(rows):
        if max(row["probability_a"], 1 - row["probability_a"]) < settings.least_confidence:
            yield index


def _length_matched(rows, settings):
    """As many of the more frequent kind, longer wins or shorter wins, as the other has fewer, at every length ratio.

    Lengths are tokens. Within a bin of `RATIO_EDGES` both kinds are then equally many, so that neither which response
    is longer nor by how much tells which is preferred. Pairs of equal length and ties stay. Which pairs of a kind go is
    the order of a hash of their ids.
    """
    bins = defaultdict(lambda: ([], []))
    for index, row in enumerate(rows):
        lengths = [row[side]["tokens"] for side in ("response_a", "response_b")]
        if lengths[0] != lengths[1] and row["probability_a"] != 0.5:
            ratio = max(lengths) / min(lengths) if min(lengths) else math.inf
            longer_wins = (lengths[0] > lengths[1]) == (row["probability_a"] > 0.5)
            bins[sum(ratio >= edge for edge in RATIO_EDGES)][longer_wins].append(index)
    for kinds in bins.values():
        fewer, more = sorted(kinds, key=len)
        ordered = sorted(more, key=lambda index: content_hash(["length_matched", rows[index]["id"]]))
        yield from ordered[len(fewer) :]


_FILTERS = {  # in the order in which they are applied
    "duplicates": _duplicates,
    "ties": _ties,
    "consistent": _inconsistent,
    "least_confidence": _unsure,
    "length_matched": _length_matched,
}
