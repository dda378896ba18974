"""Shared fixtures; a persistent compilation cache keeps the suite fast."""

import itertools
import os
from pathlib import Path

CACHE = Path(os.environ.get("CAI_JAX_CACHE") or "~/.cache/cai_jax").expanduser()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Tiny programs spend their time in the compiler, not in the code that it makes.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax  # noqa: E402 - JAX reads the variables above when it is imported
import pytest  # noqa: E402

TESTS_RUN, MAPS = itertools.count(1), Path("/proc/self/maps")


@pytest.fixture(scope="session")
def oracles() -> Path:
    """Numbers from transformers, TRL and peft to agree with; see oracles/README.md."""
    return Path(__file__).parent / "oracles"


@pytest.fixture(autouse=True)
def few_programs():
    """Let go of compiled programs in time: each holds memory maps, and at Linux's bound of 65,530 XLA aborts."""
    yield
    if next(TESTS_RUN) % 8 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 35_000:
        jax.clear_caches()
