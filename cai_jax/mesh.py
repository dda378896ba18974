"""Where arrays live: one mesh, one ordered table from leaf names to partition specs.

Axes: `data` (rows), `fsdp` (rows, and weights split along one axis), `tensor` (heads and feed-forward).
Optimizer moments and value models use the same table, because their leaves carry the same names.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")
ROWS = P(ROW_AXES)

# The end of a leaf's name decides. Layers are stacked: their first axis is L. `kernel` and `scale_O` are the parts of
# an Int8 kernel; `base`, `a_IR` and `b_RO` those of a Lora kernel, whose rank is never split.
TABLE = (
    (r"embed$", P("tensor", "fsdp")),
    (r"lm_head$", P("fsdp", "tensor")),
    (r"layers/(q|k|v|gate|up)(/base)?(/kernel)?$", P(None, "fsdp", "tensor")),
    (r"layers/(q|k|v|gate|up)(/base)?/scale_O$", P(None, "tensor")),
    (r"layers/(q|k|v|gate|up)/a_IR$", P(None, "fsdp", None)),
    (r"layers/(q|k|v|gate|up)/b_RO$", P(None, None, "tensor")),
    (r"layers/(o|down)(/base)?(/kernel)?$", P(None, "tensor", "fsdp")),
    (r"layers/(o|down)(/base)?/scale_O$", P(None, "fsdp")),
    (r"layers/(o|down)/a_IR$", P(None, "tensor", None)),
    (r"layers/(o|down)/b_RO$", P(None, None, "fsdp")),
    (r"layers/(q|k|v|gate|up)_bias$", P(None, "tensor")),
    (r"layers/(o|down)_bias$", P()),
    (r"layers/\w*norm$", P()),
    (r"final_norm$", P()),
    (r"score$", P()),
)


def make_mesh(config, devices=None) -> jax.sharding.Mesh:
    """The mesh of a `config.Mesh` over all devices; one axis may be -1. Raises UserError when it does not fit."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(axis_sizes(config, len(devices)), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def axis_sizes(config, count: int) -> tuple[int, int, int]:
    """Devices along each axis of a `config.Mesh` over `count` devices. Raises UserError when it does not fit."""
    sizes = [config.data, config.fsdp, config.tensor]
    free = [i for i, size in enumerate(sizes) if size == -1]
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if len(free) > 1 or fixed < 1 or count % fixed or (not free and fixed != count):
        raise UserError(
            f"mesh data={sizes[0]} fsdp={sizes[1]} tensor={sizes[2]} does not fit {count} devices: "
            "set sizes whose product is that number, one of them may be -1"
        )
    if free:
        sizes[free[0]] = count // fixed
    return tuple(sizes)


def platform_of(mesh) -> str:
    """Where the programs of a mesh run (cpu, gpu, tpu); that is not where the process runs that compiles them."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def platform_in_use() -> str:
    """The platform of the mesh in use (`jax.set_mesh`; a train step sets its own), without one that of the process."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def shardings(mesh, tree):
    """A NamedSharding for every leaf of a pytree of arrays or shapes; leaves of rank 0 are replicated.

    Raises UserError for a leaf that no row of the table names, or that the mesh does not divide.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _sharding(mesh, leaf_name(path), leaf.shape), tree)


def leaf_name(path) -> str:
    """`layers/q` for the path of a leaf in a pytree."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _sharding(mesh, name: str, shape) -> NamedSharding:
    if not shape:
        return NamedSharding(mesh, P())
    spec = _spec(name)
    if spec is None:
        raise UserError(f"no sharding for leaf '{name}' of shape {tuple(shape)}: add its name to TABLE in mesh.py")
    _check_divides(mesh, name, shape, spec)
    return NamedSharding(mesh, spec)


def _spec(name: str) -> P | None:
    return next((spec for pattern, spec in TABLE if re.search(rf"(^|/){pattern}", name)), None)


def decoding_shardings(mesh, tree):
    """Shardings of the sampler's weights: the tensor axis of the table, and nothing along the others.

    Layers are apart there (`layers/3/q`), and a kernel may lie transposed (`layers/3/q/kernel_OI`).
    """

    def sharding(path, leaf):
        name = leaf_name(path)
        base = re.sub(r"layers/\d+", "layers", name.removesuffix("/kernel_OI"))
        spec = list((_spec(base) or P())[1 if base != name and base.startswith("layers") else 0 :])
        if name.endswith("/kernel_OI"):
            spec = [*spec, *[None] * (leaf.ndim - len(spec))][::-1]
        return NamedSharding(mesh, P(*(axis if axis == "tensor" else None for axis in spec)))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def row_shards() -> int:
    """Parts that rows are split into on the mesh in use (`jax.set_mesh`); 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def _rows_alone() -> bool:
    """Whether the mesh in use splits rows and not heads; where it splits both, places are the compiler's own choice."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and mesh.shape["tensor"] == 1


def by_rows(x):
    """Inside a jitted function: `x` with its rows split over the mesh in use, where there is one that divides them."""
    if not _rows_alone() or x.shape[0] % row_shards():
        return x
    return jax.lax.with_sharding_constraint(x, ROWS)


def by_table(tree):
    """Inside a jitted function: leaves where the table puts them on the mesh in use, where there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.size <= 1 else jax.lax.with_sharding_constraint(tree, shardings(mesh, tree))


def by_layer(x, weights):
    """Inside a loop over layers on a mesh: the loop's `x` and a layer's weights, tied together by a barrier.

    Else the compiler would do before the loop, for all layers, what it can do without `x`: cast a second copy of all
    weights, and hold it to the end.
    """
    if not _rows_alone():
        return x, weights
    return jax.lax.optimization_barrier((x, weights))


def rounded(leaf, dtype):
    """Inside a loop over layers on a mesh, before a cast: a floating leaf in its own dtype, rounded as for `dtype`.

    The cast then rounds nothing. Alone it would be drawn out of the loop, through slice and barrier (by the TPU
    compiler's bfloat16 propagation): a second copy of all weights. It does not pass an operation that computes.
    """
    kind = jnp.finfo(dtype)
    if not _rows_alone() or kind.bits >= jnp.finfo(leaf.dtype).bits:
        return leaf
    return jax.lax.reduce_precision(leaf, kind.nexp, kind.nmant)


def gather_layer(weights):
    """Inside a jitted function: a layer's weights (no axis L) whole along fsdp, their gradients split again.

    Said here, lest the compiler gathers them piece by piece, in loops that hold a float32 sum for every product.
    """
    if not _rows_alone():
        return weights
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _gather(leaf_name(path), leaf), weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(name: str, leaf):
    spec = _spec(f"layers/{name}")
    whole = None if spec is None else P(*(None if axis == "fsdp" else axis for axis in spec[1:]))
    return leaf if whole is None else jax.lax.with_sharding_constraint(leaf, whole)


def _gather_backward(name, _, gradient):
    spec = _spec(f"layers/{name}")
    return (gradient if spec is None else jax.lax.with_sharding_constraint(gradient, P(*spec[1:])),)


_gather.defvjp(lambda name, leaf: (_gather(name, leaf), None), _gather_backward)


def _check_divides(mesh, name, shape, spec):
    for axis, (size, mesh_axis) in enumerate(zip(shape, spec, strict=False)):
        if mesh_axis is None or size % mesh.shape[mesh_axis] == 0:
            continue
        fitting = [n for n in range(1, mesh.size + 1) if size % n == 0]
        raise UserError(
            f"mesh axis {mesh_axis}={mesh.shape[mesh_axis]} does not divide axis {axis} (size {size}) of "
            f"leaf '{name}': set mesh.{mesh_axis} to one of {fitting}"
        )


def placed(shapes, shardings):
    """Abstract arrays: the shapes and dtypes of one tree in the places that the other names."""
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes, shardings)


def bytes_on_a_device(tree) -> int:
    """Bytes that arrays, or abstract arrays in their places, take on one device."""

    def size(leaf):
        return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def put_rows(mesh, batch):
    """Host arrays with rows first, split over the data axes; each process holds the whole batch and places its part."""
    sharding = NamedSharding(mesh, ROWS)

    def put(array):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, batch)


def place_rows(mesh, rows, take):
    """A batch of which each process makes only the rows that its devices hold.

    `rows` are the numbers of the batch's rows; `take(numbers)` makes those, a dict of host arrays with rows first.
    """
    sharding, count = NamedSharding(mesh, ROWS), len(rows)

    def bounds(index):
        return index[0].indices(count)[:2]

    wanted = {bounds(index) for index in sharding.addressable_devices_indices_map((count,)).values()}
    parts = {(start, stop): take(rows[start:stop]) for start, stop in wanted}

    def place(name, part):
        shape = (count, *part.shape[1:])
        return jax.make_array_from_callback(shape, sharding, lambda index: parts[bounds(index)][name])

    return {name: place(name, part) for name, part in next(iter(parts.values())).items()}


def on_host(array) -> np.ndarray:
    """A whole array in every process, however it is split."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
