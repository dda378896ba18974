"""Contrast: how much likelier a response is where the principle is asked for than where its opposite is.

The two requests are those of RLCD (Yang et al. 2023, arXiv 2307.12950), which samples a response from each; here the
responses are there already, and their log-probs under both are compared. No option letters, no worked examples.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from cai_jax import config
from cai_jax.chat import completion_ids, turn_end_id
from cai_jax.constitution import Principle
from cai_jax.labelers.judge import TOO_LONG, Judge, hash_of
from cai_jax.labelers.opinion import Opinion, Pair
from cai_jax.prompts import contrast_request
from cai_jax.sampler import Row, Score


@dataclass(frozen=True)
class Contrast:
    """Compares log p(response | keep the principle) - log p(response | break it) of two responses.

    The responses never stand side by side, so their order cannot matter. The token that ends the turn belongs to a
    response: that it ends is part of keeping it short.
    """

    judge: Judge
    settings: config.Contrast = config.Contrast()
    preamble: Sequence[dict] = ()
    name: str = "contrast"

    @cached_property
    def hash(self) -> str:
        """Of all that decides its opinions beside the pair and the principles."""
        return hash_of(self.judge, [self.name, asdict(self.settings)], (), _requests)

    def compare(self, pair: Pair, principles: Sequence[Principle], seed: int) -> Row:
        """A row program with two `Score`s a principle, each of both responses."""
        ratios_P2 = yield from self.ratios(pair.messages, (pair.response_a, pair.response_b), principles)
        if ratios_P2 is None:
            return Opinion(None, TOO_LONG)
        logits = [self.settings.scale * (a - b) for a, b in ratios_P2]
        return Opinion(float(np.mean(logits)), detail={"ratios": ratios_P2, "principles": logits})

    def ratios(self, messages: Sequence[dict], texts: Sequence[str], principles: Sequence[Principle]) -> Row:
        """A row program that returns a list a principle of the log-ratio of every response, in nats.

        An independent judge of one response. None where the judge's context does not hold one.
        """
        end = turn_end_id(self.judge.tokenizer)
        responses = [completion_ids(self.judge.tokenizer, text, end) for text in texts]
        longest = max(map(len, responses))
        ratios_PN = []
        for principle in principles:
            requests = _requests(messages, principle)
            if not all(self.judge.fits(request, longest) for request in requests):
                return None
            keep = yield Score(requests[0], responses)
            broken = yield Score(requests[1], responses)
            ratios_PN.append([self._ratio(kept - lost) for kept, lost in zip(keep, broken, strict=True)])
        return ratios_PN

    def _ratio(self, difference_T) -> float:
        return float(np.mean(difference_T) if self.settings.per_token else np.sum(difference_T))


def _requests(messages, principle, *_) -> list[list[dict]]:
    return [contrast_request(messages, principle, keep) for keep in (True, False)]
