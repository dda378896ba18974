"""What a labeler is given, what it says, and what it is: one interface, whatever stands behind it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cai_jax.constitution import Principle
from cai_jax.sampler import Row


@dataclass(frozen=True)
class Pair:
    """Two responses to one conversation."""

    id: str
    messages: Sequence[dict]  # {role, content}, the last one a user's
    response_a: str
    response_b: str


@dataclass(frozen=True)
class Opinion:
    """What a labeler says of a pair.

    `logit` is the log-odds that response_a is the better one, in nats; None where the labeler has no opinion, and
    `failure` names why ("too_long", "unparsable", ...): it is counted, never replaced by a guess. `detail` is what the
    opinion was made of, ready for JSON: log-probs of both orders, principles, the text of a verdict. Two of its names
    mean the same everywhere: "orders", the log-odds of response_a when it is shown first and (if asked) second, of
    labelers that show the responses side by side; "flags", {name: bool}, which are counted.
    """

    logit: float | None
    failure: str = ""
    detail: dict = field(default_factory=dict)
    limit: float = math.inf  # of a label's log-odds made of this opinion, at whatever temperature


class Labeler(Protocol):
    """Something that compares two responses under principles.

    `hash` is of all that decides its opinions beside the pair and the principles: model, texts, settings. `preamble` is
    the conversation start that most of its requests share; the sampler runs it once. `judge` is the model that it asks
    of the sampler; None where it asks none. One that goes by
    principles of its own, whatever it is asked about, has them as `own_principles`; one whose requests start according
    to the principles has `starts(asked)`: the starts to share, for the principles of all pairs.
    """

    name: str
    hash: str
    preamble: Sequence[dict]
    judge: object | None

    def compare(self, pair: Pair, principles: Sequence[Principle], seed: int) -> Row:
        """A row program that asks the sampler what it needs and returns an `Opinion`."""
        ...
