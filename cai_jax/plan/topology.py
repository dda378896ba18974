"""Meshes of chips that are not there: real ones for the TPU compiler, sizes alone where there is no compiler."""

import importlib.util
import os
import sys
from functools import cache
from pathlib import Path

from cai_jax.accelerators import Slice
from cai_jax.errors import UserError

INSTALL = "pip install 'cai-jax[plan]' (in a checkout: make env)"


# `make env` puts libtpu here, out of sight of other runs: wherever JAX finds it, it looks for a TPU and complains.
BESIDE = Path(sys.prefix) / "libtpu"


def has_compiler() -> bool:
    """Whether the TPU compiler is there, among the packages or beside them."""
    return BESIDE.is_dir() or importlib.util.find_spec("libtpu") is not None


def set_environment() -> None:
    """What must stand before JAX is imported: this process computes nothing, and asks no metadata server for a TPU."""
    sys.path.append(str(BESIDE))
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")


def check_compiler(target: str, platform: str) -> None:
    """Raise UserError where a plan for TPUs finds no TPU compiler."""
    if platform == "tpu" and not has_compiler():
        raise UserError(f"--plan={target}: the TPU compiler is not installed: {INSTALL}")


def planned_mesh(config, piece: Slice):
    """The mesh of a `config.Mesh` over a slice: of the compiler's devices for TPUs, an AbstractMesh for GPUs.

    Raises UserError where the mesh does not fit the number of chips.
    """
    from jax.sharding import AbstractMesh, AxisType

    from cai_jax.mesh import AXES, axis_sizes, make_mesh

    if piece.chip.platform != "tpu":
        return AbstractMesh(axis_sizes(config, piece.chips), AXES, axis_types=(AxisType.Auto,) * 3)
    return make_mesh(config, _devices(piece))


@cache
def _devices(piece: Slice) -> list:
    from jax.experimental import topologies

    flat = len(piece.shape) == 2
    topology = topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{piece.chip.name}:{'x'.join(map(str, piece.shape))}",
        chip_config_name="default" if flat else "megacore",  # the two TensorCores of a chip as one device
        chips_per_host_bounds=(*piece.host, 1) if flat else piece.host,
        num_slices=1,
        wrap=(*piece.wraps, False) if flat else piece.wraps,
    )
    return list(topology.devices)
