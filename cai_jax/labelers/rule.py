"""Verifiable principles: the checks of the constitution decide, exactly and without a model."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from cai_jax import config
from cai_jax.constitution import Principle
from cai_jax.labelers.opinion import Opinion, Pair
from cai_jax.provenance import content_hash
from cai_jax.rules import satisfies
from cai_jax.sampler import Row

LIMIT = 10.0  # nats of log-odds: a label is finite however sure it is
NO_CHECK = "no_check"  # the failure of principles that no program can check


@dataclass(frozen=True)
class Rule:
    """Prefers the response that keeps the larger share of the rules; equal shares are a tie, with a logit of 0.

    Principles without a check have no say; a pair with none that has one gets no opinion.
    """

    settings: config.Rule = config.Rule()
    preamble: Sequence[dict] = ()
    judge: None = None
    name: str = "rule"

    @cached_property
    def hash(self) -> str:
        """Of all that decides its opinions beside the pair and the principles."""
        return content_hash([self.name, asdict(self.settings), LIMIT])

    def compare(self, pair: Pair, principles: Sequence[Principle], seed: int) -> Row:
        """A row program that asks nothing of the sampler."""
        yield from ()
        checks = [principle.check for principle in principles if principle.check]
        if not checks:
            return Opinion(None, NO_CHECK)
        kept = [sum(satisfies(c, text) for c in checks) / len(checks) for text in (pair.response_a, pair.response_b)]
        return Opinion(self._sure() * (kept[0] - kept[1]), detail={"kept": kept, "flags": {"tie": kept[0] == kept[1]}})

    def _sure(self) -> float:
        probability = self.settings.probability
        return min(LIMIT, math.log(probability / (1 - probability))) if probability < 1 else LIMIT
