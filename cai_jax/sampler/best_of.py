"""Several samples of a prompt, and the best of them: a use of row programs."""

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

    The divergence of such a choice from the sampler's own distribution is at most log n - (n - 1) / n nats (Stiennon
    et al. 2020, arXiv 2009.01325). Of equal ratings the first counts.
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
