"""How alike short texts are: shared character n-grams, near duplicates, diversity of a set."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

SHINGLE = 4  # characters


def plain_words(text: str) -> list[str]:
    """The words of a text, lower case, without punctuation: what two texts share that are the same but for layout."""
    return re.findall(r"\w+(?:'\w+)*", text.casefold().replace("’", "'"))


def shingles(text: str) -> frozenset[str]:
    """The runs of SHINGLE characters in the words of a text, spaces between them and at both ends included."""
    line = f" {' '.join(plain_words(text))} "
    return frozenset(line[i : i + SHINGLE] for i in range(len(line) - SHINGLE + 1))


def jaccard(a: frozenset, b: frozenset) -> float:
    """Shared members over all members; 0 of two empty sets."""
    return len(a & b) / len(a | b) if a or b else 0.0


class Index:
    """Texts by their shingles, for finding the one most like another without comparing all."""

    def __init__(self, texts: Iterable[tuple[str, str]] = ()):
        """`texts` are (name, text)."""
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._holders: dict[str, list[int]] = defaultdict(list)
        for name, text in texts:
            self.add(name, text)

    def add(self, name: str, text: str) -> None:
        found = shingles(text)
        for shingle in found:
            self._holders[shingle].append(len(self._names))
        self._names.append(name)
        self._sizes.append(len(found))

    def nearest(self, text: str) -> tuple[float, str]:
        """The greatest Jaccard overlap of shingles with a text added before, and its name; of equal ones the first."""
        found = shingles(text)
        shared = Counter(number for shingle in found for number in self._holders.get(shingle, ()))
        overlaps = {n: common / (len(found) + self._sizes[n] - common) for n, common in shared.items()}
        if not overlaps:
            return 0.0, ""
        best = max(overlaps, key=lambda number: (overlaps[number], -number))
        return overlaps[best], self._names[best]


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Different word n-grams over all of them (Li et al. 2016, arXiv 1510.03055); None where there are none."""
    grams = [gram for text in texts for gram in _word_ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def _word_ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = plain_words(text)
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def diversity(texts: Sequence[str]) -> dict:
    """How varied texts are among themselves.

    Returns `texts`: how many; `distinct_1` and `distinct_2`: shares of different words and pairs of words;
    `mean_similarity`: Jaccard overlap of shingles over all pairs; `nearest_similarity`: that with the nearest other
    text, on average. None where there is too little text. Shares fall as a set grows: compare sets of one size.
    """
    sets = [shingles(text) for text in texts]
    overlaps = np.array([[jaccard(a, b) if a is not b else np.nan for b in sets] for a in sets])
    several = len(texts) > 1
    return {
        "texts": len(texts),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "mean_similarity": float(np.nanmean(overlaps)) if several else None,
        "nearest_similarity": float(np.nanmax(overlaps, axis=1).mean()) if several else None,
    }
