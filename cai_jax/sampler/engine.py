"""Conversations in, samples and option log-probs out: batching, buckets and keys around the jitted programs.

A row's text depends on its conversation, its settings, its key and its bucket alone. Its bucket follows from its
own length, so batch mates, slot and order change nothing.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from cai_jax.chat import decode_text, encode_chat, encode_text, stop_ids
from cai_jax.config import Sampling
from cai_jax.mesh import put_rows
from cai_jax.provenance import row_seed
from cai_jax.sampler import decode
from cai_jax.sampler.cache import cache_bytes, prepare

SMALLEST_COMPLETION = 64  # foot of the ladder of completion lengths, tokens


@dataclass(frozen=True)
class Sample:
    """One completion. `tokens` and `logprobs` include the stop token; `truncated` says that there was none."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    truncated: bool


@dataclass(frozen=True)
class _Request:
    index: int
    tokens: list[int]  # after the prefix
    prefixed: bool


@dataclass
class Sampler:
    """The sampler of one policy version.

    `model` is what `load_model` gives. At most `rows` rows run together, each of at most `max_length` tokens,
    prompt and completion. `mesh` splits rows over its data axes. `smallest_bucket` is the foot of the ladder of
    prompt lengths: higher means fewer compiled programs and more padding.
    """

    model: object
    max_length: int = 1024
    rows: int = 32
    dtype: str = "float32"
    mesh: object = None
    smallest_bucket: int = 64
    on_batch: Callable[[int, int], None] = lambda rows, tokens: None
    programs: set = field(default_factory=set)  # static shapes run so far; each is one compilation

    def __post_init__(self):
        self._weights = prepare(self.model.config, self.model.params, self.dtype)
        self._prefixes = {}
        nothing = jnp.zeros(0, jnp.int32)
        self._no_prefix = ([], decode.prefill_prefix(self.model.config, self._weights, nothing, self.dtype))

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
        results: list = [None] * count
        groups = defaultdict(list)
        for request in self._requests(conversations, prefix):
            new_tokens = bucket(samplings[request.index].max_new_tokens, SMALLEST_COMPLETION)
            groups[request.prefixed, bucket(len(request.tokens), self.smallest_bucket), new_tokens].append(request)
        for (prefixed, length, new_tokens), requests in sorted(groups.items()):
            _, shared = self._prefix(prefix) if prefixed else self._no_prefix
            for batch in _batches(requests, self.rows):
                tokens_BT, mask_BT = _left_padded([request.tokens for request in batch], self.rows, length)
                settings = self._settings([(samplings[r.index], row_seeds[r.index]) for r in batch])
                arrays = self._put((tokens_BT, mask_BT, settings))
                self.programs.add(("generate", shared.tokens_S.shape[0], length, new_tokens))
                out = decode.generate(self.model.config, self._weights, shared, *arrays, new_tokens, self.dtype)
                tokens_BN, logprobs_BN, lengths_B = (np.asarray(x) for x in out)
                for slot, request in enumerate(batch):
                    end = lengths_B[slot]
                    results[request.index] = self._sample(tokens_BN[slot, :end], logprobs_BN[slot, :end])
                self.on_batch(len(batch), int(lengths_B.sum()))
        return results

    def score(self, conversations: Sequence, options: Sequence, prefix: Sequence = ()) -> list[list[float]]:
        """Log-prob of each option as the next text of its conversation; see `score_tokens` for the arguments."""
        return [[float(np.sum(option)) for option in row] for row in self.score_tokens(conversations, options, prefix)]

    def score_tokens(self, conversations: Sequence, options: Sequence, prefix: Sequence = ()) -> list[list[np.ndarray]]:
        """Log-prob of every token of each option, at temperature 1.

        A conversation that ends with an assistant turn is continued inside that turn. `options` is one list for
        all conversations or a list for each; an option is a text, or a list of token ids. All options of a row
        share one pass over its conversation.
        """
        per_row = options and isinstance(options[0], list | tuple) and not isinstance(options[0][0], int)
        rows_of_options = list(options) if per_row else [options] * len(conversations)
        encoded = [[self._option(option) for option in row] for row in rows_of_options]
        results: list = [None] * len(conversations)
        groups = defaultdict(list)
        for request in self._requests(conversations, prefix):
            room = bucket(sum(len(option) for option in encoded[request.index]), 2)
            groups[request.prefixed, bucket(len(request.tokens), self.smallest_bucket), room].append(request)
        for (prefixed, length, room), requests in sorted(groups.items()):
            _, shared = self._prefix(prefix) if prefixed else self._no_prefix
            for batch in _batches(requests, self.rows):
                tokens_BT, mask_BT = _left_padded([request.tokens for request in batch], self.rows, length)
                packed = _pack_options([encoded[request.index] for request in batch], self.rows, room)
                self.programs.add(("score", shared.tokens_S.shape[0], length, room))
                logprobs_BO = np.asarray(
                    decode.score(
                        self.model.config, self._weights, shared, *self._put((tokens_BT, mask_BT, packed)), self.dtype
                    )
                )
                for slot, request in enumerate(batch):
                    ends = np.cumsum([len(option) for option in encoded[request.index]])
                    results[request.index] = np.split(logprobs_BO[slot, : ends[-1]], ends[:-1])
                self.on_batch(len(batch), int(mask_BT.sum()))
        return results

    def fits(self, conversation: Sequence, new_tokens: int, prefix: Sequence = ()) -> bool:
        """Whether a conversation and a completion of `new_tokens` stay inside `max_length`."""
        return len(self._encode([*prefix, *conversation])) + new_tokens <= self.max_length

    def cache_bytes(self, length: int | None = None) -> int:
        """Bytes of the key/value cache of a full batch of rows of `length` tokens (`max_length`)."""
        return cache_bytes(self.model.config, self.rows, length or self.max_length, self.dtype)

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

    def _requests(self, conversations, prefix):
        start, _ = self._prefix(prefix)
        for index, conversation in enumerate(conversations):
            tokens = self._encode([*prefix, *conversation])
            if len(tokens) >= self.max_length:
                raise ValueError(f"conversation {index} has {len(tokens)} tokens; max_length is {self.max_length}")
            prefixed = bool(start) and tokens[: len(start)] == start and len(tokens) > len(start)
            yield _Request(index, tokens[len(start) :] if prefixed else tokens, prefixed)

    def _prefix(self, messages):
        """Tokens of a shared conversation start and their cache, run at its first use.

        Without messages it is what the template writes before the first text of a user: often a system turn.
        """
        key = tuple((message["role"], message["content"]) for message in messages)
        if key not in self._prefixes:
            if messages:
                tokens = encode_chat(self.model.tokenizer, list(messages), add_generation_prompt=False)
            else:
                probes = [self._encode([{"role": "user", "content": text}]) for text in ("a", "0")]
                tokens = os.path.commonprefix(probes)
            tokens_S = jnp.asarray(tokens, jnp.int32)
            self.programs.add(("prefix", len(tokens)))
            self._prefixes[key] = (
                tokens,
                decode.prefill_prefix(self.model.config, self._weights, tokens_S, self.dtype),
            )
        return self._prefixes[key]

    def _settings(self, rows):
        padded = rows + [(Sampling(max_new_tokens=0), 0)] * (self.rows - len(rows))
        stops = stop_ids(self.model.tokenizer, self.model.config.eos_ids)
        column = {
            name: np.asarray([getattr(sampling, name) for sampling, _ in padded], dtype)
            for name, dtype in (
                ("temperature", np.float32),
                ("top_k", np.int32),
                ("top_p", np.float32),
                ("min_p", np.float32),
                ("repetition_penalty", np.float32),
                ("max_new_tokens", np.int32),
            )
        }
        seeds = np.asarray([seed for _, seed in padded], np.uint64)
        key = np.stack([seeds >> np.uint64(32), seeds & np.uint64(0xFFFFFFFF)], axis=1).astype(np.uint32)
        return decode.RowSettings(**column, stop=np.tile(np.asarray(stops, np.int32), (self.rows, 1)), key=key)

    def _put(self, arrays):
        return put_rows(self.mesh, arrays) if self.mesh is not None else arrays

    def _sample(self, tokens, logprobs):
        stops = stop_ids(self.model.tokenizer, self.model.config.eos_ids)
        truncated = not (len(tokens) and int(tokens[-1]) in stops)
        text = decode_text(self.model.tokenizer, [int(t) for t in (tokens if truncated else tokens[:-1])])
        return Sample(text, [int(t) for t in tokens], [float(x) for x in logprobs], truncated)


def bucket(size: int, smallest: int) -> int:
    """The step of the ladder (powers of two from `smallest`) that holds `size`."""
    step = smallest
    while step < size:
        step *= 2
    return step


def _batches(requests, rows):
    return [requests[i : i + rows] for i in range(0, len(requests), rows)]


def _left_padded(rows_of_tokens, rows, length):
    tokens_BT = np.zeros((rows, length), np.int32)
    mask_BT = np.zeros((rows, length), bool)
    for row, tokens in enumerate(rows_of_tokens):
        tokens_BT[row, length - len(tokens) :] = tokens
        mask_BT[row, length - len(tokens) :] = True
    return tokens_BT, mask_BT


def _pack_options(rows_of_options, rows, room):
    """All options of a row side by side, each a segment of its own."""
    packed = {name: np.zeros((rows, room), np.int32) for name in ("tokens", "segment", "offset")}
    for row, options in enumerate(rows_of_options):
        lengths = [len(option) for option in options]
        end = sum(lengths)
        packed["tokens"][row, :end] = np.concatenate(options)
        packed["segment"][row, :end] = np.repeat(np.arange(1, len(options) + 1), lengths)
        packed["offset"][row, :end] = np.concatenate([np.arange(n) for n in lengths])
    return packed
