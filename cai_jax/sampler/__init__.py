"""The one jitted batched sampler: response, critique, revision, pair, rollout and label all go through it."""

from cai_jax.config import Sampling
from cai_jax.sampler.best_of import best_of_n, expected_best, kl_bound, several
from cai_jax.sampler.engine import Sampler
from cai_jax.sampler.outside import Counts, WithoutModel
from cai_jax.sampler.requests import Generate, Outside, Row, Sample, Score

__all__ = [
    "Counts", "Generate", "Outside", "Row", "Sample", "Sampler", "Sampling", "Score", "WithoutModel", "best_of_n",
    "expected_best", "kl_bound",
    "several",
]  # fmt: skip
