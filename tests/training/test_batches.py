"""Packing and order: nothing lost, nothing mixed, and the batch of a step is a function of the step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import pack

from cai_jax.training.batches import (
    Example,
    Packing,
    Rows,
    batch_rows,
    best_fit,
    bins_of,
    fewest_bins,
    right_padded,
    start_of_all,
    steps_per_epoch,
    take_rows,
    tight_fit,
)

EXAMPLES = st.lists(
    st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.lists(st.integers(1, 9), min_size=1, max_size=8)),
    min_size=1,
    max_size=30,
).map(lambda rows: [Example(tuple(prompt), tuple(completion)) for prompt, completion in rows])


@settings(deadline=None, max_examples=60)
@given(EXAMPLES)
def test_every_example_comes_out_of_the_pack_once_and_whole(examples):
    packed = pack(examples, 16)
    found = []
    for row in range(len(packed["tokens"])):
        for segment in range(1, packed["segments"][row].max() + 1):
            inside = packed["segments"][row] == segment
            tokens, targets = packed["tokens"][row, inside], packed["targets"][row, inside]
            assert packed["positions"][row, inside].tolist() == list(range(len(tokens)))
            split = int((targets == 0).sum())
            assert targets.tolist() == [0] * split + [1] * (len(tokens) - split)
            found.append(Example(tuple(tokens[:split].tolist()), tuple(tokens[split:].tolist())))
    key = lambda e: (e.prompt, e.completion)  # noqa: E731
    assert sorted(found, key=key) == sorted(examples, key=key)
    pads = packed["segments"] == 0
    assert (packed["positions"][pads] == -1).all() and not packed["targets"][pads].any()


def test_packing_wastes_little_and_refuses_what_cannot_fit():
    rng = np.random.default_rng(0)
    examples = [Example((1,) * int(n), (2,) * int(n)) for n in rng.integers(5, 60, 200)]
    packed = pack(examples, 256)
    assert sum(map(len, examples)) / packed["tokens"].size > 0.95
    with pytest.raises(ValueError, match="does not fit"):
        pack([Example((1,) * 200, (2,) * 100)], 256)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_best_fit_is_the_obvious_search(sizes):
    bins, room = [], []
    for number, size in enumerate(sizes):
        fitting = [i for i, free in enumerate(room) if free >= size]
        if not fitting:
            fitting = [len(bins)]
            bins.append([])
            room.append(20)
        best = min(fitting, key=lambda i: room[i])
        bins[best].append(number)
        room[best] -= size
    assert best_fit(sizes, 20) == bins


def fewest(sizes, length):
    """The fewest bins, by trying every place of every size."""
    best = len(sizes)

    def place(rest, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if not rest:
            best = len(rooms)
            return
        for i in range(len(rooms)):
            if rooms[i] >= rest[0] and rooms[i] not in rooms[:i]:
                place(rest[1:], [*rooms[:i], rooms[i] - rest[0], *rooms[i + 1 :]])
        place(rest[1:], [*rooms, length - rest[0]])

    place(sorted(sizes, reverse=True), [])
    return best


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9))
def test_no_packing_is_fuller_than_the_limit_and_ours_is_near_it(sizes):
    bound, exact = fewest_bins(sizes, 12), fewest(sizes, 12)
    packing = Packing([Example((1,) * (n - 1), (2,)) for n in sizes], 12)
    assert -(-sum(sizes) // 12) <= bound <= exact <= len(packing) <= exact + 1
    assert packing.limit == sum(sizes) / (bound * 12) >= packing.efficiency


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 20), max_size=40))
def test_a_tight_bin_is_the_fullest_that_its_first_size_allows(sizes):
    sizes = sorted(sizes, reverse=True)
    bins = tight_fit(sizes, 20)
    assert sorted(number for row in bins for number in row) == list(range(len(sizes)))
    left = list(range(len(sizes)))
    for row in bins:
        assert row[0] == left[0]
        sums = {sizes[row[0]]}
        for number in left[1:]:
            sums |= {total + sizes[number] for total in sums}
        assert sum(sizes[number] for number in row) == max(total for total in sums if total <= 20)
        left = [number for number in left if number not in row]


def test_rows_are_within_two_in_a_hundred_of_the_limit():
    """Lengths as chats have them, and three to a row, where the fullest row that has room is a poor choice."""
    rng = np.random.default_rng(0)
    for sizes, length in (
        (rng.lognormal(4.5, 0.7, 1200).astype(int) + 10, 256),
        (rng.lognormal(5.5, 0.7, 300).astype(int) + 10, 1024),
        (rng.integers(70, 101, 1100), 256),
    ):
        sizes = sorted(sizes[sizes <= length].tolist(), reverse=True)
        bins = bins_of(sizes, length)
        assert sorted(number for row in bins for number in row) == list(range(len(sizes)))
        assert max(sum(sizes[number] for number in row) for row in bins) <= length
        assert len(bins) <= 1.02 * fewest_bins(sizes, length), length
    assert len(best_fit(sizes, 256)) > 1.1 * len(bins)


def test_the_limit_knows_that_long_examples_stand_alone():
    assert fewest_bins([7, 7, 7, 1], 12) == 3 and fewest_bins([7, 7, 6, 5, 5], 12) == 3
    assert fewest_bins([9, 9, 4, 4, 4], 12) == 3 and fewest_bins([12] * 4, 12) == 4


def test_rows_made_when_asked_for_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    examples = [Example((1,) * int(n), (2,) * int(n)) for n in rng.integers(1, 30, 40)]
    packing, whole = Packing(examples, 64), pack(examples, 64)
    rows = np.array([3, -1, 0, len(packing) - 1])
    for source in (packing, Rows(whole)):
        assert len(source) == len(whole["tokens"])
        assert source.tokens(rows) == int((source.take(rows)["positions"] >= 0).sum())
        for name, expected in take_rows(whole, rows).items():
            np.testing.assert_array_equal(source.take(rows)[name], expected)
    assert packing.efficiency == sum(map(len, examples)) / whole["tokens"].size


@pytest.mark.parametrize("count, batch_size", [(10, 4), (8, 4), (3, 4), (1, 1)])
def test_an_epoch_visits_every_row_once_and_epochs_differ(count, batch_size):
    steps = steps_per_epoch(count, batch_size)
    epochs = []
    for epoch in range(3):
        rows = np.concatenate([batch_rows(count, batch_size, 5, epoch * steps + i) for i in range(steps)])
        assert sorted(rows[rows >= 0]) == list(range(count))
        epochs.append(rows.tolist())
    if count > 3:
        assert epochs[0] != epochs[1] != epochs[2]


def test_empty_rows_hold_nothing():
    tokens, positions = right_padded([[5, 6], [7]], 4)
    batch = take_rows({"tokens": tokens, "positions": positions}, np.array([1, -1]))
    assert batch["tokens"].tolist() == [[7, 0, 0, 0], [0, 0, 0, 0]]
    assert batch["positions"].tolist() == [[0, -1, -1, -1], [-1, -1, -1, -1]]


def test_what_prompts_begin_with_stands_once_a_row():
    examples = [Example((1, 2, 3, *range(10, 10 + n)), (4,) * n, n % 2 == 0) for n in range(1, 9)]
    packing, plain = Packing(examples, 40, share_start=True), Packing(examples, 40)
    rows = packing.take(range(len(packing)))
    assert packing.start == (1, 2, 3) and len(packing) < len(plain)
    assert (rows["tokens"][:, :3] == (1, 2, 3)).all() and (rows["positions"][:, :3] == (0, 1, 2)).all()
    assert not rows["segments"][:, :3].any() and not rows["targets"][:, :3].any()
    found = []
    for row in range(len(packing)):
        for segment in range(1, rows["segments"][row].max() + 1):
            own = np.flatnonzero(rows["segments"][row] == segment)
            assert (rows["positions"][row, own] == np.arange(3, 3 + len(own))).all()
            tokens, marks = (1, 2, 3, *rows["tokens"][row, own].tolist()), rows["targets"][row, own]
            end = 3 + int((marks == 0).sum())
            assert (marks[end - 3 :] == marks[-1]).all()
            found.append(Example(tokens[:end], tokens[end:], bool(marks[-1] == 2)))
    assert sorted(found, key=len) == examples, "nothing is lost, nothing mixed"
    assert packing.tokens(range(len(packing))) == (rows["positions"] >= 0).sum()
    assert packing.efficiency <= packing.limit <= 1


def test_a_start_of_all_leaves_every_prompt_a_token():
    assert start_of_all([(1, 2, 3), (1, 2)]) == (1,) and start_of_all([(1, 2), (1, 2)]) == (1,)
    assert start_of_all([]) == () and start_of_all([(1,), (1, 2)]) == () and start_of_all([(1, 2), (3, 2)]) == ()
