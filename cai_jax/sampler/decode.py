"""The jitted programs of the sampler: prefill, decode, share. Nothing else in a run generates or scores text.

With a mesh each of them runs on every data shard with that shard's slots and strips alone; heads and weights are
split over the tensor axis by the compiler.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from cai_jax.mesh import ROWS
from cai_jax.models.families import ModelConfig
from cai_jax.models.transformer import unembed
from cai_jax.sampler.cache import Cache, Strips, cache_specs, first_entries
from cai_jax.sampler.layers import extend
from cai_jax.sampler.sampling import RowSettings, sample

ASKED_AT_ONCE = 32  # positions whose logits exist together in prefill


@flax.struct.dataclass
class Asked:
    """Log-probs wanted of a prefill: at each of the first `count` places of the pass, those of X next tokens."""

    places_M: jax.Array  # strip * T + token
    tokens_MX: jax.Array
    count_1: jax.Array


@flax.struct.dataclass
class Slots:
    """All slots before some decoding steps."""

    last_tokens_B: jax.Array  # drawn or given, not yet in the cache
    filled_B: jax.Array  # entries of the own cache
    prefixes_B: jax.Array  # number of the shared prefix that the slot stands on
    shared_B: jax.Array  # how many entries of that
    drawn_B: jax.Array  # tokens of the completion so far
    live_B: jax.Array
    settings: RowSettings


@partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames="cache")
def prefill(config: ModelConfig, mesh, weights, cache: Cache, strips: Strips, asked: Asked):
    """Run strips into their slots; returns the cache and the log-probs asked for, `[M, X]`, at temperature 1."""

    def local(weights, cache, strips, asked):
        cache, hidden_QTD = extend(config, weights, cache, strips)
        hidden_MD = hidden_QTD.reshape(-1, hidden_QTD.shape[-1])

        def some(index, logprobs_MX):
            at = index * ASKED_AT_ONCE
            places = jax.lax.dynamic_slice_in_dim(asked.places_M, at, ASKED_AT_ONCE)
            tokens = jax.lax.dynamic_slice_in_dim(asked.tokens_MX, at, ASKED_AT_ONCE)
            all_logprobs = jax.nn.log_softmax(unembed(config, weights, hidden_MD[places]))
            found = jnp.take_along_axis(all_logprobs, tokens, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(logprobs_MX, found, at, 0)

        full = (asked.count_1[0] + ASKED_AT_ONCE - 1) // ASKED_AT_ONCE
        return cache, jax.lax.fori_loop(0, full, some, jnp.zeros(asked.tokens_MX.shape, jnp.float32))

    kept, rows = cache_specs(cache), ROWS
    return _on_shards(mesh, local, (P(), kept, rows, rows), (kept, rows))(weights, cache, strips, asked)


@partial(jax.jit, static_argnames=("config", "mesh", "steps"), donate_argnames="cache")
def decode(config: ModelConfig, mesh, weights, cache: Cache, slots: Slots, history_BS, patience, steps: int):
    """Draw up to `steps` tokens for every live slot, stopping early once `patience` of them have ended.

    `history_BS` are the tokens that each slot stands on, padded with -1 (for the repetition penalty). Returns the
    cache, tokens `[B, steps]` (the stop token included), their log-probs under softmax(logits / temperature) before
    any filter (temperature 1 for a greedy row), and how many there are.
    """

    def local(weights, cache, slots, history_BS, patience):
        rows = slots.live_B.shape[0]
        begin = _Loop(
            cache, jnp.int32(0), slots.live_B, slots.last_tokens_B, jnp.zeros((rows, steps), jnp.int32),
            jnp.zeros((rows, steps), jnp.float32), jnp.zeros(rows, jnp.int32),
            _seen_tokens(config, history_BS, slots.settings),
        )  # fmt: skip
        enough = jnp.minimum(patience, jnp.sum(slots.live_B))

        def goes_on(loop):
            return (loop.step < steps) & (jnp.sum(slots.live_B) - jnp.sum(loop.live_B) < enough)

        loop = jax.lax.while_loop(goes_on, partial(_step, config, weights, slots), begin)
        return loop.cache, loop.tokens_BC, loop.logprobs_BC, loop.counts_B

    kept, rows = cache_specs(cache), ROWS
    return _on_shards(mesh, local, (P(), kept, rows, rows, P()), (kept, rows, rows, rows))(
        weights, cache, slots, history_BS, patience
    )


@partial(jax.jit, static_argnames=("mesh", "length"))
def share(mesh, cache: Cache, length: int):
    """The first `length` entries of slot 0 (of each data shard), as a prefix that all slots may stand on."""
    kept = cache_specs(cache)
    of_one = tuple(prefixes[0] for prefixes in kept.shared)
    return _on_shards(mesh, lambda cache: first_entries(cache, 0, length), (kept,), of_one)(cache)


@flax.struct.dataclass
class _Loop:
    """What the decoding loop carries."""

    cache: Cache
    step: jax.Array
    live_B: jax.Array
    last_tokens_B: jax.Array
    tokens_BC: jax.Array
    logprobs_BC: jax.Array
    counts_B: jax.Array
    seen_BV: jax.Array


def _step(config, weights, slots: Slots, loop: _Loop) -> _Loop:
    """Run the last token of every live slot and draw the next."""
    live_B, place = loop.live_B, loop.step
    filled_B = slots.filled_B + place
    strips = Strips(loop.last_tokens_B[:, None], live_B[:, None], None, filled_B, slots.prefixes_B, slots.shared_B)
    cache, hidden_B1D = extend(config, weights, loop.cache, strips)
    logits_BV = unembed(config, weights, hidden_B1D[:, 0])
    drawn_B = slots.drawn_B + place
    token_B, logprob_B = sample(logits_BV, loop.seen_BV, slots.settings, drawn_B)
    full_B = drawn_B + 1 >= slots.settings.max_new_tokens
    ended_B = full_B | jnp.any(token_B[:, None] == slots.settings.stop, axis=1)
    return _Loop(
        cache, place + 1, live_B & ~ended_B, token_B,
        loop.tokens_BC.at[:, place].set(jnp.where(live_B, token_B, 0)),
        loop.logprobs_BC.at[:, place].set(jnp.where(live_B, logprob_B, 0)),
        loop.counts_B + live_B,
        _also_seen(loop.seen_BV, token_B, slots.settings),
    )  # fmt: skip


def _seen_tokens(config, history_BS, settings: RowSettings):
    """Which tokens each slot stands on, `[B, V]` bool; nothing while no row asks for a repetition penalty."""

    def mark(seen_BV):
        rows_B1 = jnp.arange(history_BS.shape[0])[:, None]
        return seen_BV.at[rows_B1, history_BS].max(history_BS >= 0, mode="drop", wrap_negative_indices=False)

    nothing_BV = jnp.zeros((history_BS.shape[0], config.vocab_size), bool)
    return jax.lax.cond(jnp.any(settings.repetition_penalty != 1), mark, lambda seen_BV: seen_BV, nothing_BV)


def _also_seen(seen_BV, token_B, settings: RowSettings):
    def mark(seen_BV):
        return seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)

    return jax.lax.cond(jnp.any(settings.repetition_penalty != 1), mark, lambda seen_BV: seen_BV, seen_BV)


def _on_shards(mesh, function, in_specs, out_specs):
    """The function on each data shard by itself; without a mesh, the function."""
    if mesh is None:
        return function
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(ROWS[0]), check_vma=False
    )
