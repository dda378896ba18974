"""Weights as decoding wants them, the key/value cache of all slots, and one pass of tokens through both.

The cache stands in blocks of BLOCK entries, a pair of arrays a layer: keys `[Z, K, B, N, BLOCK]` and values
`[Z, K, B, BLOCK, N]`. Entry s of a slot lies in block s // BLOCK, so attention reads as many blocks as the fullest slot
has and no more, and a row's sums are the same however full the others are. The last block is never read: what has no
place is written there. Beside the slots stands one prefix that any of them may share, `[K, N, P]` and `[K, P, N]`.

Tokens come in strips of T neighbours of one slot: prefill runs many strips of STRIP tokens, decoding one strip of one
token a slot.
"""

from dataclasses import dataclass
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.mesh import ROWS, decoding_shardings
from cai_jax.models import kernels
from cai_jax.models.families import ModelConfig
from cai_jax.models.transformer import NEGATIVE, block, embed, rms_norm, rope_tables, softcap

BLOCK = 64
STRIP = 16  # tokens of a strip in prefill; divides BLOCK


@flax.struct.dataclass
class Entries:
    """Keys and values of one layer. As int8 they have a scale an entry and head; else the scales are None."""

    keys: jax.Array  # own [Z, K, B, N, BLOCK], shared [K, N, P]
    values: jax.Array  # own [Z, K, B, BLOCK, N], shared [K, P, N]
    key_scales: jax.Array | None  # own [Z, K, B, BLOCK], shared [K, P]
    value_scales: jax.Array | None


@flax.struct.dataclass
class Cache:
    """Of every layer the entries of all slots, and those of the prefix that slots may share."""

    own: tuple[Entries, ...]
    shared: tuple[Entries, ...]

    @property
    def prefix_room(self) -> int:
        """The longest prefix that there is room for."""
        return self.shared[0].keys.shape[-1]


@flax.struct.dataclass
class Strips:
    """Q strips of T tokens. A strip is a window of its slot's cache; `real` marks the tokens that exist."""

    tokens_QT: jax.Array
    real_QT: jax.Array
    slots_Q: jax.Array | None  # None: strip q is of slot q
    starts_Q: jax.Array  # place of the window in the slot's own cache, a multiple of T
    shared_Q: jax.Array  # entries of the shared prefix that the slot stands on


def blocks_of(length: int) -> int:
    """Blocks of a cache whose rows have at most `length` entries, the one that is never read included."""
    return -(-length // BLOCK) + 1


def empty_cache(config: ModelConfig, rows: int, length: int, prefix: int, dtype) -> Cache:
    """A cache for `rows` slots of at most `length` entries, and a prefix of at most `prefix`."""
    heads, size = config.n_kv_heads, config.head_dim

    def entries(*where, after):
        scales = jnp.zeros((*where, after), jnp.float32) if jnp.dtype(dtype) == jnp.int8 else None
        keys, values = jnp.zeros((*where, size, after), dtype), jnp.zeros((*where, after, size), dtype)
        return Entries(keys, values, scales, scales)

    layers = range(config.n_layers)
    return Cache(
        own=tuple(entries(blocks_of(length), heads, rows, after=BLOCK) for _ in layers),
        shared=tuple(entries(heads, after=prefix) for _ in layers),
    )


def new_cache(config: ModelConfig, rows: int, length: int, prefix: int, dtype, mesh=None) -> Cache:
    """An empty cache where it belongs: slots over the data axes, heads over tensor as far as they divide."""
    make = partial(empty_cache, config, rows, length, prefix, dtype)
    if mesh is None:
        return jax.jit(make)()
    heads = "tensor" if config.n_kv_heads % mesh.shape["tensor"] == 0 else None
    shapes = jax.eval_shape(make)
    own, shared = NamedSharding(mesh, P(None, heads, ROWS[0])), NamedSharding(mesh, P(heads))
    places = Cache(jax.tree.map(lambda _: own, shapes.own), jax.tree.map(lambda _: shared, shapes.shared))
    return jax.jit(make, out_shardings=places)()


def cache_bytes(config: ModelConfig, rows: int, length: int, prefix: int, dtype) -> int:
    """Bytes of the keys and values of `rows` slots of `length` entries and of a prefix."""
    scale = 4 if jnp.dtype(dtype) == jnp.int8 else 0
    entry = 2 * config.n_layers * config.n_kv_heads * (config.head_dim * jnp.dtype(dtype).itemsize + scale)
    return entry * (rows * blocks_of(length) * BLOCK + prefix)


PROJECTIONS = ("qkv", "q", "k", "v", "o", "gate_up", "gate", "up", "down")


def prepare(config: ModelConfig, params, dtype, mesh=None, int8=False):
    """Weights for the sampler, made by one jitted cast and reshard from the stacked ones.

    A dict a layer, projections fused and, on a CPU, transposed; whole on every device but for the tensor axis, along
    which they stay split (and then unfused, for a fused projection has no common split). With `int8` the projections
    of the layers are stored as int8 with a scale an output.
    """
    form = partial(_decoding_form, config, dtype, mesh is None or mesh.shape["tensor"] == 1, int8)
    shardings = None if mesh is None else decoding_shardings(mesh, jax.eval_shape(form, params))
    return jax.jit(form, out_shardings=shardings)(params)


def _decoding_form(config, dtype, fuse, int8, params):
    params = kernels.cast(params, dtype)
    stacked = dict(params["layers"])
    if fuse:
        for fused, parts in (("qkv", ("q", "k", "v")), ("gate_up", ("gate", "up"))):
            for suffix in ("", "_bias"):
                if parts[0] + suffix in stacked:
                    pieces = [stacked.pop(part + suffix) for part in parts]
                    stacked[fused + suffix] = jnp.concatenate(pieces, axis=-1)
    projections = [name for name in PROJECTIONS if name in stacked]
    if jax.default_backend() == "cpu":
        for name in projections:
            stacked[name] = kernels.Transposed(jnp.swapaxes(stacked[name], 1, 2))
        if not config.tie_embeddings:
            params = params | {"lm_head": kernels.Transposed(params["lm_head"].T)}
    if int8:
        stacked |= {name: kernels.quantize(stacked[name]) for name in projections}
    layers = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(config.n_layers))
    return {**params, "layers": layers}


def extend(config: ModelConfig, weights, cache: Cache, strips: Strips):
    """Run strips through the decoder and append them to the cache.

    Returns the cache and the final-norm hidden states `[Q, T, D]`. A token sees the shared prefix as far as its slot
    stands on it, and the entries of its slot up to itself, whether they are of this pass or of an earlier one.
    """
    count, length = strips.tokens_QT.shape
    places_QT = jnp.where(strips.real_QT, strips.starts_Q[:, None] + jnp.arange(length), -1)
    positions_QT = jnp.where(strips.real_QT, strips.shared_Q[:, None] + places_QT, -1)
    x_1MD = embed(config, weights, strips.tokens_QT.reshape(1, -1))
    rope_R1MN = rope_tables(config, positions_QT.reshape(1, -1))
    own = list(cache.own)
    for i, layer in enumerate(weights["layers"]):

        def attend(q_1MHN, k_1MKN, v_1MKN, i=i):
            def by_head(x_1MXN):
                x_QTKGN = x_1MXN.reshape(count, length, config.n_kv_heads, -1, config.head_dim)
                return x_QTKGN.transpose(2, 0, 1, 3, 4)

            own[i] = _append(strips, own[i], by_head(k_1MKN)[:, :, :, 0], by_head(v_1MKN)[:, :, :, 0])
            see = _Sight(places_QT, strips.shared_Q, strips.slots_Q, config.windows[i])
            q_KQTGN = by_head(q_1MHN * config.query_scale).astype(weights["embed"].dtype)
            out_KQTGN = _attend(config, q_KQTGN, cache.shared[i], own[i], see)
            return out_KQTGN.transpose(1, 2, 0, 3, 4).reshape(1, count * length, -1)

        x_1MD = block(config, layer, x_1MD, rope_R1MN[config.rope_of_layer[i]], attend)
    hidden_1MD = rms_norm(config, x_1MD, weights["final_norm"])
    return cache.replace(own=tuple(own)), hidden_1MD.reshape(count, length, -1)


@dataclass(frozen=True)
class _Sight:
    """What the tokens of a pass see, each standing at a place of its slot (-1: no token, sees nothing)."""

    places_QT: jax.Array
    shared_Q: jax.Array
    slots_Q: jax.Array | None
    window: int

    def prefix(self, length: int):
        """`[Q, T, P]`: entries of the shared prefix."""
        entries_P = jnp.arange(length)
        seen_Q1P = entries_P < self.shared_Q[:, None, None]
        return seen_Q1P & self._near(self.shared_Q[:, None, None] + self.places_QT[..., None] - entries_P)

    def block(self, index):
        """`[Q, T, BLOCK]`: entries of a block of the slot."""
        return self._near(self.places_QT[..., None] - (index * BLOCK + jnp.arange(BLOCK)))

    def _near(self, distance):
        real = (self.places_QT >= 0)[..., None]
        return real & (distance >= 0) & (distance < self.window) if self.window else real & (distance >= 0)


def _attend(config: ModelConfig, q_KQTGN, shared: Entries, own: Entries, see: _Sight):
    """Attention over prefix and own blocks, one after the other, with one running softmax. Queries are scaled.

    Every sum runs over the entries of a slot in their order, so a row's result does not depend on which tokens came
    in one pass, nor on other rows.
    """
    heads, count, length, group, size = q_KQTGN.shape
    q_KQRN = q_KQTGN.reshape(heads, count, length * group, size)

    def add(keys_form, values_form, entries: Entries, seen_QTS, carry):
        """Some more entries for the running softmax: (highest score, sum of weights, weighted sum of values)."""
        top, total, mixed = carry
        seen_QRS = jnp.repeat(seen_QTS, group, axis=1)
        scores = _product(keys_form, q_KQRN, entries.keys, entries.key_scales)
        scores = jnp.where(seen_QRS, softcap(scores, config.attn_softcap), NEGATIVE)
        higher = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights, fade = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
        scaled = weights if entries.value_scales is None else weights * _beside(entries.value_scales, weights)
        more = _product(values_form, scaled.astype(q_KQTGN.dtype), entries.values, None)
        return higher, total * fade + jnp.sum(weights, axis=-1), mixed * fade[..., None] + more

    def add_block(index, carry):
        block = jax.tree.map(lambda array: _block(array, index, see.slots_Q), own)
        return add("kqrn,kqns->kqrs", "kqrs,kqsn->kqrn", block, see.block(index), carry)

    shape = heads, count, length * group
    carry = jnp.full(shape, NEGATIVE), jnp.zeros(shape), jnp.zeros((*shape, size))
    if prefix := shared.keys.shape[-1]:
        carry = add("kqrn,knp->kqrp", "kqrp,kpn->kqrn", shared, see.prefix(prefix), carry)
    full = jnp.max(see.places_QT) // BLOCK + 1
    _, total, mixed = jax.lax.fori_loop(0, full, add_block, carry)
    return (mixed / total[..., None]).reshape(q_KQTGN.shape)


def _product(form, x, entries, scales):
    """Float32 product of queries or weights with keys or values, these in the dtype of `x`."""
    product = jnp.einsum(form, x, entries.astype(x.dtype), preferred_element_type=jnp.float32)
    return product if scales is None else product * _beside(scales, product)


def _beside(scales, x_KQRS):
    """Scales `[K, Q, S]`, or `[K, S]` of what all share, ready to multiply `[K, Q, R, S]`."""
    return scales[:, :, None] if scales.ndim == 3 else scales[:, None, None]


def _block(array, index, slots_Q):
    """One block of every strip's slot, `[K, Q, ...]`."""
    of_all = jax.lax.dynamic_index_in_dim(array, index, 0, keepdims=False)
    return of_all if slots_Q is None else of_all[:, slots_Q]


def _append(strips: Strips, own: Entries, k_KQTN, v_KQTN) -> Entries:
    """Write new keys and values, strip by strip, each into its window; strips without tokens go where none is read."""
    count, length = strips.tokens_QT.shape
    slots_Q = jnp.arange(count) if strips.slots_Q is None else strips.slots_Q
    blocks_Q = jnp.where(jnp.any(strips.real_QT, axis=1), strips.starts_Q // BLOCK, own.keys.shape[0] - 1)
    offsets_Q = strips.starts_Q % BLOCK
    keys, key_scales = _stored(k_KQTN, own)
    values, value_scales = _stored(v_KQTN, own)
    new = Entries(keys.swapaxes(2, 3), values, key_scales, value_scales)
    time_axes = _time_axes(own, Entries(1, 0, 0, 0))

    def write_strip(q, own):
        def write(array, new, axis):  # new [K, Q, ...] with time on `axis` of what follows
            update = new[:, q][None, :, None]
            place = [blocks_Q[q], 0, slots_Q[q]] + [0] * (array.ndim - 3)
            place[3 + axis] = offsets_Q[q]
            if length > 1:  # a window may hold earlier entries
                real = jnp.expand_dims(strips.real_QT[q], [i for i in range(array.ndim) if i != 3 + axis])
                update = jnp.where(real, update, jax.lax.dynamic_slice(array, place, update.shape))
            return jax.lax.dynamic_update_slice(array, update, place)

        return jax.tree.map(write, own, new, time_axes)

    return jax.lax.fori_loop(0, count, write_strip, own)


def _time_axes(entries: Entries, axes: Entries) -> Entries:
    """The axes of the arrays that the entries have."""
    return axes if entries.key_scales is not None else axes.replace(key_scales=None, value_scales=None)


def _stored(x_KQTN, own: Entries):
    """New keys or values as the cache holds them, with their scales."""
    if own.key_scales is None:
        return x_KQTN.astype(own.keys.dtype), None
    scales_KQT = jnp.maximum(jnp.max(jnp.abs(x_KQTN), axis=-1), 1e-8) / 127
    return jnp.round(x_KQTN / scales_KQT[..., None]).astype(jnp.int8), scales_KQT.astype(jnp.float32)


def share(cache: Cache, slot, length: int) -> Cache:
    """Make the first `length` entries of a slot the shared prefix."""

    def of_slot(array, axis):
        """[Z, K, B, ...] -> [K, ...], with the blocks joined along the time axis of what remains."""
        own = jnp.moveaxis(jax.lax.dynamic_index_in_dim(array, slot, 2, keepdims=False), 0, axis)
        joined = own.reshape(*own.shape[:axis], -1, *own.shape[axis + 2 :])
        return jax.lax.slice_in_dim(joined, 0, length, axis=axis)

    time_axes = _time_axes(cache.own[0], Entries(2, 1, 1, 1))
    return cache.replace(shared=tuple(jax.tree.map(of_slot, entries, time_axes) for entries in cache.own))
