"""Several samples of a prompt, and the best of them: a use of row programs."""

import math
from collections.abc import Callable, Sequence

from cai_jax.config import Sampling
from cai_jax.provenance import row_seed
from cai_jax.sampler.engine import Sampler
from cai_jax.sampler.requests import Generate, Row, Sample


def several(conversation: Sequence, sampling: Sampling, seeds: Sequence[int]) -> Row:
    """A row with one sample for each seed. The conversation is run for the first of them only."""
    samples = []
    for seed in seeds:
        samples.append((yield Generate(conversation, sampling, seed)))
    return samples


def best_of_n(
    sampler: Sampler,
    rate: Callable[[Sequence, Sample], float],
    conversations: Sequence,
    n: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    seed: int = 0,
    prefix: Sequence = (),
) -> list[tuple[Sample, list[float]]]:
    """Of n samples of each conversation the one that `rate(conversation, sample)` puts highest, and all n ratings.

    How far such a choice is from the sampler's own distribution says `kl_bound`. Of equal ratings the first counts.
    """
    rows = [
        several([*prefix, *conversation], sampling, [row_seed(seed, "best-of", place, i) for i in range(n)])
        for place, conversation in enumerate(conversations)
    ]
    chosen = []
    for conversation, samples in zip(conversations, sampler.run(rows, prefix), strict=True):
        ratings = [rate(conversation, sample) for sample in samples]
        chosen.append((samples[ratings.index(max(ratings))], ratings))
    return chosen


def kl_bound(n: int) -> float:
    """The KL divergence of the best of n samples from one sample, in nats: log n - (n - 1) / n (Stiennon et al. 2020,
    arXiv 2009.01325). It is that where no two samples are rated alike, else at most that (Beirami et al. 2024, arXiv
    2401.01879)."""
    return math.log(n) - (n - 1) / n


def expected_best(ratings: Sequence[float], k: int) -> float:
    """The expected highest rating of k samples, estimated without bias from all of the N >= k that there are.

    The mean over all choices of k of the N: the i-th lowest is the highest of C(i - 1, k - 1) of them.
    """
    ordered = sorted(ratings)
    choices = math.comb(len(ordered), k)
    return sum(rating * (math.comb(i, k - 1) / choices) for i, rating in enumerate(ordered))
