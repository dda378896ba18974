"""Published peaks of the chips a run may meet, and the names of slices and machines made of them.

Peaks are the makers' figures for dense products: a program runs below them. Sources stand beside each row.
"""

import difflib
import re
from dataclasses import dataclass
from math import prod

from cai_jax.errors import UserError

GIB = 2**30
# Of the published memory, what a program may plan with: the rest holds the runtime, its buffers and fragmentation.
USABLE = 15 / 16


@dataclass(frozen=True)
class Accelerator:
    """One chip: peak rates a second and memory in bytes.

    `link` is what leaves a chip on all its links to chips of the same slice or machine, one way; `network` what leaves
    it towards other machines (0 where every chip of a slice is linked).
    """

    name: str
    platform: str  # tpu | gpu: jax's name of the backend
    flops: float  # bf16 products, float32 sums
    memory: int
    bandwidth: float  # of the memory
    link: float
    network: float = 0.0

    @property
    def usable(self) -> int:
        """Bytes that a plan may fill."""
        return int(self.memory * USABLE)


# Google's gigabytes of a chip are GiB: its compiler has 30.75, 15.75, 95.74 and 31.25 GiB to give (libtpu 0.0.42).
ACCELERATORS = {
    chip.name: chip
    for chip in (
        # https://cloud.google.com/tpu/docs/v4; links: six of 50 GB/s (Jouppi et al. 2023, arXiv 2304.01433)
        Accelerator("v4", "tpu", 275e12, 32 * GIB, 1200e9, 300e9),
        # https://cloud.google.com/tpu/docs/v5e: links 400 GB/s both ways
        Accelerator("v5e", "tpu", 197e12, 16 * GIB, 819e9, 200e9),
        # https://cloud.google.com/tpu/docs/v5p: links 4800 Gbit/s
        Accelerator("v5p", "tpu", 459e12, 95 * GIB, 2765e9, 600e9),
        # https://cloud.google.com/tpu/docs/v6e: links 800 GB/s both ways
        Accelerator("v6e", "tpu", 918e12, 32 * GIB, 1600e9, 400e9),
        # https://www.nvidia.com/en-us/data-center/a100: NVLink 600 GB/s both ways; DGX A100: 200 Gbit/s a GPU outwards
        Accelerator("a100-40", "gpu", 312e12, 40 * 10**9, 1555e9, 300e9, 25e9),
        Accelerator("a100-80", "gpu", 312e12, 80 * 10**9, 2039e9, 300e9, 25e9),
        # https://www.nvidia.com/en-us/data-center/h100: SXM; NVLink 900 GB/s both ways; DGX: 400 Gbit/s a GPU outwards
        Accelerator("h100", "gpu", 989e12, 80 * 10**9, 3350e9, 450e9, 50e9),
        # https://www.nvidia.com/en-us/data-center/h200
        Accelerator("h200", "gpu", 989e12, 141 * 10**9, 4800e9, 450e9, 50e9),
    )
}

# jax's device_kind, lower case, first match. PCIe and NVL boards have other peaks and are not listed above.
_KINDS = (
    (r"tpu v4$", "v4"),
    (r"tpu v5( lite|e)$", "v5e"),
    (r"tpu v5p?$", "v5p"),
    (r"tpu v6( lite|e)$", "v6e"),
    (r"a100-sxm\d?-40gb", "a100-40"),
    (r"a100-sxm\d?-80gb", "a100-80"),
    (r"h100( 80gb hbm3|-sxm)", "h100"),
    (r"h200(?! nvl)", "h200"),
)

# Chips along the axes of the slices that Google Cloud sells: "Configurations" of the pages above.
_TORUS_3D = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16))
_TORUS_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_GPUS = (1, 2, 4, 8, 16, 32, 64, 128)
GPUS_PER_MACHINE = 8


@dataclass(frozen=True)
class Slice:
    """Chips that one run uses together. `shape`: chips along the axes of a TPU's torus, () for GPUs."""

    name: str
    chip: Accelerator
    chips: int
    shape: tuple[int, ...] = ()

    @property
    def host(self) -> tuple[int, ...]:
        """Chips of one machine, along the axes of the torus: four, or a whole slice of v5e or v6e of up to eight."""
        if self.chip.platform == "gpu":
            return (min(self.chips, GPUS_PER_MACHINE),)
        return self.shape if len(self.shape) == 2 and self.chips <= 8 else (2, 2, 1)[: len(self.shape)]

    @property
    def machines(self) -> int:
        """Machines that hold the chips, each with a process of the run."""
        return self.chips // prod(self.host)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Along which axes of a TPU's torus the last chip is linked to the first: whole cubes of 4x4x4, or 16 chips."""
        if len(self.shape) == 3:
            return (all(size % 4 == 0 for size in self.shape),) * 3
        return tuple(size == 16 for size in self.shape)

    @property
    def link(self) -> float:
        """Bytes a second that leave a chip when all chips exchange data: the slowest hop counts."""
        between_machines = self.chip.network and self.chips > GPUS_PER_MACHINE
        return self.chip.network if between_machines else self.chip.link


def by_device_kind(kind: str) -> Accelerator | None:
    """The accelerator of jax's `device.device_kind`, None for one that is not in the table (a CPU, a PCIe board)."""
    return next((ACCELERATORS[name] for pattern, name in _KINDS if re.search(pattern, kind.lower())), None)


def slices_of(chip: Accelerator) -> tuple[Slice, ...]:
    """Every slice of a chip that has a name here, small to large.

    Names of v4 and v5p count TensorCores, two a chip; those of v5e and v6e count chips.
    """
    if chip.platform == "gpu":
        return tuple(Slice(f"{chip.name}x{n}", chip, n) for n in _GPUS)
    cores, shapes = (2, _TORUS_3D) if chip.name in ("v4", "v5p") else (1, _TORUS_2D)
    sized = ((prod(shape), shape) for shape in shapes)
    return tuple(Slice(f"{chip.name}-{cores * chips}", chip, chips, shape) for chips, shape in sized)


def parse_slice(name: str) -> Slice:
    """The slice of a name: `v4-32` (16 chips), `v5e-16`, `v5litepod-16`, `h100x8`. Raises UserError for another."""
    known = {piece.name: piece for chip in ACCELERATORS.values() for piece in slices_of(chip)}
    wanted = name.strip().lower().replace("v5litepod-", "v5e-")
    if wanted in known:
        return known[wanted]
    raise UserError(f"no accelerator '{name}'; nearest: {', '.join(_nearest(wanted, known))}")


def _nearest(wanted: str, known: dict[str, Slice]) -> list[str]:
    """Up to three known names: the same chip with the nearest sizes, else the nearest spellings."""
    family, size = re.fullmatch(r"(.*?)[-x]?(\d*)", wanted).groups()
    same = [piece for piece in known.values() if piece.chip.name == family]
    if same and size:
        number = re.compile(r"\d+$")
        same.sort(key=lambda piece: abs(int(number.search(piece.name)[0]) - int(size)))
    return [piece.name for piece in same[:3]] or difflib.get_close_matches(wanted, known, 3, 0.3) or ["v4-32", "h100x8"]
