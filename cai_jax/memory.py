"""Peak memory, of this process stage by stage and of its accelerators."""

import resource
import sys
from pathlib import Path


def reset_peak_memory() -> None:
    """Start the peak anew, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_memory() -> int:
    """Bytes of the largest resident set since the last reset, or since the start where there is no reset."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_memory() -> int:
    """Peak bytes in use on the fullest of this process's accelerators; on a CPU that of the process."""
    import jax

    peaks = [stats["peak_bytes_in_use"] for device in jax.local_devices() if (stats := device.memory_stats())]
    return max(peaks) if peaks else peak_memory()
