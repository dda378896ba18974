"""Chain of thought, then a verdict (Bai et al. 2022, section 4.1)."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from cai_jax import config
from cai_jax.constitution import Principle
from cai_jax.labelers.judge import Judge, hash_of, in_orders, opinion_of
from cai_jax.labelers.opinion import Pair
from cai_jax.prompts import OptionFormat, reasoning_request, verdict_request
from cai_jax.provenance import row_seed
from cai_jax.sampler import Generate, Row, Score


@dataclass(frozen=True)
class Thought:
    """Lets the judge reason, then takes its log-odds of (A) over (B).

    The verdict is scored, not parsed, so that no reasoning can leave it open; one that is empty or cut at its limit is
    a flag. The opinion's `limit` holds labels within the clamp.
    """

    judge: Judge
    answer: OptionFormat
    settings: config.Thought = config.Thought()
    both_orders: bool = True
    preamble: Sequence[dict] = ()
    name: str = "thought"

    @cached_property
    def hash(self) -> str:
        """Of all that decides its opinions beside the pair and the principles."""
        settings = [self.name, self.both_orders, asdict(self.settings)]
        return hash_of(self.judge, settings, self.preamble, self._verdict)

    def compare(self, pair: Pair, principles: Sequence[Principle], seed: int) -> Row:
        """A row program with a `Generate` and a `Score` for each order and principle.

        What is drawn depends on what is shown and on the seed, not on which response is called A.
        """
        reasonings = []
        sampling = self.settings.reasoning

        def ask(first, second, principle):
            request = reasoning_request(pair.messages, principle, first, second)
            unthought = verdict_request(request, "", principle, self.answer)
            if not self.judge.fits(unthought, sampling.max_new_tokens + 1):
                return None
            thought = yield Generate(request, sampling, row_seed(seed, self.name, principle.id))
            verdict = verdict_request(request, thought.text, principle, self.answer)
            if not self.judge.fits(verdict, 1):  # its text may have more tokens than were drawn
                return None
            (of_first,), (of_second,) = yield Score(verdict, [[token] for token in self.answer.ids])
            reasonings.append(thought)
            return float(of_first - of_second)

        logits_OP = yield from in_orders(self.judge, pair, principles, self.both_orders, ask)
        flags = {
            "reasoning_truncated": any(thought.truncated for thought in reasonings),
            "reasoning_empty": any(not thought.text.strip() for thought in reasonings),
            "guarded": self.judge.masks(pair),
        }
        most = self.settings.most
        limit = math.log(most / (1 - most)) if most < 1 else math.inf
        return opinion_of(logits_OP, limit, reasoning=[thought.text for thought in reasonings], flags=flags)

    def _verdict(self, messages, principle, first, second) -> list[dict]:
        request = reasoning_request(messages, principle, first, second)
        return verdict_request(request, "", principle, self.answer)
