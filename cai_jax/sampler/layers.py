"""One pass of tokens through the layers, on top of what the cache holds.

Tokens come in strips of T neighbours of one slot: prefill runs many strips of STRIP tokens, decoding one strip of one
token a slot.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from cai_jax.models.families import ModelConfig
from cai_jax.models.transformer import NEGATIVE, block, embed, rms_norm, rope_tables, softcap
from cai_jax.sampler.cache import BLOCK, Cache, Entries, Strips, append, as_entries, block_of


def extend(config: ModelConfig, weights, cache: Cache, strips: Strips):
    """Run strips through the decoder and append them to the cache.

    Returns the cache and the final-norm hidden states `[Q, T, D]`. A token sees the shared prefix as far as its slot
    stands on it, and the entries of its slot up to itself, whether they are of this pass or of an earlier one.
    Prefill writes a layer's entries before it reads them; decoding writes those of all layers at its end, in one loop.
    """
    count, length = strips.tokens_QT.shape
    places_QT = jnp.where(strips.real_QT, strips.starts_Q[:, None] + jnp.arange(length), -1)
    positions_QT = jnp.where(strips.real_QT, strips.shared_Q[:, None] + places_QT, -1)
    x_1MD = embed(config, weights, strips.tokens_QT.reshape(1, -1))
    rope_R1MN = rope_tables(config, positions_QT.reshape(1, -1))
    own, new, decoding = list(cache.own), [], length == 1
    for i, layer in enumerate(weights["layers"]):

        def attend(q_1MHN, k_1MKN, v_1MKN, i=i):
            def by_head(x_1MXN):
                x_QTKGN = x_1MXN.reshape(count, length, config.n_kv_heads, -1, config.head_dim)
                return x_QTKGN.transpose(2, 0, 1, 3, 4)

            new.append(as_entries(own[i], by_head(k_1MKN)[:, :, :, 0], by_head(v_1MKN)[:, :, :, 0]))
            if not decoding:
                (own[i],) = append(strips, (own[i],), (new[i],))
            see = _Sight(places_QT, strips.shared_Q, strips.slots_Q, config.windows[i], int(decoding))
            q_KQTGN = by_head(q_1MHN * config.query_scale).astype(weights["embed"].dtype)
            out_KQTGN = _attend(config, q_KQTGN, cache.shared[i], own[i], new[i] if decoding else None, see)
            return out_KQTGN.transpose(1, 2, 0, 3, 4).reshape(1, count * length, -1)

        x_1MD = block(config, layer, x_1MD, rope_R1MN[config.rope_of_layer[i]], attend)
    hidden_1MD = rms_norm(config, x_1MD, weights["final_norm"])
    own = append(strips, cache.own, tuple(new)) if decoding else tuple(own)
    return cache.replace(own=own), hidden_1MD.reshape(count, length, -1)


@dataclass(frozen=True)
class _Sight:
    """What the tokens of a pass see, each standing at a place of its slot (-1: no token, sees nothing)."""

    places_QT: jax.Array
    shared_Q: jax.Array
    slots_Q: jax.Array | None
    window: int
    behind: int  # entries of a slot that a token sees end so many before itself

    def prefix(self, length: int):
        """`[Q, T, P]`: entries of the shared prefix."""
        entries_P = jnp.arange(length)
        seen_Q1P = entries_P < self.shared_Q[:, None, None]
        return seen_Q1P & self._near(self.shared_Q[:, None, None] + self.places_QT[..., None] - entries_P)

    def block(self, index):
        """`[Q, T, BLOCK]`: entries of a block of the slot."""
        return self._near(self.places_QT[..., None] - (index * BLOCK + jnp.arange(BLOCK)), self.behind)

    def _near(self, distance, least=0):
        seen = (self.places_QT >= 0)[..., None] & (distance >= least)
        return seen & (distance < self.window) if self.window else seen


def _attend(config: ModelConfig, q_KQTGN, shared: Entries, own: Entries, itself: Entries | None, see: _Sight):
    """Attention over prefix and own blocks, one after the other, with one running softmax. Queries are scaled.

    `itself` is the entry of each strip's only token where the cache does not hold it yet.

    Every sum runs over the entries of a slot in their order, so a row's result does not depend on which tokens came
    in one pass, nor on other rows.
    """
    heads, count, length, group, size = q_KQTGN.shape
    q_KQRN = q_KQTGN.reshape(heads, count, length * group, size)

    def add(entries: Entries, seen_QTS, carry):
        """Some more entries for the running softmax: (highest score, sum of weights, weighted sum of values)."""
        top, total, mixed = carry
        of_keys, of_values = (order.replace("z", "") for order in entries.orders)
        seen_QRS = jnp.repeat(seen_QTS, group, axis=1)
        scores = _product(f"kqrn,{of_keys}->kqrs", q_KQRN, entries.keys, entries.key_scales)
        scores = jnp.where(seen_QRS, softcap(scores, config.attn_softcap), NEGATIVE)
        higher = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights, fade = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
        scaled = weights if entries.value_scales is None else weights * _beside(entries.value_scales, weights)
        more = _product(f"kqrs,{of_values}->kqrn", scaled.astype(q_KQTGN.dtype), entries.values, None)
        return higher, total * fade + jnp.sum(weights, axis=-1), mixed * fade[..., None] + more

    def add_block(index, carry):
        return add(block_of(own, index, see.slots_Q), see.block(index), carry)

    shape = heads, count, length * group
    if itself is None:
        carry = jnp.full(shape, NEGATIVE), jnp.zeros(shape), jnp.zeros((*shape, size))
    else:
        key_KQ1N, value_KQ1N = _plain(itself.keys, itself.key_scales), _plain(itself.values, itself.value_scales)
        top = softcap(jnp.sum(q_KQRN.astype(jnp.float32) * key_KQ1N, axis=-1), config.attn_softcap)
        carry = top, jnp.ones(shape), jnp.broadcast_to(value_KQ1N, (*shape, size))
    if prefix := shared.keys.shape[-1]:
        carry = add(shared, see.prefix(prefix), carry)
    full = (jnp.max(see.places_QT) - see.behind) // BLOCK + 1
    _, total, mixed = jax.lax.fori_loop(0, full, add_block, carry)
    return (mixed / total[..., None]).reshape(q_KQTGN.shape)


def _plain(entries, scales):
    """Entries in float32."""
    entries = entries.astype(jnp.float32)
    return entries if scales is None else entries * scales[..., None]


def _product(form, x, entries, scales):
    """Float32 product of queries or weights with keys or values, these in the dtype of `x`."""
    product = jnp.einsum(form, x, entries.astype(x.dtype), preferred_element_type=jnp.float32)
    return product if scales is None else product * _beside(scales, product)


def _beside(scales, x_KQRS):
    """Scales `[K, Q, S]`, or `[K, S]` of what all share, ready to multiply `[K, Q, R, S]`."""
    return scales[:, :, None] if scales.ndim == 3 else scales[:, None, None]
