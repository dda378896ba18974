"""The jitted programs of the sampler: prefix, generate, score. Nothing else in a run decodes."""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from cai_jax.models.families import ModelConfig
from cai_jax.models.transformer import NEGATIVE, unembed
from cai_jax.sampler.cache import Cache, empty_cache, extend


@flax.struct.dataclass
class RowSettings:
    """How each row is sampled; everything is traced, so no value of it compiles a new program."""

    temperature: jax.Array  # [B], 0 is greedy
    top_k: jax.Array  # [B], 0 is off
    top_p: jax.Array  # [B], 1 is off
    min_p: jax.Array  # [B], 0 is off
    repetition_penalty: jax.Array  # [B], 1 is off
    max_new_tokens: jax.Array  # [B]; 0 marks an unused row
    stop: jax.Array  # [B, X] token ids that end a row, padded with -1
    key: jax.Array  # [B, 2] uint32, the row key


@flax.struct.dataclass
class Prefix:
    """A conversation start that many rows share: its tokens `[S]` and its one-row cache."""

    tokens_S: jax.Array
    cache: Cache


@flax.struct.dataclass
class Progress:
    """What the decode loop carries besides the cache."""

    count: jax.Array  # tokens emitted so far by the longest row
    live_B: jax.Array
    last_token_B: jax.Array
    tokens_BN: jax.Array
    logprobs_BN: jax.Array
    lengths_B: jax.Array
    seen_BV: jax.Array


@partial(jax.jit, static_argnames=("config", "dtype"))
def prefill_prefix(config: ModelConfig, weights, tokens_S, dtype) -> Prefix:
    """Run a shared conversation start once. It may be empty."""
    cache = empty_cache(config, 1, tokens_S.shape[0], dtype)
    if tokens_S.shape[0]:
        tokens_BT = tokens_S[None]
        positions_BT = jnp.arange(tokens_S.shape[0], dtype=jnp.int32)[None]
        cache, _ = extend(config, weights, cache, tokens_BT, positions_BT, jnp.zeros_like(tokens_BT), 0)
    return Prefix(tokens_S, cache)


@partial(jax.jit, static_argnames=("config", "new_tokens", "dtype"))
def generate(
    config: ModelConfig, weights, prefix: Prefix, tokens_BT, mask_BT, settings: RowSettings, new_tokens, dtype
):
    """Sample a continuation of every row.

    `tokens_BT` are prompts after the prefix, left-padded; `new_tokens` is the room for the longest completion.
    Returns tokens `[B, new_tokens]` (the stop token included), their log-probs under softmax(logits / temperature)
    before any filter (temperature 1 for a greedy row), and the length of every completion.
    """
    rows, last = tokens_BT.shape[0], tokens_BT.shape[1] - 1
    cache, positions_BT, shared = _start(config, prefix, mask_BT, new_tokens, dtype)
    if last:  # the loop begins with the last token of the prompt
        before_BT = tokens_BT[:, :last]
        cache, _ = extend(
            config, weights, cache, before_BT, positions_BT[:, :last], jnp.zeros_like(before_BT), 0, shared
        )
    last_positions_B = positions_BT[:, -1]
    progress = Progress(
        count=jnp.int32(0),
        live_B=settings.max_new_tokens > 0,
        last_token_B=tokens_BT[:, -1],
        tokens_BN=jnp.zeros((rows, new_tokens), jnp.int32),
        logprobs_BN=jnp.zeros((rows, new_tokens), jnp.float32),
        lengths_B=jnp.zeros(rows, jnp.int32),
        seen_BV=_seen_tokens(config, prefix.tokens_S, tokens_BT, mask_BT),
    )

    def step(state):
        cache, progress = state
        positions_B1 = jnp.where(progress.live_B, last_positions_B + progress.count, -1)[:, None]
        tokens_B1 = progress.last_token_B[:, None]
        segments_B1, place = jnp.zeros_like(tokens_B1), last + progress.count
        cache, hidden_BTD = extend(config, weights, cache, tokens_B1, positions_B1, segments_B1, place, shared)
        return cache, emit(unembed(config, weights, hidden_BTD[:, 0]), progress, settings)

    cache, progress = jax.lax.while_loop(lambda state: jnp.any(state[1].live_B), step, (cache, progress))
    return progress.tokens_BN, progress.logprobs_BN, progress.lengths_B


def emit(logits_BV, progress: Progress, settings: RowSettings) -> Progress:
    """Sample the next token of every live row and note it."""
    token_B, logprob_B = sample(logits_BV, progress.seen_BV, settings, progress.count)
    live_B, place = progress.live_B, progress.count
    ended_B = (place + 1 >= settings.max_new_tokens) | jnp.any(token_B[:, None] == settings.stop, axis=1)
    return Progress(
        count=place + 1,
        live_B=live_B & ~ended_B,
        last_token_B=token_B,
        tokens_BN=progress.tokens_BN.at[:, place].set(jnp.where(live_B, token_B, 0)),
        logprobs_BN=progress.logprobs_BN.at[:, place].set(jnp.where(live_B, logprob_B, 0)),
        lengths_B=progress.lengths_B + live_B,
        seen_BV=progress.seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True),
    )


@partial(jax.jit, static_argnames=("config", "dtype"))
def score(config: ModelConfig, weights, prefix: Prefix, tokens_BT, mask_BT, options, dtype):
    """Log-probs of the tokens of several options a row, each as the continuation of the row's prompt.

    `options` is a dict of `[B, O]` arrays over all option tokens of a row: `tokens`, `segment` (which option, from
    1; 0 is a pad), `offset` (place in its option, from 0). Options do not see each other. Returns `[B, O]`.
    """
    prompt_length = tokens_BT.shape[1]
    rows, option_length = options["tokens"].shape
    cache, prompt_positions_BT, shared = _start(config, prefix, mask_BT, option_length, dtype)
    end_B = prompt_positions_BT[:, -1:] + 1
    option_positions_BO = jnp.where(options["segment"] > 0, end_B + options["offset"], -1)
    _, hidden_BTD = extend(
        config,
        weights,
        cache,
        jnp.concatenate([tokens_BT, options["tokens"]], axis=1),
        jnp.concatenate([prompt_positions_BT, option_positions_BO], axis=1),
        jnp.concatenate([jnp.zeros_like(tokens_BT), options["segment"]], axis=1),
        0,
        shared,
    )
    before_BO = prompt_length - 1 + jnp.where(options["offset"] > 0, jnp.arange(option_length), 0)

    def token_logprob(before_and_token):
        before_B, token_B = before_and_token
        logits_BV = unembed(config, weights, hidden_BTD[jnp.arange(rows), before_B])
        return pick(jax.nn.log_softmax(logits_BV), token_B)

    return jax.lax.map(token_logprob, (before_BO.T, options["tokens"].T)).T


def sample(logits_BV, seen_BV, settings: RowSettings, index):
    """One token a row and its log-prob. The key of a token is fold_in(row key, index in the completion)."""
    greedy_B = settings.temperature == 0
    scaled_BV = logits_BV / jnp.where(greedy_B, 1.0, settings.temperature)[:, None]
    needs_filter = jnp.any(
        (settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0) | (settings.repetition_penalty != 1)
    )
    choice_BV = jax.lax.cond(
        needs_filter, lambda: filtered_logits(logits_BV, seen_BV, settings), lambda: scaled_BV
    )

    def draw(key, row_V):
        return jax.random.categorical(jax.random.fold_in(jax.random.wrap_key_data(key), index), row_V)

    drawn_B = jax.lax.cond(
        jnp.all(greedy_B), lambda: jnp.zeros(greedy_B.shape, jnp.int32), lambda: jax.vmap(draw)(settings.key, choice_BV)
    )
    token_B = jnp.where(greedy_B, jnp.argmax(choice_BV, axis=-1), drawn_B).astype(jnp.int32)
    return token_B, pick(jax.nn.log_softmax(scaled_BV), token_B)


def filtered_logits(logits_BV, seen_BV, settings: RowSettings):
    """Logits after repetition penalty, temperature, top-k, top-p and min-p, in that order; dropped ones at -1e30."""
    penalty_B1 = settings.repetition_penalty[:, None]
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    logits_BV = logits_BV / jnp.where(settings.temperature == 0, 1.0, settings.temperature)[:, None]
    unfiltered_B = settings.top_k <= 0
    count_B = jnp.where(unfiltered_B, logits_BV.shape[-1], settings.top_k).astype(jnp.float32)
    floor_B = highest_floor(logits_BV, jnp.ones_like(logits_BV), count_B)
    logits_BV = jnp.where((logits_BV >= floor_B[:, None]) | unfiltered_B[:, None], logits_BV, NEGATIVE)
    unfiltered_B = settings.top_p >= 1
    probability_BV = jax.nn.softmax(logits_BV)
    floor_B = highest_floor(logits_BV, probability_BV, settings.top_p)
    logits_BV = jnp.where((logits_BV >= floor_B[:, None]) | unfiltered_B[:, None], logits_BV, NEGATIVE)
    probability_BV = jax.nn.softmax(logits_BV)
    enough_BV = probability_BV >= settings.min_p[:, None] * jnp.max(probability_BV, axis=-1, keepdims=True)
    return jnp.where(enough_BV, logits_BV, NEGATIVE)


def highest_floor(x_BV, weights_BV, target_B):
    """The highest value such that the weights of all entries at or above it add up to the target, `[B]`.

    With weights of one it is the k-th largest entry, with probabilities the floor of top-p. Found bit by bit, 32
    sums over the row, which is many times faster than sorting a vocabulary on a CPU. Entries equal to the floor
    stand or fall together.
    """
    bits_BV = jax.lax.bitcast_convert_type(x_BV.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    ordered_BV = jnp.where(bits_BV & sign, ~bits_BV, bits_BV | sign)  # the order of floats as unsigned ints

    def try_bit(i, floor_B):
        higher_B = floor_B | (sign >> i.astype(jnp.uint32))
        weight_B = jnp.sum(jnp.where(ordered_BV >= higher_B[:, None], weights_BV, 0), axis=-1)
        return jnp.where(weight_B >= target_B, higher_B, floor_B)

    floor_B = jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(x_BV.shape[0], jnp.uint32))
    floor_B = jnp.where(floor_B & sign, floor_B ^ sign, ~floor_B)
    found_B = jax.lax.bitcast_convert_type(floor_B, jnp.float32)
    return jnp.where(jnp.isnan(found_B), -jnp.inf, found_B)  # no such value: rounding kept the sum below the target


def pick(x_BV, token_B):
    """The entry of each row at its token, `[B]`."""
    return jnp.take_along_axis(x_BV, token_B[:, None], axis=-1)[:, 0]


def _start(config, prefix: Prefix, mask_BT, room, dtype):
    """An empty cache for prompt and completion, the positions of the prompt, and the shared cache, if any."""
    start = prefix.tokens_S.shape[0]
    cache = empty_cache(config, mask_BT.shape[0], mask_BT.shape[1] + room, dtype)
    positions_BT = jnp.where(mask_BT, start + jnp.cumsum(mask_BT.astype(jnp.int32), axis=1) - 1, -1)
    return cache, positions_BT, prefix.cache if start else None


def _seen_tokens(config, prefix_S, tokens_BT, mask_BT):
    """Which tokens of the vocabulary the prompt of a row holds, prefix included, `[B, V]` bool."""
    rows = tokens_BT.shape[0]
    seen_BV = jnp.zeros((rows, config.vocab_size), bool).at[:, prefix_S].set(True)
    return seen_BV.at[jnp.arange(rows)[:, None], tokens_BT].max(mask_BT)
