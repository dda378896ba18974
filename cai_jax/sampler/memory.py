"""Whether the cache fits, before it is made."""

import jax

from cai_jax.errors import UserError
from cai_jax.models.families import ModelConfig
from cai_jax.sampler.cache import cache_bytes


def check_cache_fits(config: ModelConfig, rows: int, length: int, prefix: int, dtype, mesh=None) -> None:
    """Raise UserError, with the largest number of rows that fits, for a cache larger than the free memory."""
    free = free_bytes(mesh)
    if free is None or cache_bytes(config, rows, length, prefix, dtype) <= free:
        return
    ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    row = cache_bytes(config, 1, length, 0, dtype)
    fitting = (free - cache_bytes(config, 0, length, prefix, dtype)) // row // ways * ways
    mend = f"set sampler.rows to at most {fitting}, or lower sampler.max_length" if fitting > 0 else (
        "lower sampler.max_length"
    )  # fmt: skip
    raise UserError(
        f"sampler: the key/value cache of {rows} rows x {length} tokens takes {gibibytes(rows * row)}, "
        f"and {gibibytes(free)} are free: {mend}"
    )


def free_bytes(mesh=None) -> int | None:
    """Free memory of the devices that share the cache, added up; on a CPU that of the host. None: not known."""
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat)
    if devices[0].platform == "cpu":
        return _host_free_bytes()
    stats = [device.memory_stats() for device in devices if device.process_index == jax.process_index()]
    if not all(stats):
        return None
    smallest = min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)
    return smallest * len(devices)


def gibibytes(count: int) -> str:
    """1.7 GiB"""
    return f"{count / 2**30:.2g} GiB" if count < 10 * 2**30 else f"{count / 2**30:.0f} GiB"


def _host_free_bytes() -> int | None:
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
