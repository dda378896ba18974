"""The model behind a labeler, and what all labelers that ask one have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cai_jax.chat import encode_chat
from cai_jax.constitution import Principle
from cai_jax.labelers.opinion import Opinion, Pair
from cai_jax.labelers.pleading import PLEAS, unpleaded
from cai_jax.provenance import content_hash

TOO_LONG = "too_long"  # the failure of a pair that the judge's context does not hold
_EXAMPLE = Pair("", ({"role": "user", "content": "prompt"},), "first", "second")
_PRINCIPLE = Principle("id", "title", "category", "critique", "revision", "question", None, "")


@dataclass(frozen=True)
class Judge:
    """The model that a labeler asks: tokenizer, hash, and the tokens that a request with its answer may have."""

    tokenizer: Any
    hash: str
    max_length: int
    guard: bool = True  # mask what pleads for a response before the judge reads it

    def read(self, response: str) -> str:
        """A response as the judge is shown it."""
        return unpleaded(response) if self.guard else response

    def masks(self, pair: Pair) -> bool:
        """Whether the guard changes a response of the pair."""
        return any(self.read(text) != text for text in (pair.response_a, pair.response_b))

    def fits(self, conversation: Sequence[dict], new_tokens: int) -> bool:
        """Whether the conversation and so many tokens after it stay within the judge's context."""
        continued = conversation[-1]["role"] == "assistant"
        tokens = encode_chat(self.tokenizer, list(conversation), not continued, continue_final=continued)
        return len(tokens) + new_tokens <= self.max_length


def hash_of(judge: Judge, settings: Sequence, preamble: Sequence[dict], request: Callable) -> str:
    """The hash of a labeler: of its model, its settings, and its texts.

    The texts are those of `request(messages, principle, response_a, response_b)` for one example.
    """
    example = request(_EXAMPLE.messages, _PRINCIPLE, _EXAMPLE.response_a, _EXAMPLE.response_b)
    guarded = [judge.read(plea("")) for plea in PLEAS.values()]
    return content_hash([judge.hash, guarded, list(settings), list(preamble), example])


def in_orders(judge: Judge, pair: Pair, principles: Sequence[Principle], both: bool, ask: Callable):
    """A row program: the log-odds of response_a from each order of showing and each principle, `[orders, principles]`.

    `ask(first, second, principle)` is a row program that returns the log-odds of the response shown first, or None
    where the pair does not fit; then the result is None, too.
    """
    a, b = judge.read(pair.response_a), judge.read(pair.response_b)
    shown = [(a, b, 1.0), (b, a, -1.0)]
    orders = []
    for first, second, sign in shown[: 2 if both else 1]:
        logits = []
        for principle in principles:
            logit = yield from ask(first, second, principle)
            if logit is None:
                return None
            logits.append(sign * logit)
        orders.append(logits)
    return orders


def opinion_of(logits_OP: list[list[float]] | None, limit: float = float("inf"), **detail) -> Opinion:
    """The mean over principles and orders, in logit space; swapping the responses changes its sign and nothing else.

    `detail["orders"]` has the log-odds of response_a in each order, `detail["principles"]` those of each principle.
    """
    if logits_OP is None:
        return Opinion(None, TOO_LONG)
    orders = [float(np.mean(logits)) for logits in logits_OP]
    principles = [float(np.mean(logits)) for logits in zip(*logits_OP, strict=True)]
    return Opinion(float(np.mean(orders)), limit=limit, detail={"orders": orders, "principles": principles, **detail})
