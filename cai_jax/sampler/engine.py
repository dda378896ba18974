"""The engine: thousands of row programs moved through the slots of one cache.

A stage describes one row as a generator that yields `Generate`, `Score` and `Outside` requests and goes on with the
answers. The engine gives each row a slot for its whole life, runs what its requests add to the slot's tokens, decodes
all slots that write, and hands the slot to the next row as soon as its row ends. A row's text depends on its
conversation, its settings and its key; batch mates, slot and order change nothing, nor does the time that calls
outside take.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from cai_jax.chat import decode_text, encode_chat, encode_text, stop_ids
from cai_jax.config import Sampling
from cai_jax.mesh import on_host, platform_of, put_rows
from cai_jax.provenance import row_seed
from cai_jax.sampler import decode
from cai_jax.sampler.cache import BLOCK, STRIP, entry_dtype, new_cache
from cai_jax.sampler.memory import check_cache_fits
from cai_jax.sampler.outside import Calls, Counts
from cai_jax.sampler.requests import Generate, Outside, Row, Sample, Score
from cai_jax.sampler.sampling import RowSettings
from cai_jax.sampler.slots import Run, Slot, Writing, empty_strips
from cai_jax.sampler.weights import prepare

CANDIDATES = 16  # log-probs asked for at one place, at most


@dataclass
class Sampler:
    """The sampler of one policy version.

    `model` is what `load_model` gives. At most `rows` rows live in the cache, each of at most `max_length` tokens,
    prompt and completion. `mesh` splits rows over its data axes and heads over tensor. `reuse=False` computes every
    request from its first token (for comparison).
    """

    model: object
    max_length: int = 1024
    rows: int = 32
    dtype: str = "float32"
    mesh: object = None
    prefill_tokens: int = 128  # run in one prefill call, on all devices together
    chunk: int = 32  # decoding steps between two looks at the host
    int8_weights: bool = False  # of the projections; less memory, an error that tests/sampler/test_int8.py bounds
    int8_cache: bool = False
    reuse: bool = True
    ignore_stops: bool = False  # write to the limit, whatever is drawn (benchmarks)
    on_progress: Callable[[Counts], None] = lambda counts: None
    programs: set = field(default_factory=set)  # static shapes run so far; each is one compilation
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self):
        config = self.model.config
        self._ways = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        self._strips = max(1, self.prefill_tokens // (STRIP * self._ways))  # of each data shard
        self._weights = prepare(config, self.model.params, self.dtype, self.mesh, self.int8_weights)
        self._cache_dtype = entry_dtype(self.dtype, self.int8_cache, platform_of(self.mesh))
        self._cache = None  # made for the first request, with the room that its prefix needs
        self._prefixes: list[list[int]] = []
        self._stops = () if self.ignore_stops else stop_ids(self.model.tokenizer, config.eos_ids)
        self._slots = [Slot(number) for number in range(self.rows)]
        self._calls = Calls()

    # ---- what users call

    def generate(
        self,
        conversations: Sequence,
        sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 - frozen
        seed: int = 0,
        row_seeds: Sequence[int] | None = None,
        prefix: Sequence = (),
    ) -> list[Sample]:
        """Sample the next assistant turn of every conversation (lists of {role, content}).

        `row_seeds`, 64-bit ints, are the keys of the rows; without them they come from `seed` and the place in the
        list. `prefix` is a conversation start that all rows share; it is run once. Raises ValueError for a row that
        does not fit `max_length` (ask `fits` first).
        """
        count = len(conversations)
        samplings = [sampling] * count if isinstance(sampling, Sampling) else list(sampling)
        row_seeds = [row_seed(seed, "generate", i) for i in range(count)] if row_seeds is None else list(row_seeds)
        asked = zip(conversations, samplings, row_seeds, strict=True)
        return self.run([_only(Generate([*prefix, *c], s, key)) for c, s, key in asked], prefix)

    def score(self, conversations: Sequence, options: Sequence, prefix: Sequence = ()) -> list[list[float]]:
        """Log-prob of each option as the next text of its conversation; see `score_tokens` for the arguments."""
        return [[float(np.sum(option)) for option in row] for row in self.score_tokens(conversations, options, prefix)]

    def score_tokens(self, conversations: Sequence, options: Sequence, prefix: Sequence = ()) -> list[list[np.ndarray]]:
        """Log-prob of every token of each option, at temperature 1.

        A conversation that ends with an assistant turn is continued inside that turn. `options` is one list for
        all conversations or a list for each; an option is a text, or a list of token ids.
        """
        per_row = options and isinstance(options[0], list | tuple) and not isinstance(options[0][0], int)
        rows_of_options = list(options) if per_row else [options] * len(conversations)
        asked = zip(conversations, rows_of_options, strict=True)
        return self.run([_only(Score([*prefix, *c], row)) for c, row in asked], prefix)

    def run(self, rows: Iterable[Row], prefix: Sequence = (), more: Sequence[Sequence] = ()) -> list:
        """What each row program returns, in order; arguments as in `stream`."""
        return [result for _, result in sorted(self.stream(rows, prefix, more), key=lambda pair: pair[0])]

    def stream(
        self, rows: Iterable[Row], prefix: Sequence = (), more: Sequence[Sequence] = ()
    ) -> Iterator[tuple[int, object]]:
        """(place, what it returned) of each row program, as soon as it ends. Programs are taken up when a slot is free.

        `prefix` and each of `more` is a conversation start that many requests begin with; each is run once.
        """
        self._share(prefix, more)
        waiting = enumerate(rows)
        self._calls = Calls()  # none of an earlier stream that was left before its end
        for slot in self._slots:
            slot.clear()
        while True:
            for slot in self._slots:
                while slot.row is None and (following := next(waiting, None)) is not None:
                    slot.index, slot.row = following
                    yield from self._answer(slot, None)
            self.on_progress(self.counts)
            if any(slot.runs for slot in self._slots):
                yield from self._prefill()
            elif any(slot.writing for slot in self._slots):
                yield from self._decode()
            elif not self._calls:
                return
            busy = any(slot.runs or slot.writing for slot in self._slots)
            for number, answer in self._calls.ended(wait=not busy):
                yield from self._answer(self._slots[number], answer)

    def fits(self, conversation: Sequence, new_tokens: int, prefix: Sequence = ()) -> bool:
        """Whether a conversation and a completion of `new_tokens` stay inside `max_length`."""
        return len(self._encode([*prefix, *conversation])) + new_tokens <= self.max_length

    # ---- rows and their requests

    def _answer(self, slot: Slot, answer) -> Iterator[tuple[int, object]]:
        """Give a row its answer and take up its next request; or its result, and the slot is free."""
        try:
            request = slot.row.send(answer)
        except StopIteration as end:
            self.counts.done += 1
            yield slot.index, end.value
            slot.clear()
            return
        if isinstance(request, Outside):
            return self._calls.start(slot.number, request.call)
        tokens = self._encode(request.conversation)
        if isinstance(request, Generate):
            self._check_room(slot.index, tokens, request.sampling.max_new_tokens)
            kept = slot.write(tokens, self._prefixes, request.sampling, request.seed, self.reuse)
        else:
            options = [self._option(option) for option in request.options]
            self._check_room(slot.index, tokens, max(map(len, options)))
            kept = slot.score(tokens, options, self._prefixes, self.reuse, CANDIDATES)
        self.counts.reused += kept

    def _check_room(self, index, tokens, new_tokens):
        if len(tokens) + new_tokens > self.max_length:
            raise ValueError(
                f"row {index} has {len(tokens)} tokens and asks for {new_tokens}; max_length is {self.max_length}"
            )

    def _encode(self, conversation):
        continued = bool(conversation) and conversation[-1]["role"] == "assistant"
        return encode_chat(
            self.model.tokenizer, conversation, add_generation_prompt=not continued, continue_final=continued
        )

    def _option(self, option):
        tokens = encode_text(self.model.tokenizer, option) if isinstance(option, str) else list(option)
        if not tokens:
            raise ValueError("an option has no tokens: give each option some text")
        return tokens

    # ---- the programs on the device

    def _prefill(self) -> Iterator[tuple[int, object]]:
        """One call of the prefill program, with as many strips of waiting runs as it holds."""
        pieces, asked = self._run_strips(self._waiting_strips())
        for (slot, run, place), logprobs in asked:
            slot.note(run, place, logprobs)
        for piece in pieces:
            piece.slot.ran(piece.run, piece.count)
            self.counts.prefilled += piece.count
        for slot in {id(piece.slot): piece.slot for piece in pieces}.values():
            if slot.scores is not None and not slot.runs:
                scores, slot.scores = [np.asarray(option, np.float32) for option in slot.scores], None
                yield from self._answer(slot, scores)

    def _waiting_strips(self):
        """Per data shard, the next strips of the run that each slot has first in line."""
        for group in self._groups():
            taken = []
            for slot in group:
                if slot.runs and len(taken) < self._strips:
                    taken += slot.next_strips(STRIP, self._strips - len(taken))
            yield taken

    def _run_strips(self, groups):
        """Run strips, a list a data shard; returns them and the log-probs asked for, [((slot, run, place), values)]."""
        groups, length = list(groups), max(self._strips * STRIP, decode.ASKED_AT_ONCE)
        strips = empty_strips(self._ways * self._strips)
        asked = decode.Asked(
            np.zeros(self._ways * length, np.int32), np.zeros((self._ways * length, CANDIDATES), np.int32),
            np.zeros(self._ways, np.int32),
        )  # fmt: skip
        wanted = {}
        for way, pieces in enumerate(groups):
            for q, piece in enumerate(pieces):
                piece.fill(strips, way * self._strips + q, self._place(piece.slot))
                for token, place in piece.asked():
                    at = way * length + int(asked.count_1[way])
                    asked.places_M[at] = q * STRIP + token
                    candidates = piece.run.asked[place]
                    asked.tokens_MX[at, : len(candidates)] = candidates
                    asked.count_1[way] += 1
                    wanted[at] = (piece.slot, piece.run, place)
        self.programs.add(("prefill", *self._shapes()))
        self._cache, logprobs = decode.prefill(
            self.model.config, self.mesh, self._weights, self._cache, *self._put((strips, asked))
        )
        logprobs = on_host(logprobs) if wanted else None
        return list(chain(*groups)), [(key, logprobs[at]) for at, key in wanted.items()]

    def _decode(self) -> Iterator[tuple[int, object]]:
        """Some steps of the decoding loop: until a few rows have ended, or the chunk is full."""
        slots, history_BS = self._slot_arrays()
        patience = np.int32(max(1, self.rows // self._ways // 8))
        self.programs.add(("decode", *self._shapes()))
        self._cache, *out = decode.decode(
            self.model.config, self.mesh, self._weights, self._cache, *self._put((slots, history_BS)), patience,
            self.chunk,
        )  # fmt: skip
        tokens_BC, logprobs_BC, counts_B = map(on_host, out)
        self.counts.steps += self.rows * int(counts_B.max())
        self.counts.generated += int(counts_B.sum())
        ended = []
        for slot, tokens, logprobs, count in zip(self._slots, tokens_BC, logprobs_BC, counts_B, strict=True):
            if slot.writing:
                slot.wrote(tokens[:count].tolist(), logprobs[:count].tolist())
                if (sample := self._ended(slot.writing)) is not None:
                    ended.append((slot, sample))
        for slot, sample in ended:
            slot.writing = None
            yield from self._answer(slot, sample)

    def _ended(self, writing: Writing) -> Sample | None:
        """The sample, if a stop token, a stop string or the limit has ended it."""
        tokens, sampling = writing.tokens, writing.sampling
        stopped = tokens[-1] in self._stops
        ended = stopped or len(tokens) >= sampling.max_new_tokens
        if not ended and not sampling.stop:
            return None
        text = decode_text(self.model.tokenizer, tokens[:-1] if stopped else tokens)
        if any(stop in text for stop in sampling.stop):
            return self._cut(writing)
        return Sample(text, list(tokens), list(writing.logprobs), truncated=not stopped) if ended else None

    def _cut(self, writing: Writing) -> Sample:
        """The sample up to the first token that completes a stop string; its text ends before that string."""
        for count in range(1, len(writing.tokens) + 1):
            text = decode_text(self.model.tokenizer, writing.tokens[:count])
            if found := [text.index(stop) for stop in writing.sampling.stop if stop in text]:
                return Sample(text[: min(found)], writing.tokens[:count], writing.logprobs[:count], truncated=False)
        raise AssertionError("the stop string was there")

    def _share(self, messages, more=()) -> None:
        """Run conversation starts once and make them the shared prefixes."""
        asked = [self._prefix_tokens(messages), *map(self._prefix_tokens, filter(None, more))] if self.reuse else []
        asked = {tuple(tokens) for tokens in asked if len(tokens) < self.max_length}  # no request stands on others
        # In one order, whoever asks: it decides the shapes.
        prefixes = [list(tokens) for tokens in sorted(asked, key=lambda tokens: (-len(tokens), tokens))] or [[]]
        if self._cache is not None and prefixes == self._prefixes:
            return
        rooms = tuple(-(-len(tokens) // BLOCK) * BLOCK for tokens in prefixes)
        if self._cache is None or rooms != self._cache.prefix_rooms:
            self._cache = None  # two caches at once could be too much
            check_cache_fits(
                self.model.config, self.rows, self.max_length, sum(rooms), self._cache_dtype, self.mesh
            )
            self._cache = new_cache(
                self.model.config, self.rows, self.max_length, rooms, self._cache_dtype, self.mesh
            )
        try:
            for number, tokens in enumerate(prefixes):
                if tokens:
                    self._share_one(number, tokens)
        except BaseException:
            self._cache = None  # it may be half filled, or given away to a program that failed
            raise
        self._prefixes = prefixes

    def _share_one(self, number: int, tokens: list[int]) -> None:
        firsts = [group[0] for group in self._groups()]
        for slot in firsts:
            slot.clear()
            slot.runs.append(Run(0, list(tokens)))
        while any(slot.runs for slot in firsts):
            for piece in self._run_strips([slot.next_strips(STRIP, self._strips) for slot in firsts])[0]:
                piece.slot.ran(piece.run, piece.count)
        self.counts.prefilled += len(tokens)
        room = self._cache.prefix_rooms[number]
        self.programs.add(("share", room, *self._shapes()))
        entries = decode.share(self.mesh, self._cache, room)
        shared = tuple(
            (*prefixes[:number], new, *prefixes[number + 1 :])
            for prefixes, new in zip(self._cache.shared, entries, strict=True)
        )
        self._cache = self._cache.replace(shared=shared)

    def _prefix_tokens(self, messages) -> list[int]:
        """Without messages it is what the template writes before the first text of a user: often a system turn."""
        if messages:
            return encode_chat(self.model.tokenizer, list(messages), add_generation_prompt=False)
        probes = [self._encode([{"role": "user", "content": text}]) for text in ("a", "0")]
        return os.path.commonprefix(probes)

    # ---- host arrays

    def _slot_arrays(self):
        """What the decoding loop needs to know of every slot."""
        writings = [slot.writing for slot in self._slots]
        samplings = [writing.sampling if writing else Sampling(max_new_tokens=0) for writing in writings]
        column = {
            name: np.asarray([getattr(sampling, name) for sampling in samplings], dtype)
            for name, dtype in (
                ("temperature", np.float32), ("top_k", np.int32), ("top_p", np.float32), ("min_p", np.float32),
                ("repetition_penalty", np.float32), ("max_new_tokens", np.int32),
            )
        }  # fmt: skip
        seeds = np.asarray([writing.seed if writing else 0 for writing in writings], np.uint64)
        key = np.stack([seeds >> np.uint64(32), seeds & np.uint64(0xFFFFFFFF)], axis=1).astype(np.uint32)
        stop = np.tile(np.asarray(self._stops or (-1,), np.int32), (self.rows, 1))
        history_BS = np.full((self.rows, self.max_length), -1, np.int32)
        for row, (slot, sampling) in enumerate(zip(self._slots, samplings, strict=True)):
            if slot.writing and sampling.repetition_penalty != 1:
                tokens = [*self._prefixes[slot.prefix][: slot.shared], *slot.own, slot.writing.last_token]
                history_BS[row, : len(tokens)] = tokens
        return decode.Slots(
            np.asarray([writing.last_token if writing else 0 for writing in writings], np.int32),
            np.asarray([len(slot.own) for slot in self._slots], np.int32),
            np.asarray([slot.prefix for slot in self._slots], np.int32),
            np.asarray([slot.shared for slot in self._slots], np.int32),
            np.asarray([len(writing.tokens) if writing else 0 for writing in writings], np.int32),
            np.asarray([writing is not None for writing in writings]),
            RowSettings(**column, stop=stop, key=key),
        ), history_BS

    def _groups(self):
        """The slots of each data shard."""
        each = self.rows // self._ways
        return [self._slots[i : i + each] for i in range(0, self.rows, each)]

    def _place(self, slot: Slot) -> int:
        """Number of a slot inside its data shard."""
        return slot.number % (self.rows // self._ways)

    def _shapes(self):
        return self.rows, self.max_length, self._cache.prefix_rooms, self.dtype

    def _put(self, arrays):
        return arrays if self.mesh is None else put_rows(self.mesh, arrays)


def bucket(size: int, smallest: int) -> int:
    """The step of a ladder (powers of two from `smallest`) that holds `size`."""
    step = smallest
    while step < size:
        step *= 2
    return step


def _only(request) -> Row:
    """A row that asks once and returns the answer."""
    return (yield request)
