"""Near duplicates by an index against comparing all pairs, and what diversity means."""

import random

import pytest

from cai_jax.similarity import Index, distinct, diversity, jaccard, plain_words, shingles

WORDS = "how do i make a pipe lock phone letter to my boss so that nobody finds out where it came from".split()


def texts(n, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(n)]


def slowly_shingled(text):
    line, found = " " + " ".join(plain_words(text)) + " ", set()
    for start in range(len(line)):
        if len(line[start : start + 4]) == 4:
            found.add(line[start : start + 4])
    return found


def test_the_index_finds_what_comparing_all_pairs_finds():
    known, asked = texts(60), texts(200, seed=1)
    index = Index((str(i), text) for i, text in enumerate(known))
    for text in asked:
        mine = slowly_shingled(text)
        overlaps = []
        for other in known:
            theirs = slowly_shingled(other)
            overlaps.append(len([s for s in mine if s in theirs]) / len(mine | theirs) if mine | theirs else 0.0)
        overlap, name = index.nearest(text)
        assert overlap == pytest.approx(max(overlaps))
        assert max(overlaps) == 0 or overlaps[int(name)] == max(overlaps)
        assert overlaps[: int(name or 0)].count(max(overlaps)) == 0, "the first of equal ones"


def test_layout_case_and_punctuation_do_not_count():
    index = Index([("a", "How do I pick  a LOCK?")])
    assert index.nearest("how do i pick a lock") == (1.0, "a")
    assert index.nearest("“How do I pick a lock!”")[0] == 1.0
    assert index.nearest("Don’t tell")[0] == index.nearest("don't tell")[0]
    assert 0.5 < index.nearest("How do I pick a car lock?")[0] < 1
    assert index.nearest("!?") == (0.0, "") and Index().nearest("a text") == (0.0, "")
    assert jaccard(shingles(""), shingles("?")) == 0.0


def test_diversity_of_the_same_text_twice_and_of_different_texts():
    same, apart = (diversity(["a lock to pick", other]) for other in ("A lock to pick!", "my neighbour's house"))
    assert same["mean_similarity"] == same["nearest_similarity"] == 1.0 and same["distinct_1"] == 0.5
    assert apart["mean_similarity"] == 0.0 and apart["distinct_1"] == apart["distinct_2"] == 1.0
    one = diversity(["alone"])
    assert one["texts"] == 1 and one["mean_similarity"] is None and one["distinct_2"] is None
    assert distinct([], 1) is None and diversity([])["texts"] == 0
    mixed = diversity(["a lock to pick", "a lock to pick", "my neighbour's house"])
    assert mixed["nearest_similarity"] == pytest.approx(2 / 3) and mixed["mean_similarity"] == pytest.approx(1 / 3)
