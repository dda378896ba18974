"""Several labelers vote: the mean of their log-odds, and how far they agree."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from cai_jax import statistics
from cai_jax.labelers.opinion import Opinion


def tempered(opinion: Opinion, temperature: float) -> float | None:
    """The log-odds of a label by one labeler: at its temperature, within the limit of the opinion."""
    if opinion.logit is None:
        return None
    return float(np.clip(opinion.logit / temperature, -opinion.limit, opinion.limit))


def vote(logits: Sequence[float | None]) -> float | None:
    """The mean of the log-odds of those that have an opinion, all of equal weight; None where nobody has one."""
    given = [logit for logit in logits if logit is not None]
    return float(np.mean(given)) if given else None


def agreement(logits_by_labeler: dict[str, Sequence[float | None]]) -> list[dict]:
    """How far every two labelers agree on the pairs that both decide, those without an opinion and ties left out.

    Returns: {"labelers": [one, other], "same": INTERVAL (share of pairs on which both prefer the same response),
      "kappa": Cohen's kappa, the agreement beyond chance (1 is full, 0 is chance); None where chance alone agrees}.
    """
    found = []
    for (one, first), (other, second) in combinations(logits_by_labeler.items(), 2):
        sides = [(x > 0, y > 0) for x, y in zip(first, second, strict=True) if x and y]
        same = sum(x == y for x, y in sides)
        interval = statistics.wilson_interval(same, len(sides))
        found.append({"labelers": [one, other], "same": interval, "kappa": _kappa(sides)})
    return found


def _kappa(sides: list[tuple[bool, bool]]) -> float | None:
    """Cohen 1960, Educational and Psychological Measurement 20:37."""
    if not sides:
        return None
    first, second = (sum(column) / len(sides) for column in zip(*sides, strict=True))
    by_chance = first * second + (1 - first) * (1 - second)
    observed = sum(x == y for x, y in sides) / len(sides)
    return (observed - by_chance) / (1 - by_chance) if by_chance < 1 else None
