"""Ratings from 1 to 10 (direct RLAIF: Lee et al. 2023, arXiv 2309.00267, section 2.2.2): the judge's expectation."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from cai_jax import config
from cai_jax.constitution import Principle
from cai_jax.labelers.judge import TOO_LONG, Judge, hash_of
from cai_jax.labelers.opinion import Opinion, Pair
from cai_jax.prompts import RatingFormat, rating_request
from cai_jax.sampler import Row, Score


@dataclass(frozen=True)
class Rating:
    """Rates each response alone and compares the expectations; their order cannot matter."""

    judge: Judge
    form: RatingFormat
    settings: config.Rating = config.Rating()
    preamble: Sequence[dict] = ()
    name: str = "rating"

    @cached_property
    def hash(self) -> str:
        """Of all that decides its opinions beside the pair and the principles."""
        settings = [self.name, asdict(self.settings)]
        return hash_of(self.judge, settings, (), self._request)

    def compare(self, pair: Pair, principles: Sequence[Principle], seed: int) -> Row:
        """A row program with a `Score` for each response and principle."""
        ratings = []
        for response in (pair.response_a, pair.response_b):
            ratings.append((yield from self.rate(pair.messages, response, principles)))
            if ratings[-1] is None:
                return Opinion(None, TOO_LONG)
        detail = {"ratings": ratings, "flags": {"guarded": self.judge.masks(pair)}}
        return Opinion(self.settings.scale * (ratings[0] - ratings[1]), detail=detail)

    def rate(self, messages: Sequence[dict], response: str, principles: Sequence[Principle]) -> Row:
        """A row program that returns the rating of one response, 1 to 10, the mean over the principles.

        A reward, or an independent judge of one. None where the response does not fit the judge's context.
        """
        expectations = []
        for principle in principles:
            request = self._request(messages, principle, self.judge.read(response))
            if not self.judge.fits(request, max(map(len, self.form.ids))):
                return None
            expectations.append(expectation(self.form.ids, (yield Score(request, self.form.ids))))
        return float(np.mean(expectations))

    def _request(self, messages, principle, response, *_) -> list[dict]:
        return rating_request(messages, response, principle, self.form)


def expectation(ids: Sequence[tuple[int, ...]], logprobs: Sequence[np.ndarray]) -> float:
    """The expected number, 1 to len(ids), given that the text goes on with one of them.

    ids: the tokens of each number. logprobs: for each number the log-prob of each of its tokens.
    A text that goes on with "10" goes on with "1", too, and means 10: where the tokens of a number begin those of
    longer ones, the probability of these is taken off.
    """
    begins = [float(np.exp(np.sum(np.asarray(tokens, np.float64)))) for tokens in logprobs]
    means = [
        begun - sum(longer for other, longer in zip(ids, begins, strict=True) if _continues(other, tokens))
        for tokens, begun in zip(ids, begins, strict=True)
    ]
    means = np.maximum(means, 0.0)  # a difference of rounded numbers
    return float(np.arange(1, len(ids) + 1) @ means / means.sum())


def _continues(longer: tuple[int, ...], tokens: tuple[int, ...]) -> bool:
    return len(longer) > len(tokens) and longer[: len(tokens)] == tokens
