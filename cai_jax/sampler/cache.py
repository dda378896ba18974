"""The key/value cache of all slots.

It stands in blocks of BLOCK entries, a pair of arrays a layer. Entry s of a slot lies in block s // BLOCK, so attention
reads as many blocks as the fullest slot has and no more, and a row's sums are the same however full the others are.
The last block is never read: what has no place is written there. Beside the slots stand prefixes; any slot may share
one of them.

Letters of an array's axes: z blocks, q slots (or strips), k key/value heads, n head size, s entries. Their order is the
backend's: on a CPU the two products of attention read rows of memory; on a TPU it is the one that its compiler chooses
by itself, and would copy the whole cache into (benchmarks/tpu_decode.py); on a GPU each head of a slot is a matrix, as
batched products want it.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.mesh import ROWS, platform_of
from cai_jax.models.families import ModelConfig

BLOCK = 128
STRIP = 16  # tokens of a strip in prefill; divides BLOCK
CPU_ORDERS, TPU_ORDERS, GPU_ORDERS = ("zkqns", "zkqsn"), ("zqskn", "zqskn"), ("zqksn", "zqksn")
SHARED_ORDERS, SCALE_ORDER = ("kns", "ksn"), "zkqs"


@flax.struct.dataclass
class Entries:
    """Keys and values of one layer. As int8 they have a scale an entry and head; else the scales are None."""

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None
    value_scales: jax.Array | None
    orders: tuple[str, str] = flax.struct.field(pytree_node=False)  # of keys, of values

    def axes(self):
        """The letters of each array, as an `Entries`."""
        scales = None if self.key_scales is None else SCALE_ORDER if self.orders[0][0] == "z" else "ks"
        return self.replace(keys=self.orders[0], values=self.orders[1], key_scales=scales, value_scales=scales)


@flax.struct.dataclass
class Cache:
    """Of every layer the entries of all slots, and those of each prefix that slots may share."""

    own: tuple[Entries, ...]
    shared: tuple[tuple[Entries, ...], ...]

    @property
    def prefix_rooms(self) -> tuple[int, ...]:
        """The longest that each prefix may be."""
        return tuple(entries.keys.shape[-1] for entries in self.shared[0])


@flax.struct.dataclass
class Strips:
    """Q strips of T tokens. A strip is a window of its slot's cache; `real` marks the tokens that exist."""

    tokens_QT: jax.Array
    real_QT: jax.Array
    slots_Q: jax.Array | None  # None: strip q is of slot q
    starts_Q: jax.Array  # place of the window in the slot's own cache, a multiple of T
    prefixes_Q: jax.Array  # number of the shared prefix that the slot stands on
    shared_Q: jax.Array  # how many entries of that


def blocks_of(length: int) -> int:
    """Blocks of a cache whose rows have at most `length` entries, the one that is never read included."""
    return -(-length // BLOCK) + 1


def empty_cache(
    config: ModelConfig, rows: int, length: int, prefixes: tuple[int, ...], dtype, platform: str
) -> Cache:  # fmt: skip
    """A cache for `rows` slots of at most `length` entries, and prefixes of at most so many each."""
    sizes = {"z": blocks_of(length), "q": rows, "k": config.n_kv_heads, "n": config.head_dim}
    int8 = jnp.dtype(dtype) == jnp.int8

    def entries(orders, scale_order, length):
        def zeros(order, dtype):
            return jnp.zeros([(sizes | {"s": length})[letter] for letter in order], dtype)

        scales = zeros(scale_order, jnp.float32) if int8 else None
        return Entries(zeros(orders[0], dtype), zeros(orders[1], dtype), scales, scales, orders)

    orders = {"cpu": CPU_ORDERS, "gpu": GPU_ORDERS}.get(platform, TPU_ORDERS)
    layers = range(config.n_layers)
    return Cache(
        own=tuple(entries(orders, SCALE_ORDER, BLOCK) for _ in layers),
        shared=tuple(tuple(entries(SHARED_ORDERS, "ks", prefix) for prefix in prefixes) for _ in layers),
    )


def entry_dtype(compute_dtype: str, int8: bool, platform: str) -> str:
    """What keys and values are stored in. On a CPU never in bfloat16: to widen them takes longer than to read them."""
    return "int8" if int8 else "float32" if platform == "cpu" else compute_dtype


def new_cache(config: ModelConfig, rows: int, length: int, prefixes: tuple[int, ...], dtype, mesh=None) -> Cache:
    """An empty cache where it belongs on the mesh."""
    make = partial(empty_cache, config, rows, length, prefixes, dtype, platform_of(mesh))
    return jax.jit(make, out_shardings=None if mesh is None else cache_shardings(config, mesh, jax.eval_shape(make)))()


def cache_shardings(config: ModelConfig, mesh, shapes: Cache) -> Cache:
    """Slots over the data axes, heads over tensor where it divides them, prefixes on every data shard."""
    heads = "tensor" if config.n_kv_heads % mesh.shape["tensor"] == 0 else None
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), cache_specs(shapes, heads))


def cache_specs(cache: Cache, heads: str | None = None) -> Cache:
    """Where each array is split: slots over the data axes, heads over an axis of choice."""

    def of_layer(entries):
        return jax.tree.map(
            lambda _, order: P(*({"q": ROWS[0], "k": heads}.get(letter) for letter in order)), entries, entries.axes()
        )

    return Cache(
        own=tuple(map(of_layer, cache.own)),
        shared=tuple(tuple(map(of_layer, prefixes)) for prefixes in cache.shared),
    )


def cache_bytes(config: ModelConfig, rows: int, length: int, prefix: int, dtype) -> int:
    """Bytes of the keys and values of `rows` slots of `length` entries and of prefixes of `prefix` together."""
    scale = 4 if jnp.dtype(dtype) == jnp.int8 else 0
    entry = 2 * config.n_layers * config.n_kv_heads * (config.head_dim * jnp.dtype(dtype).itemsize + scale)
    return entry * (rows * blocks_of(length) * BLOCK + prefix)


def block_of(own: Entries, index, slots_Q) -> Entries:
    """One block of every strip's slot (of every slot, in order, if `slots_Q` is None); its arrays have no z."""

    def read(array, order):
        of_all = jax.lax.dynamic_index_in_dim(array, index, order.index("z"), keepdims=False)
        return of_all if slots_Q is None else jnp.take(of_all, slots_Q, axis=order.replace("z", "").index("q"))

    return jax.tree.map(read, own, own.axes())


def append(strips: Strips, layers: tuple[Entries, ...], new: tuple[Entries, ...]) -> tuple[Entries, ...]:
    """Write new entries, each strip into its window; strips without tokens go where none is read.

    `new` is what `as_entries` makes of the keys and values of each layer. Strip by strip the cache is written in place;
    on a GPU, where each write is a launch of its own, all strips go at once.
    """
    count, length = strips.tokens_QT.shape
    slots_Q = jnp.arange(count) if strips.slots_Q is None else strips.slots_Q
    if layers[0].orders == GPU_ORDERS:
        return _append_at_once(strips, slots_Q, layers, new)
    blocks_Q = jnp.where(jnp.any(strips.real_QT, axis=1), strips.starts_Q // BLOCK, layers[0].keys.shape[0] - 1)
    offsets_Q = strips.starts_Q % BLOCK

    def write_strip(q, layers):
        place = {"z": blocks_Q[q], "q": slots_Q[q], "s": offsets_Q[q]}

        def write(array, order, new):  # new: [K, Q, S] or [K, Q, S, N]
            letters = "zkqsn"[: new.ndim + 1]
            update = jax.lax.dynamic_slice_in_dim(new, q, 1, axis=1)[None]
            update = update.transpose([letters.index(letter) for letter in order])
            at = [place.get(letter, 0) for letter in order]
            if length > 1:  # a window may hold earlier entries
                real = strips.real_QT[q].reshape([-1 if letter == "s" else 1 for letter in order])
                update = jnp.where(real, update, jax.lax.dynamic_slice(array, at, update.shape))
            return jax.lax.dynamic_update_slice(array, update, at)

        return tuple(
            jax.tree.map(write, own, own.axes(), entries) for own, entries in zip(layers, new, strict=True)
        )

    return jax.lax.fori_loop(0, count, write_strip, layers)


def _append_at_once(strips: Strips, slots_Q, layers: tuple[Entries, ...], new: tuple[Entries, ...]):
    """`append` as one scatter an array; what is not real has a block beyond the last, and is dropped."""
    length = strips.tokens_QT.shape[1]
    nowhere = layers[0].keys.shape[0]
    index = {
        "z": jnp.where(strips.real_QT, (strips.starts_Q // BLOCK)[:, None], nowhere),
        "q": jnp.broadcast_to(slots_Q[:, None], strips.real_QT.shape),
        "s": (strips.starts_Q % BLOCK)[:, None] + jnp.arange(length),
    }

    def write(array, order, new):  # new: [K, Q, S] or [K, Q, S, N]
        # The indices stand apart in every order, so their axes come first: [Q, S, K] or [Q, S, K, N].
        at = tuple(index.get(letter, slice(None)) for letter in order)
        return array.at[at].set(jnp.moveaxis(new, 0, 2), mode="drop")

    return tuple(jax.tree.map(write, own, own.axes(), entries) for own, entries in zip(layers, new, strict=True))


def as_entries(own: Entries, k_KQSN, v_KQSN) -> Entries:
    """New keys and values in the precision of the cache, `[K, Q, S, N]`, with their scales `[K, Q, S]`."""
    keys, key_scales = _stored(k_KQSN, own)
    values, value_scales = _stored(v_KQSN, own)
    return Entries(keys, values, key_scales, value_scales, own.orders)


def _stored(x_KQSN, own: Entries):
    """New keys or values as the cache holds them, with their scales."""
    if own.key_scales is None:
        return x_KQSN.astype(own.keys.dtype), None
    scales_KQS = jnp.maximum(jnp.max(jnp.abs(x_KQSN), axis=-1), 1e-8) / 127
    return jnp.round(x_KQSN / scales_KQS[..., None]).astype(jnp.int8), scales_KQS.astype(jnp.float32)


def first_entries(cache: Cache, slot, length: int) -> tuple[Entries, ...]:
    """The first `length` entries of a slot, as a prefix that slots may share."""

    def of_slot(array, order, wanted):
        own = jax.lax.dynamic_index_in_dim(array, slot, order.index("q"), keepdims=False)
        order, joined = order.replace("q", ""), wanted.replace("s", "zs")
        axis = wanted.index("s")
        own = own.transpose([order.index(letter) for letter in joined])
        own = own.reshape(*own.shape[:axis], -1, *own.shape[axis + 2 :])
        return jax.lax.slice_in_dim(own, 0, length, axis=axis)

    def of_layer(own, shared):
        arrays = jax.tree.map(of_slot, own, own.axes(), shared.axes().replace(orders=own.orders))
        return arrays.replace(orders=shared.orders)

    return tuple(of_layer(own, prefixes[0]) for own, prefixes in zip(cache.own, cache.shared, strict=True))
