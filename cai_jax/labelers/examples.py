"""Examples: how much likelier a response is after the constitution's worked answers than after others, or without.

A small model that cannot say which response keeps a principle still takes up the manner of answers that it has just
read. Like `contrast` this compares log-probs of the responses themselves under two contexts; here the better one shows
good answers in place of asking for them, so nothing need be understood of a principle's wording. Where the constitution
has worked answers of two aims, those of the other aim are the second context: against none, whatever is short and
written in their manner gains, a refusal of a harmless request too (docs/results.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from cai_jax import config
from cai_jax.chat import completion_ids, turn_end_id
from cai_jax.constitution import Constitution, Principle
from cai_jax.labelers.judge import TOO_LONG, Judge, hash_of
from cai_jax.labelers.opinion import Opinion, Pair
from cai_jax.prompts import unlike_answers, worked_answers
from cai_jax.provenance import content_hash
from cai_jax.sampler import Row, Score


@dataclass(frozen=True)
class Examples:
    """Compares log p(response | worked answers, prompt) - log p(response | others, prompt) of two responses.

    The token that ends the turn belongs to a response. The worked answers are those of the aims of a pair's principles,
    the others those of other aims, none where there are no others. Where the constitution says no aims they are the
    same for all pairs, so it goes by their principles, whichever were drawn for a pair.
    """

    judge: Judge
    settings: config.Examples
    constitution: Constitution
    name: str = "examples"

    @property
    def own_principles(self) -> Sequence[Principle]:
        """Those of the worked answers where all pairs are judged by the same ones; else none."""
        named = dict.fromkeys(shot.principle for shot in self.constitution.critique_few_shots)
        principles = [self.constitution.principle(name) for name in named]
        return [] if len({principle.aim for principle in principles}) > 1 else principles

    @property
    def preamble(self) -> Sequence[dict]:
        """All worked answers."""
        return worked_answers(self.constitution)

    def starts(self, asked: Sequence[Sequence[Principle]]) -> list[Sequence[dict]]:
        """The worked answers before pairs under these principles, and those that they are against."""
        by_ids = {tuple(principle.id for principle in principles): principles for principles in asked}
        starts = [worked for principles in by_ids.values() for worked in self._worked(principles)]
        return list({content_hash(worked): worked for worked in starts if worked}.values())

    def _worked(self, principles: Sequence[Principle]) -> tuple[Sequence[dict], Sequence[dict]]:
        """The worked answers of principles, and those of others."""
        return worked_answers(self.constitution, principles), unlike_answers(self.constitution, principles)

    @cached_property
    def hash(self) -> str:
        """Of all that decides its opinions beside the pair."""
        settings = [self.name, asdict(self.settings)]
        if len(of_aim := {p.aim: self._worked([p])[0] for p in self.constitution.principles}) > 1:
            settings.append(of_aim)
        return hash_of(self.judge, settings, self.preamble, lambda messages, *_: messages)

    def compare(self, pair: Pair, principles: Sequence[Principle], seed: int) -> Row:
        """A row program with two `Score`s, each of both responses."""
        texts = pair.response_a, pair.response_b
        worked = self._worked(principles)
        ratios = yield from log_ratios(
            self.judge.tokenizer, self.judge.fits, *worked, pair.messages, texts, self.settings.per_token
        )
        if ratios is None:
            return Opinion(None, TOO_LONG)
        return Opinion(self.settings.scale * (ratios[0] - ratios[1]), detail={"ratios": ratios})

    def rate(self, messages: Sequence[dict], response: str, principles: Sequence[Principle]) -> Row:
        """A row program that returns what `compare` takes the difference of, for one response: a reward, in nats.

        None where the response does not fit the judge's context.
        """
        worked = self._worked(principles)
        ratios = yield from log_ratios(
            self.judge.tokenizer, self.judge.fits, *worked, messages, [response], self.settings.per_token
        )
        return None if ratios is None else self.settings.scale * ratios[0]


def log_ratios(
    tokenizer,
    fits: Callable[[Sequence[dict], int], bool],
    worked: Sequence[dict],
    unlike: Sequence[dict],
    messages: Sequence[dict],
    texts: Sequence[str],
    per_token: bool,
) -> Row:
    """A row program that returns log p(text | worked, messages) - log p(text | unlike, messages) of each text, in nats.

    `fits` says whether a conversation and so many tokens after it stay within the context. None where they do not.
    """
    end = turn_end_id(tokenizer)
    options = [completion_ids(tokenizer, text, end) for text in texts]
    shown = [*worked, *messages], [*unlike, *messages]
    if not all(fits(conversation, max(map(len, options))) for conversation in shown):
        return None
    after = yield Score(shown[0], options)
    against = yield Score(shown[1], options)
    summed = np.mean if per_token else np.sum
    return [float(summed(x - y)) for x, y in zip(after, against, strict=True)]
