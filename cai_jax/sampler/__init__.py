"""The one jitted batched sampler: response, critique, revision, pair, rollout and label all go through it."""

from cai_jax.config import Sampling
from cai_jax.sampler.engine import Sample, Sampler

__all__ = ["Sample", "Sampler", "Sampling"]
