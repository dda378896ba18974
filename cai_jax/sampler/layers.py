"""One pass of tokens through the layers, on top of what the cache holds.

Tokens come in strips of T neighbours of one slot: prefill runs many strips of STRIP tokens, decoding one strip of one
token a slot.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from cai_jax.models.attention import NEGATIVE, softcap
from cai_jax.models.families import ModelConfig
from cai_jax.models.transformer import block, rms_norm, rope_tables, scale_embedded
from cai_jax.sampler.cache import BLOCK, CPU_ORDERS, Cache, Entries, Strips, append, as_entries, block_of


def extend(config: ModelConfig, weights, cache: Cache, strips: Strips):
    """Run strips through the decoder and append them to the cache.

    Returns the cache and the final-norm hidden states `[Q, T, D]`. A token sees a shared prefix as far as its slot
    stands on it, and the entries of its slot up to itself, whether they are of this pass or of an earlier one.
    Prefill writes a layer's entries before it reads them; decoding writes those of all layers at its end, in one loop.
    """
    count, length = strips.tokens_QT.shape
    places_QT = jnp.where(strips.real_QT, strips.starts_Q[:, None] + jnp.arange(length), -1)
    positions_QT = jnp.where(strips.real_QT, strips.shared_Q[:, None] + places_QT, -1)
    x_1MD = _embed(config, weights["embed"], strips.tokens_QT.reshape(1, -1))
    rope_R1MN = rope_tables(config, positions_QT.reshape(1, -1))
    own, new, decoding = list(cache.own), [], length == 1
    sights = {window: _sight(places_QT, strips, window, cache, decoding) for window in set(config.windows)}
    for i, layer in enumerate(weights["layers"]):

        def attend(q_1MHN, k_1MKN, v_1MKN, i=i):
            def by_head(x_1MXN):
                x_QTKGN = x_1MXN.reshape(count, length, config.n_kv_heads, -1, config.head_dim)
                return x_QTKGN.transpose(2, 0, 1, 3, 4)

            new.append(as_entries(own[i], by_head(k_1MKN)[:, :, :, 0], by_head(v_1MKN)[:, :, :, 0]))
            if not decoding:
                (own[i],) = append(strips, (own[i],), (new[i],))
            # On a CPU many small products in half precision are slower than in float32.
            operands = jnp.float32 if own[i].orders == CPU_ORDERS else weights["embed"].dtype
            q_KQTGN = by_head(q_1MHN * config.query_scale).astype(operands)
            sight = sights[config.windows[i]]
            out_KQTGN = _attend(
                config, q_KQTGN, cache.shared[i], own[i], new[i] if decoding else None, strips.slots_Q, sight
            )
            return out_KQTGN.transpose(1, 2, 0, 3, 4).reshape(1, count * length, -1)

        x_1MD = block(config, layer, x_1MD, rope_R1MN[config.rope_of_layer[i]], attend)
    hidden_1MD = rms_norm(config, x_1MD, weights["final_norm"])
    own = append(strips, cache.own, tuple(new)) if decoding else tuple(own)
    return cache.replace(own=own), hidden_1MD.reshape(count, length, -1)


def _embed(config: ModelConfig, table_VD, tokens_1M):
    """`transformer.embed` by the bits: a CPU would widen the whole table before it takes rows of half precision."""
    if table_VD.dtype != jnp.bfloat16:
        return scale_embedded(config, table_VD[tokens_1M])
    bits_1MD = jax.lax.bitcast_convert_type(table_VD, jnp.uint16)[tokens_1M]
    return scale_embedded(config, jax.lax.bitcast_convert_type(bits_1MD, table_VD.dtype))


@dataclass(frozen=True)
class _Sight:
    """What the tokens of a pass see, as numbers to add to scores: 0, or NEGATIVE. Made once a pass and window."""

    prefixes_QTS: tuple[jax.Array, ...]
    stood_on: tuple[jax.Array, ...]  # 1 for a prefix that a token of the pass sees, else 0
    blocks_ZQTS: jax.Array
    full: jax.Array  # blocks that hold anything


def _sight(places_QT, strips: Strips, window: int, cache: Cache, decoding: bool) -> _Sight:
    """Each token stands at a place of its slot (-1: none, sees nothing); decoding, it is not in the cache itself."""
    behind = int(decoding)

    def bias(distance, least, also=True):
        seen = (places_QT >= 0)[..., None] & (distance >= least) & also
        return jnp.where(seen & (distance < window) if window else seen, 0.0, NEGATIVE)

    def from_prefix(number, room):
        shared_Q11 = jnp.where(strips.prefixes_Q == number, strips.shared_Q, 0)[:, None, None]
        prefix_P = jnp.arange(room)
        return bias(shared_Q11 + places_QT[..., None] - prefix_P, 0, prefix_P < shared_Q11)

    from_prefixes = tuple(from_prefix(number, room) for number, room in enumerate(cache.prefix_rooms))
    live_Q = jnp.any(places_QT >= 0, axis=1) & (strips.shared_Q > 0)
    stood_on = tuple(jnp.any(live_Q & (strips.prefixes_Q == n)).astype(jnp.int32) for n in range(len(from_prefixes)))
    blocks = cache.own[0].keys.shape[0] - 1
    from_own = bias(places_QT[..., None] - jnp.arange(blocks * BLOCK), behind)
    from_own = jnp.moveaxis(from_own.reshape(*places_QT.shape, blocks, BLOCK), 2, 0)
    from_prefixes, from_own = jax.lax.optimization_barrier((from_prefixes, from_own))
    return _Sight(from_prefixes, stood_on, from_own, (jnp.max(places_QT) - behind) // BLOCK + 1)


def _attend(config, q_KQTGN, shared, own: Entries, itself: Entries | None, slots_Q, sight: _Sight):
    """Attention over prefixes and own blocks, one after the other, with one running softmax. Queries are scaled.

    Of several prefixes those are read that a token of the pass stands on. `itself` is the entry of each strip's only
    token where the cache does not hold it yet. Every sum runs over the entries of a slot in their order, so a row's
    result does not depend on which tokens came in one pass, nor on other rows.
    """
    heads, count, length, group, size = q_KQTGN.shape
    q_KQRN = q_KQTGN.reshape(heads, count, length * group, size)
    # A CPU would compute what it fuses into a sum once more, and one number at a time.
    stored = jax.lax.optimization_barrier if own.orders == CPU_ORDERS else lambda x: x

    def add(entries: Entries, bias_QTS, carry):
        """Some more entries for the running softmax: (highest score, sum of weights, weighted sum of values)."""
        top, total, mixed = carry
        of_keys, of_values = (order.replace("z", "") for order in entries.orders)
        scores = _product(f"kqrn,{of_keys}->kqrs", q_KQRN, entries.keys, entries.key_scales)
        scores = softcap(scores, config.attn_softcap).reshape(heads, count, length, group, -1)
        scores = stored((scores + bias_QTS[:, :, None]).reshape(heads, count, length * group, -1))
        higher = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights, fade = stored(jnp.exp(scores - higher[..., None])), jnp.exp(top - higher)
        scaled = weights if entries.value_scales is None else weights * _beside(entries.value_scales, weights)
        more = _product(f"kqrs,{of_values}->kqrn", scaled.astype(q_KQTGN.dtype), entries.values, None)
        return higher, total * fade + jnp.sum(weights, axis=-1), mixed * fade[..., None] + more

    def add_block(index, carry):
        bias_QTS = jax.lax.dynamic_index_in_dim(sight.blocks_ZQTS, index, 0, keepdims=False)
        return add(block_of(own, index, slots_Q), bias_QTS, carry)

    shape = heads, count, length * group
    if itself is None:
        carry = jnp.full(shape, NEGATIVE), jnp.zeros(shape), jnp.zeros((*shape, size))
    else:
        key_KQ1N, value_KQ1N = _plain(itself.keys, itself.key_scales), _plain(itself.values, itself.value_scales)
        top = softcap(jnp.sum(q_KQRN.astype(jnp.float32) * key_KQ1N, axis=-1), config.attn_softcap)
        carry = top, jnp.ones(shape), jnp.broadcast_to(value_KQ1N, (*shape, size))
    for entries, bias_QTS, times in zip(shared, sight.prefixes_QTS, sight.stood_on, strict=True):
        if entries.keys.shape[-1]:
            read = partial(lambda entries, bias_QTS, _, carry: add(entries, bias_QTS, carry), entries, bias_QTS)
            carry = jax.lax.fori_loop(0, times, read, carry) if len(shared) > 1 else read(0, carry)
    _, total, mixed = jax.lax.fori_loop(0, sight.full, add_block, carry)
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
