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
class Cache:
    """Keys and values of all layers: of every slot, and of the prefix that slots may share."""

    keys: tuple  # L arrays [Z, K, B, N, BLOCK]
    values: tuple  # L arrays [Z, K, B, BLOCK, N]
    prefix_keys: tuple  # L arrays [K, N, P]
    prefix_values: tuple  # L arrays [K, P, N]

    @property
    def prefix_room(self) -> int:
        """The longest prefix that there is room for."""
        return self.prefix_keys[0].shape[-1]


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
    size, heads, layers = config.head_dim, config.n_kv_heads, range(config.n_layers)
    blocks = blocks_of(length)
    return Cache(
        keys=tuple(jnp.zeros((blocks, heads, rows, size, BLOCK), dtype) for _ in layers),
        values=tuple(jnp.zeros((blocks, heads, rows, BLOCK, size), dtype) for _ in layers),
        prefix_keys=tuple(jnp.zeros((heads, size, prefix), dtype) for _ in layers),
        prefix_values=tuple(jnp.zeros((heads, prefix, size), dtype) for _ in layers),
    )


def new_cache(config: ModelConfig, rows: int, length: int, prefix: int, dtype, mesh=None) -> Cache:
    """An empty cache where it belongs: slots over the data axes, heads over tensor as far as they divide."""
    make = partial(empty_cache, config, rows, length, prefix, dtype)
    if mesh is None:
        return jax.jit(make)()
    heads = "tensor" if config.n_kv_heads % mesh.shape["tensor"] == 0 else None
    own, shared = NamedSharding(mesh, P(None, heads, ROWS[0])), NamedSharding(mesh, P(heads))
    layers = range(config.n_layers)
    return jax.jit(make, out_shardings=Cache(*[tuple(kind for _ in layers) for kind in (own, own, shared, shared)]))()


def cache_bytes(config: ModelConfig, rows: int, length: int, prefix: int, dtype) -> int:
    """Bytes of the keys and values of `rows` slots of `length` entries and of a prefix."""
    entry = 2 * config.n_layers * config.n_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
    return entry * (rows * blocks_of(length) * BLOCK + prefix)


def prepare(config: ModelConfig, params, dtype, mesh=None):
    """Weights for the sampler, made by one jitted cast and reshard from the stacked ones.

    A dict a layer, projections fused and, on a CPU, transposed; whole on every device but for the tensor axis, along
    which they stay split (and then unfused, for a fused projection has no common split).
    """
    form = partial(_decoding_form, config, dtype, mesh is None or mesh.shape["tensor"] == 1)
    shardings = None if mesh is None else decoding_shardings(mesh, jax.eval_shape(form, params))
    return jax.jit(form, out_shardings=shardings)(params)


def _decoding_form(config, dtype, fuse, params):
    params = kernels.cast(params, dtype)
    stacked = dict(params["layers"])
    if fuse:
        for fused, parts in (("qkv", ("q", "k", "v")), ("gate_up", ("gate", "up"))):
            for suffix in ("", "_bias"):
                if parts[0] + suffix in stacked:
                    pieces = [stacked.pop(part + suffix) for part in parts]
                    stacked[fused + suffix] = jnp.concatenate(pieces, axis=-1)
    if jax.default_backend() == "cpu":
        for name in ("qkv", "q", "k", "v", "o", "gate_up", "gate", "up", "down"):
            if name in stacked:
                stacked[name] = kernels.Transposed(jnp.swapaxes(stacked[name], 1, 2))
        if not config.tie_embeddings:
            params = params | {"lm_head": kernels.Transposed(params["lm_head"].T)}
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
    keys, values = list(cache.keys), list(cache.values)
    for i, layer in enumerate(weights["layers"]):

        def attend(q_1MHN, k_1MKN, v_1MKN, i=i):
            def by_head(x_1MXN):
                x_QTKGN = x_1MXN.reshape(count, length, config.n_kv_heads, -1, config.head_dim)
                return x_QTKGN.transpose(2, 0, 1, 3, 4).astype(keys[i].dtype)

            keys[i], values[i] = _append(strips, keys[i], values[i], by_head(k_1MKN), by_head(v_1MKN))
            shared = cache.prefix_keys[i], cache.prefix_values[i]
            see = _Sight(places_QT, strips.shared_Q, strips.slots_Q, config.windows[i])
            out_KQTGN = _attend(config, by_head(q_1MHN * config.query_scale), shared, (keys[i], values[i]), see)
            return out_KQTGN.transpose(1, 2, 0, 3, 4).reshape(1, count * length, -1)

        x_1MD = block(config, layer, x_1MD, rope_R1MN[config.rope_of_layer[i]], attend)
    hidden_1MD = rms_norm(config, x_1MD, weights["final_norm"])
    return cache.replace(keys=tuple(keys), values=tuple(values)), hidden_1MD.reshape(count, length, -1)


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


def _attend(config: ModelConfig, q_KQTGN, shared, own, see: _Sight):
    """Attention over prefix and own blocks, one after the other, with one running softmax. Queries are scaled.

    `shared` and `own` are keys and values. Every sum runs over the entries of a slot in their order, so a row's
    result does not depend on which tokens came in one pass, nor on other rows.
    """
    heads, count, length, group, size = q_KQTGN.shape
    q_KQRN = q_KQTGN.reshape(heads, count, length * group, size)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def masked(scores_KQRS, seen_QTS):
        seen_QRS = jnp.repeat(seen_QTS, group, axis=1)
        return jnp.where(seen_QRS, softcap(scores_KQRS, config.attn_softcap), NEGATIVE)

    def start():
        shape = heads, count, length * group
        return jnp.full(shape, NEGATIVE), jnp.zeros(shape), jnp.zeros((*shape, size))

    def start_with(prefix):
        keys_KNP, values_KPN = shared
        scores = masked(product("kqrn,knp->kqrp", q_KQRN, keys_KNP), see.prefix(prefix))
        top = jnp.max(scores, axis=-1)
        weights = jnp.exp(scores - top[..., None])
        mixed = product("kqrp,kpn->kqrn", weights.astype(values_KPN.dtype), values_KPN)
        return top, jnp.sum(weights, axis=-1), mixed

    def add_block(index, carry):
        top, total, mixed = carry
        keys_KQNS, values_KQSN = (_block(array, index, see.slots_Q) for array in own)
        scores = masked(product("kqrn,kqns->kqrs", q_KQRN, keys_KQNS), see.block(index))
        higher = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights, fade = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
        more = product("kqrs,kqsn->kqrn", weights.astype(values_KQSN.dtype), values_KQSN)
        return higher, total * fade + jnp.sum(weights, axis=-1), mixed * fade[..., None] + more

    prefix = shared[0].shape[-1]
    full = jnp.max(see.places_QT) // BLOCK + 1
    _, total, mixed = jax.lax.fori_loop(0, full, add_block, start_with(prefix) if prefix else start())
    return (mixed / total[..., None]).reshape(q_KQTGN.shape)


def _block(array, index, slots_Q):
    """One block of every strip's slot, `[K, Q, ...]`."""
    of_all = jax.lax.dynamic_index_in_dim(array, index, 0, keepdims=False)
    return of_all if slots_Q is None else of_all[:, slots_Q]


def _append(strips: Strips, keys, values, k_KQTGN, v_KQTGN):
    """Write new keys and values, strip by strip, each into its window; strips without tokens go where none is read."""
    count, length = strips.tokens_QT.shape
    slots_Q = jnp.arange(count) if strips.slots_Q is None else strips.slots_Q
    unread = keys.shape[0] - 1
    blocks_Q = jnp.where(jnp.any(strips.real_QT, axis=1), strips.starts_Q // BLOCK, unread)
    offsets_Q = strips.starts_Q % BLOCK

    def write_strip(q, arrays):
        def write(array, update, place, real):
            if length > 1:  # a window may hold earlier entries
                update = jnp.where(real, update, jax.lax.dynamic_slice(array, place, update.shape))
            return jax.lax.dynamic_update_slice(array, update, place)

        keys, values = arrays
        real_T = strips.real_QT[q]
        k_KNT, v_KTN = k_KQTGN[:, q, :, 0].swapaxes(1, 2), v_KQTGN[:, q, :, 0]
        keys = write(keys, k_KNT[None, :, None], (blocks_Q[q], 0, slots_Q[q], 0, offsets_Q[q]), real_T)
        values = write(values, v_KTN[None, :, None], (blocks_Q[q], 0, slots_Q[q], offsets_Q[q], 0), real_T[:, None])
        return keys, values

    return jax.lax.fori_loop(0, count, write_strip, (keys, values))


def share(cache: Cache, slot, length: int) -> Cache:
    """Make the first `length` entries of a slot the shared prefix."""

    def of_slot(array):
        return jax.lax.dynamic_index_in_dim(array, slot, 2, keepdims=False)

    def keys(array):  # [Z, K, N, BLOCK] -> [K, N, P]
        joined_KNZS = of_slot(array).transpose(1, 2, 0, 3)
        return joined_KNZS.reshape(*joined_KNZS.shape[:2], -1)[..., :length]

    def values(array):  # [Z, K, BLOCK, N] -> [K, P, N]
        joined_KZSN = of_slot(array).swapaxes(0, 1)
        return joined_KZSN.reshape(joined_KZSN.shape[0], -1, joined_KZSN.shape[-1])[:, :length]

    return cache.replace(
        prefix_keys=tuple(keys(array) for array in cache.keys),
        prefix_values=tuple(values(array) for array in cache.values),
    )
