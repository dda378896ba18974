"""What a row may ask of the sampler, and what it gets back."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from cai_jax.config import Sampling


@dataclass(frozen=True)
class Generate:
    """Ask for the next assistant turn of a conversation (a list of {role, content}); answered by a `Sample`.

    `seed` is the row key, 64 bits: with conversation and settings it decides the text.
    """

    conversation: Sequence
    sampling: Sampling = Sampling()
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """Ask for the log-probs of options, each as the next text of a conversation, at temperature 1.

    Answered by a list with an array a option: the log-prob of each of its tokens. An option is a text, or a list of
    token ids. A conversation that ends with an assistant turn is continued inside that turn.
    """

    conversation: Sequence
    options: Sequence


@dataclass(frozen=True)
class Outside:
    """Ask for what `call()` returns: work outside of this program, such as a request over HTTP.

    Calls run in threads while other rows go on, so their results must not depend on their order; where several
    processes run, the first calls for all, and what it returns must be JSON. What a call raises ends the stream.
    """

    call: Callable[[], Any]


@dataclass(frozen=True)
class Sample:
    """One completion. `tokens` and `logprobs` include the stop token; `truncated` says that there was none."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    truncated: bool


# The program of one row: it yields requests, is sent their answers, and returns whatever the row comes to.
Row = Generator[Generate | Score | Outside, Any, Any]
