"""Examples: how much likelier a response is after the constitution's worked answers than without them.

A small model that cannot say which response keeps a principle still takes up the manner of answers that it has just
read. Like `contrast` this compares log-probs of the responses themselves under two contexts; here the better one shows
good answers in place of asking for them, so nothing need be understood of a principle's wording.
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
from cai_jax.sampler import Row, Score


@dataclass(frozen=True)
class Examples:
    """Compares log p(response | worked answers, prompt) - log p(response | prompt) of two responses.

    The token that ends the turn belongs to a response. The worked answers are the same for all pairs, so it
    goes by their principles, whichever were drawn for a pair.
    """

    judge: Judge
    settings: config.Examples
    preamble: Sequence[dict]
    own_principles: Sequence[Principle]  # of the worked answers
    name: str = "examples"

    @cached_property
    def hash(self) -> str:
        """Of all that decides its opinions beside the pair."""
        return hash_of(self.judge, [self.name, asdict(self.settings)], self.preamble, lambda messages, *_: messages)

    def compare(self, pair: Pair, principles: Sequence[Principle], seed: int) -> Row:
        """A row program with two `Score`s, each of both responses."""
        end = turn_end_id(self.judge.tokenizer)
        responses = [completion_ids(self.judge.tokenizer, text, end) for text in (pair.response_a, pair.response_b)]
        shown = [*self.preamble, *pair.messages]
        if not self.judge.fits(shown, max(map(len, responses))):
            return Opinion(None, TOO_LONG)
        after = yield Score(shown, responses)
        without = yield Score(pair.messages, responses)
        summed = np.mean if self.settings.per_token else np.sum
        a, b = (float(summed(x - y)) for x, y in zip(after, without, strict=True))
        return Opinion(self.settings.scale * (a - b), detail={"ratios": [a, b]})
