"""Token sequences to fixed-shape batches: packing, padding, and an order that is a function of (seed, epoch).

A batch is a dict of arrays with rows first. Nothing here keeps state: the batch of step n follows from n.
"""

import heapq
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

PART = 500  # sizes that are packed together where that costs their square


@dataclass(frozen=True)
class Example:
    """A prompt and the completion to learn, as token ids; the completion ends with the end-of-turn token.

    Both are sequences of one kind: tuples, or arrays of the `array` module, which take four bytes a token. An anchor
    is a completion where the model is to stay as it was.
    """

    prompt: Sequence[int]
    completion: Sequence[int]
    anchor: bool = False

    def __len__(self):
        return len(self.prompt) + len(self.completion)


class Packing:
    """Examples packed into few rows of `length` tokens; which go together depends on their lengths alone.

    With `share_start` what all prompts begin with (a system prompt, as a rule) stands once in each row, before all.
    Only the plan is kept; `take` makes rows when they are asked for. Raises ValueError for an example longer than
    `length`.
    """

    def __init__(self, examples: Sequence[Example], length: int, share_start: bool = False):
        self.length = length
        self.start = start_of_all([example.prompt for example in examples]) if share_start else ()
        order = sorted(examples, key=lambda e: (-len(e), e.prompt, e.completion))
        if order and len(order[0]) > length:
            raise ValueError(f"an example of {len(order[0])} tokens does not fit a sequence of {length}")
        bins = bins_of([self._own(example) for example in order], length - len(self.start))
        self.rows = [[order[i] for i in row] for row in bins]

    def __len__(self):
        return len(self.rows)

    def _own(self, example: Example) -> int:
        """How many places of a row an example takes."""
        return len(example) - len(self.start)

    @property
    def efficiency(self) -> float:
        """The share of the rows' places that hold tokens."""
        return self.tokens(range(len(self))) / (len(self) * self.length)

    @property
    def limit(self) -> float:
        """The efficiency that no packing of these examples can exceed."""
        sizes = [self._own(example) for row in self.rows for example in row]
        fewest = fewest_bins(sizes, self.length - len(self.start))
        return (sum(sizes) + fewest * len(self.start)) / (fewest * self.length)

    @property
    def mean_length(self) -> float:
        """Tokens of an example, on average: how far one sees another."""
        lengths = [len(example) for row in self.rows for example in row]
        return sum(lengths) / len(lengths)

    @property
    def learnt(self) -> float:
        """The share of the rows' tokens that are of completions."""
        completions = sum(len(example.completion) for row in self.rows for example in row)
        return completions / self.tokens(range(len(self)))

    def tokens(self, rows: Iterable[int]) -> int:
        """How many tokens the named rows hold together; row -1 holds none."""
        return sum(len(self.start) + sum(map(self._own, self.rows[row])) for row in rows if row >= 0)

    def take(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """The named rows; row -1 is an empty one.

        Returns `tokens`, `positions` (from 0 in each example, -1 in pads), `segments` (from 1 in each row, 0 in pads
        and in a shared start) and `targets` (where the token is part of a completion 1, of an anchor's 2), all
        `[rows, length]` int32.
        """
        names = ("tokens", "positions", "segments", "targets")
        packed = {name: np.zeros((len(rows), self.length), np.int32) for name in names}
        packed["positions"] -= 1
        shared = len(self.start)
        for place, row in enumerate(rows):
            if row >= 0:
                packed["tokens"][place, :shared] = self.start
                packed["positions"][place, :shared] = np.arange(shared)
            start = shared
            for segment, example in enumerate(self.rows[row] if row >= 0 else (), 1):
                end = start + self._own(example)
                packed["tokens"][place, start:end] = (example.prompt + example.completion)[shared:]
                packed["positions"][place, start:end] = np.arange(shared, len(example))
                packed["segments"][place, start:end] = segment
                packed["targets"][place, end - len(example.completion) : end] = 1 + example.anchor
                start = end
        return packed


def start_of_all(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens that all prompts begin with, short of the last token of each, which predicts its completion."""
    first, last = (list(end(prompts, default=())) for end in (min, max))  # what these two share all do
    return tuple(os.path.commonprefix([first, last])[: min((len(prompt) - 1 for prompt in prompts), default=0)])


def bins_of(sizes: Sequence[int], length: int) -> list[list[int]]:
    """The numbers of the sizes, in decreasing order, in few bins of capacity `length`.

    By `best_fit`, and where that takes more than `fewest_bins`, by `tight_fit` if it takes fewer. That one is
    quadratic, so it has parts of about PART sizes; each part takes every so-many-th, which makes them alike.
    """
    bins = best_fit(sizes, length)
    if len(bins) == fewest_bins(sizes, length):
        return bins
    parts = -(-len(sizes) // PART)
    tight = [
        [start + parts * i for i in row]
        for start in range(parts)
        for row in tight_fit(sizes[start::parts], length)
    ]
    return min(bins, tight, key=len)


def tight_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Bins of capacity `length`, one after the other: the largest size that is left, and with it those that fill most.

    Which these are is found exactly, by all sums that the sizes left can make (after Gupta and Ho 1999, Production
    Planning and Control 10: minimum bin slack).
    """
    left, bins = list(range(len(sizes))), []
    while left:
        first, *others = left
        room = length - sizes[first]
        sums = [1]  # bit s is set where some of the sizes so far sum to s
        for i in others:
            sums.append((sums[-1] | sums[-1] << sizes[i]) & ((2 << room) - 1))
        total, chosen = sums[-1].bit_length() - 1, [first]
        for place in range(len(others) - 1, -1, -1):
            if not sums[place] >> total & 1:
                chosen.append(others[place])
                total -= sizes[others[place]]
        bins.append(chosen)
        left = [i for i in left if i not in chosen]
    return bins


def best_fit(sizes: Iterable[int], length: int) -> list[list[int]]:
    """Bins of capacity `length`: each size in turn goes into the fullest bin with room, the oldest of equal ones.

    Returns the numbers of the sizes in each bin. With sizes in decreasing order these are at most 11/9 of the
    fewest bins and 4 more (Johnson 1973). A bin is found by its free room, so the work grows with the sizes alone.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # heaps of bins, by free room
    rooms = 0  # bit r is set where a bin has exactly r places free
    for number, size in enumerate(sizes):
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            chosen = heapq.heappop(with_room[room])
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = length, len(bins)
            bins.append([])
        bins[chosen].append(number)
        heapq.heappush(with_room[room - size], chosen)
        rooms |= 1 << (room - size)
    return bins


def fewest_bins(sizes: Iterable[int], length: int) -> int:
    """A number of bins of capacity `length` below which `sizes` cannot go: Martello and Toth's second bound.

    Sizes over half of `length` need a bin each. Sizes from k to half share those bins, where one of at most
    `length - k` has left room, and fill others; smaller ones are left out. The greatest count over all k
    (Martello and Toth 1990, Discrete Applied Mathematics 28).
    """
    ordered = np.sort(np.fromiter(sizes, np.int64))
    sums = np.concatenate([[0], np.cumsum(ordered)])
    half = np.searchsorted(ordered, length // 2, side="right")
    smallest = np.unique(np.concatenate([[0], ordered[:half]]))
    first = np.searchsorted(ordered, smallest)  # of size k or more
    full = np.searchsorted(ordered, length - smallest, side="right")  # of more than length - k
    room = (full - half) * length - (sums[full] - sums[half])
    more = np.maximum(0, -(-(sums[half] - sums[first] - room) // length))
    return int(np.max(len(ordered) - half + more))


def right_padded(rows_of_tokens: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[B, length]` and their positions (-1 in pads)."""
    tokens_BT = np.zeros((len(rows_of_tokens), length), np.int32)
    positions_BT = np.full((len(rows_of_tokens), length), -1, np.int32)
    for row, tokens in enumerate(rows_of_tokens):
        tokens_BT[row, : len(tokens)] = tokens
        positions_BT[row, : len(tokens)] = np.arange(len(tokens))
    return tokens_BT, positions_BT


def pair_rows(pairs: Sequence[tuple], length: int) -> dict[str, np.ndarray]:
    """Pairs of texts with a common start, a row each: the start once, as segment 0, then both ends side by side.

    `pairs` are (start, end_a, end_b) as token ids. Returns `tokens`, `positions` (both ends go on from the start's
    last position, -1 in pads), `segments` (0 start, 1 and 2 the ends) `[rows, length]`, and `last` `[rows, 2]`, the
    places of the last token of each end.
    """
    rows = {name: np.zeros((len(pairs), length), np.int32) for name in ("tokens", "positions", "segments")}
    rows["positions"] -= 1
    rows["last"] = np.zeros((len(pairs), 2), np.int32)
    for row, (start, *ends) in enumerate(pairs):
        place = len(start)
        rows["tokens"][row, :place] = start
        rows["positions"][row, :place] = np.arange(place)
        for segment, end in enumerate(ends, 1):
            inside = slice(place, place + len(end))
            rows["tokens"][row, inside] = end
            rows["positions"][row, inside] = len(start) + np.arange(len(end))
            rows["segments"][row, inside] = segment
            place += len(end)
            rows["last"][row, segment - 1] = place - 1
    return rows


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Batches of an epoch; the last one may be short."""
    return -(-count // batch_size)


def batch_rows(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Row numbers of the batch of a step, `[batch_size]`; -1 fills a short last batch of an epoch."""
    epoch, place = divmod(step, steps_per_epoch(count, batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(count)
    rows = order[place * batch_size : (place + 1) * batch_size]
    return np.concatenate([rows, np.full(batch_size - len(rows), -1)]).astype(np.int64)


@dataclass(frozen=True)
class Rows:
    """Rows at hand as arrays, by name, with the face of a `Packing`."""

    arrays: dict[str, np.ndarray]

    def __len__(self):
        return len(self.arrays["tokens"])

    @property
    def mean_length(self) -> float:
        """Tokens of a row, on average."""
        return int((self.arrays["positions"] >= 0).sum()) / len(self)

    def tokens(self, rows: Sequence[int]) -> int:
        """How many tokens the named rows hold together; row -1 holds none."""
        numbers = np.asarray(rows)
        return int((self.arrays["positions"][numbers[numbers >= 0]] >= 0).sum())

    def take(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """The named rows; row -1 is an empty one."""
        return take_rows(self.arrays, np.asarray(rows))


def take_rows(arrays: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """The named rows of every array; row -1 is an empty row: zeros, positions -1."""
    taken = {name: array[rows] for name, array in arrays.items()}
    for name, array in taken.items():
        array[rows < 0] = -1 if name.endswith("positions") else 0
    return taken
