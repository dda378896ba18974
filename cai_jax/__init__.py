"""Constitutional AI, whole, in JAX. `python -m cai_jax.launch --help` runs it; these names are for notebooks."""

import importlib

_HOMES = {
    "load_model": "cai_jax.models.pretrained",
    "save_model": "cai_jax.models.pretrained",
    "load_adapter": "cai_jax.models.adapters",
    "forward": "cai_jax.models.transformer",
    "reward": "cai_jax.models.heads",
    "reward_heads": "cai_jax.models.heads",
    "load_constitution": "cai_jax.constitution",
    "Sampler": "cai_jax.sampler",
    "Sampling": "cai_jax.config",
}

__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str):
    """Import on first use, so that the door can answer `--list` without JAX."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'cai_jax' has no attribute {name!r}")


def __dir__():
    return [*globals(), *__all__]
