"""Option log-probs (Bai et al. 2022, section 4.1): the judge's log-odds of (A) over (B) as its next token."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from cai_jax.constitution import Principle
from cai_jax.labelers.judge import Judge, hash_of, in_orders, opinion_of
from cai_jax.labelers.opinion import Pair
from cai_jax.prompts import OptionFormat, preference_request
from cai_jax.sampler import Row, Score


@dataclass(frozen=True)
class Options:
    """Compares two responses by the log-probs of (A) and (B).

    Small judges favour a place over a text (Lee et al. 2023, arXiv 2309.00267, section 2.1), so with `both_orders`
    each response is shown in both places. `preamble` holds worked comparisons.
    """

    judge: Judge
    answer: OptionFormat
    both_orders: bool = True
    preamble: Sequence[dict] = ()
    name: str = "options"

    @cached_property
    def hash(self) -> str:
        """Of all that decides its opinions beside the pair and the principles."""
        return hash_of(self.judge, [self.name, self.both_orders], self.preamble, self._request)

    def compare(self, pair: Pair, principles: Sequence[Principle], seed: int) -> Row:
        """A row program with one `Score` for each order and principle; all principles of an order share the pair."""
        logprobs = []

        def ask(first, second, principle):
            request = [*self.preamble, *self._request(pair.messages, principle, first, second)]
            if not self.judge.fits(request, 1):
                return None
            found = yield Score(request, [[token] for token in self.answer.ids])
            logprobs.append([float(logprob) for (logprob,) in found])
            return logprobs[-1][0] - logprobs[-1][1]

        logits_OP = yield from in_orders(self.judge, pair, principles, self.both_orders, ask)
        return opinion_of(logits_OP, logprobs=logprobs, flags={"guarded": self.judge.masks(pair)})

    def _request(self, messages, principle, first, second) -> list[dict]:
        return preference_request(messages, principle, first, second, self.answer)
