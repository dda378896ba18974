"""Token sequences to fixed-shape batches: packing, padding, and an order that is a function of (seed, epoch).

A batch is a dict of arrays with rows first. Nothing here keeps state: the batch of step n follows from n.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Example:
    """A prompt and the completion to learn, as token ids; the completion ends with the end-of-turn token."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    def __len__(self):
        return len(self.prompt) + len(self.completion)


def pack(examples: Sequence[Example], length: int) -> dict[str, np.ndarray]:
    """Pack examples into rows of `length` tokens, longest first, each into the fullest row that has room.

    Returns `tokens`, `positions` (from 0 in each example, -1 in pads), `segments` (from 1 in each row, 0 in pads)
    and `targets` (1 where the token is part of a completion), all `[rows, length]` int32.
    Raises ValueError for an example longer than `length`.
    """
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda e: (-len(e), e.prompt, e.completion)):
        if len(example) > length:
            raise ValueError(f"an example of {len(example)} tokens does not fit a sequence of {length}")
        fitting = [i for i, free in enumerate(room) if free >= len(example)]
        if fitting:
            best = min(fitting, key=lambda i: room[i])
        else:
            best = len(rows)
            rows.append([])
            room.append(length)
        rows[best].append(example)
        room[best] -= len(example)
    packed = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "positions", "segments", "targets")}
    packed["positions"] -= 1
    for row, members in enumerate(rows):
        start = 0
        for segment, example in enumerate(members, 1):
            end = start + len(example)
            packed["tokens"][row, start:end] = example.prompt + example.completion
            packed["positions"][row, start:end] = np.arange(len(example))
            packed["segments"][row, start:end] = segment
            packed["targets"][row, start + len(example.prompt) : end] = 1
            start = end
    return packed


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


def take_rows(arrays: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """The named rows of every array; row -1 is an empty row: zeros, positions -1."""
    taken = {name: array[rows] for name, array in arrays.items()}
    for name, array in taken.items():
        array[rows < 0] = -1 if name.endswith("positions") else 0
    return taken
