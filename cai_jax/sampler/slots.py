"""The host's side of the cache: what each slot holds, and the least work that answers a request in it.

A slot belongs to one row at a time. It stands on the first `shared` tokens of a shared prefix and holds the keys of
`own` tokens after them; a request runs only what comes after the longest common start of its tokens and those.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from cai_jax.config import Sampling
from cai_jax.sampler.cache import STRIP, Strips


@dataclass
class Run:
    """Tokens to run through the decoder, from a place in the slot's own cache on."""

    start: int
    tokens: list[int]
    asked: dict[int, list[int]] = field(default_factory=dict)  # place in tokens -> tokens that may come next
    into: dict[tuple[int, int], list] = field(default_factory=dict)  # (place, candidate) -> [(option, place)]
    done: int = 0


@dataclass
class Writing:
    """A completion under way."""

    sampling: Sampling
    seed: int
    last_token: int  # drawn or given, not yet run
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass
class Slot:
    """One row of the cache."""

    number: int
    row: object = None  # the program of the row that lives here, None: free
    index: int = -1  # of that row
    prefix: int = 0  # number of the shared prefix
    shared: int = 0
    own: list[int] = field(default_factory=list)
    runs: deque = field(default_factory=deque)
    writing: Writing | None = None
    scores: list | None = None  # an array an option, filled as runs end

    def clear(self):
        """Forget the row and its tokens."""
        self.row, self.index, self.prefix, self.shared, self.writing, self.scores = None, -1, 0, 0, None, None
        self.own.clear()
        self.runs.clear()

    def stand_on(self, tokens: list[int], prefixes: list[list[int]], reuse: bool) -> int:
        """Keep the longest start of `tokens`, but for the last, that a prefix or own cache hold; returns its length.

        What the slot stood on wins a tie, for then nothing is dropped; of prefixes the first.
        """
        usable = tokens[:-1]
        starts = [common_start(prefix, usable) if reuse else 0 for prefix in prefixes]
        fresh = max(starts)
        if reuse and self.shared <= starts[self.prefix] and (self.shared or self.own):
            kept = common_start(self.own, usable[self.shared :])
            if self.shared + kept >= fresh:
                del self.own[kept:]
                return self.shared + kept
        self.prefix, self.shared = starts.index(fresh), fresh
        self.own.clear()
        return fresh

    def write(self, tokens: list[int], prefixes: list[list[int]], sampling: Sampling, seed: int, reuse: bool) -> int:
        """Take up a Generate request; returns how many tokens need not be run. The last one runs while decoding."""
        kept = self.stand_on(tokens, prefixes, reuse)
        if todo := tokens[kept:-1]:
            self.runs.append(Run(len(self.own), todo))
        self.writing = Writing(sampling, seed, tokens[-1])
        return kept

    def score(
        self, tokens: list[int], options: list[list[int]], prefixes: list[list[int]], reuse: bool, at_once: int
    ) -> int:
        """Take up a Score request; returns how many tokens need not be run.

        First tokens of all options come from one place, `at_once` candidates a run; the rest of each option runs
        after the conversation, one option after the other.
        """
        kept = self.stand_on(tokens, prefixes, reuse)
        self.scores = [[0.0] * len(option) for option in options]
        end = len(self.own) + len(tokens) - kept
        first = Run(len(self.own), tokens[kept:])
        candidates = list(dict.fromkeys(option[0] for option in options))
        for i in range(0, len(candidates), at_once):
            run = first if i == 0 else Run(end - 1, tokens[-1:])
            place = len(run.tokens) - 1
            run.asked[place] = candidates[i : i + at_once]
            for n, option in enumerate(options):
                if option[0] in run.asked[place]:
                    run.into.setdefault((place, option[0]), []).append((n, 0))
            self.runs.append(run)
        for n, option in enumerate(options):
            if len(option) > 1:
                places = range(len(option) - 1)
                self.runs.append(Run(
                    end, option[:-1], {i: [option[i + 1]] for i in places},
                    {(i, option[i + 1]): [(n, i + 1)] for i in places},
                ))  # fmt: skip
        return kept

    def next_strips(self, length: int, limit: int) -> list["Strip"]:
        """Up to `limit` strips of the first run in line, each a part of one window of `length` entries."""
        run, strips = self.runs[0], []
        done = run.done
        while done < len(run.tokens) and len(strips) < limit:
            offset = (run.start + done) % length
            count = min(length - offset, len(run.tokens) - done)
            strips.append(Strip(self, run, done, count, run.start + done - offset, offset))
            done += count
        return strips

    def wrote(self, tokens: list[int], logprobs: list[float]) -> None:
        """These tokens were drawn; all but the last of them are in the cache, and so is the one before them."""
        self.own += [self.writing.last_token, *tokens[:-1]]
        self.writing.last_token = tokens[-1]
        self.writing.tokens += tokens
        self.writing.logprobs += logprobs

    def note(self, run: Run, place: int, logprobs) -> None:
        """File the log-probs that a run has found at one of its places."""
        for candidate, logprob in zip(run.asked[place], logprobs, strict=False):
            for option, at in run.into[place, candidate]:
                self.scores[option][at] = float(logprob)

    def ran(self, run: Run, count: int) -> None:
        """The next `count` tokens of the run are in the cache."""
        if run.done == 0:
            del self.own[run.start :]
        self.own += run.tokens[run.done : run.done + count]
        run.done += count
        if run.done == len(run.tokens):
            self.runs.popleft()


@dataclass
class Strip:
    """A piece of a run that lies in one window of the cache."""

    slot: Slot
    run: Run
    first: int  # place of its first token in the run
    count: int
    window: int  # place of the window in the slot's own cache
    offset: int  # place of its first token in the window

    def fill(self, strips: Strips, q: int, slot: int) -> None:
        """Write it into host arrays as strip q."""
        here = slice(self.offset, self.offset + self.count)
        strips.tokens_QT[q, here] = self.run.tokens[self.first : self.first + self.count]
        strips.real_QT[q, here] = True
        strips.slots_Q[q], strips.starts_Q[q] = slot, self.window
        strips.prefixes_Q[q], strips.shared_Q[q] = self.slot.prefix, self.slot.shared

    def asked(self):
        """(place in the window, place in the run) wherever log-probs are asked for."""
        for place in range(self.first, self.first + self.count):
            if place in self.run.asked:
                yield self.offset + place - self.first, place


def empty_strips(count: int) -> Strips:
    """Host arrays for `count` strips, none of them real."""
    columns = {name: np.zeros(count, np.int32) for name in ("slots_Q", "starts_Q", "prefixes_Q", "shared_Q")}
    return Strips(np.zeros((count, STRIP), np.int32), np.zeros((count, STRIP), bool), **columns)


def common_start(first: list[int], second: list[int]) -> int:
    """Length of the longest common start of two lists."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(i for i in range(length) if first[i] != second[i])
