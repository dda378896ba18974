"""A judge behind an HTTP endpoint: its verdict in both orders, from log-probs where the server tells them."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict

from cai_jax.config import Sampling
from cai_jax.constitution import Principle
from cai_jax.endpoint import EXTERNAL, Client, question
from cai_jax.labelers.opinion import Opinion, Pair
from cai_jax.labelers.pleading import PLEAS, unpleaded
from cai_jax.prompts import OptionFormat, preference_preamble, preference_request
from cai_jax.provenance import content_hash, row_seed
from cai_jax.replies import Reply
from cai_jax.sampler import Outside, Row

UNPARSABLE = "unparsable"  # the failure of a text that is no verdict
_ANSWER = OptionFormat("", ("A", "B"), "", (0, 1))  # a chat of its own: the answer is one letter in a turn of its own
_ONE_LETTER = "Write that letter alone."
_VERDICT = re.compile(r"[*\s]*\(?([AB])\)?[*.\s]*")
_EXAMPLE = Pair("", ({"role": "user", "content": "prompt"},), "first", "second")
_PRINCIPLE = Principle("id", "title", "category", "critique", "revision", "question", None, "")


class ExternalLabeler:
    """Asks the model at an endpoint which response is better, in both orders under each principle.

    The log-odds of an order are those of the letters at the place of the verdict where the server tells log-probs, else
    (a + 1/2) / (b + 1/2) from the counts of verdicts read from `endpoint.samples` texts. Opinions are means in logit
    space over both orders, then principles; a principle without a verdict in either order is left out, and a pair
    without any has no opinion. Worked comparisons of the constitution stand before each question.
    """

    name = EXTERNAL
    preamble: Sequence[dict] = ()  # for the sampler, which is asked nothing
    judge = None

    def __init__(self, client: Client, constitution, guard: bool = True):
        self.client = client
        self._read = unpleaded if guard else str
        self._shown = [_brief(turn) for turn in preference_preamble(constitution, _ANSWER)]
        settings = client.settings
        example = self._question(_EXAMPLE.messages, _PRINCIPLE, _EXAMPLE.response_a, _EXAMPLE.response_b)
        read = [self._read(plea("")) for plea in PLEAS.values()]
        asking = [settings.logprobs, settings.samples, settings.verdict_tokens, settings.limit_field]
        self.hash = content_hash([client.hash, *asking, example, read])

    def compare(self, pair: Pair, principles: Sequence[Principle], seed: int) -> Row:
        """A row program of `Outside` requests alone; returns an `Opinion`.

        `detail`: "orders", the mean log-odds of response_a where it is shown first and second; "principles", the
        log-odds under each, null where it is left out; "asked", an entry a principle and order with its texts,
        log-probs of A and B, and failure; "usage", tokens read and written; "flags", "left_out": some principle had no
        verdict; "guarded", words of a response were masked.
        """
        a, b = self._read(pair.response_a), self._read(pair.response_b)
        shown = (("ab", a, b, 1.0), ("ba", b, a, -1.0))
        asked, found = [], {}
        for principle in principles:
            logits = []
            for order, first, second, sign in shown:
                messages = self._question(pair.messages, principle, first, second)
                verdict = yield from self._verdict(messages, row_seed(seed, principle.id, order))
                asked.append({"principle": principle.id, "order": order, **verdict})
                if verdict["logit"] is not None:
                    logits.append(sign * verdict["logit"])
            if len(logits) == 2:
                found[principle.id] = logits
        detail = {"asked": asked, "usage": [sum(one["usage"][i] for one in asked) for i in (0, 1)]}
        guarded = (a, b) != (pair.response_a, pair.response_b)
        detail["flags"] = {"left_out": len(found) < len(principles), "guarded": guarded}
        if not found:
            return Opinion(None, next(one["failure"] for one in asked if one["failure"]), detail)
        orders = [sum(column) / len(found) for column in zip(*found.values(), strict=True)]
        each = [sum(found[one.id]) / 2 if one.id in found else None for one in principles]
        return Opinion(sum(orders) / 2, detail=detail | {"orders": orders, "principles": each})

    def _verdict(self, messages, seed: int) -> Row:
        """One order: log-odds of the response shown first (None and why), what they were made of, tokens used."""
        settings, replies = self.client.settings, []
        if settings.logprobs:
            greedy = Sampling(temperature=0.0, max_new_tokens=settings.verdict_tokens)
            reply = yield from ask(self.client, question(settings, messages, greedy, logprobs=settings.logprobs))
            replies.append(reply)
            if (told := verdict_logprobs(reply)) is not None:
                return _found(replies, told["A"] - told["B"], logprobs=[told["A"], told["B"]])
        if not replies or (settings.samples > 1 and not replies[0].failure):
            drawn = Sampling(max_new_tokens=settings.verdict_tokens)
            replies = []
            for place in range(settings.samples):
                body = question(settings, messages, drawn, row_seed(seed, "verdict", str(place)))
                replies.append((yield from ask(self.client, body)))
        verdicts = [parse_verdict(reply.text) for reply in replies if not reply.failure]
        a, b = verdicts.count("A"), verdicts.count("B")
        if a + b == 0:
            return _found(replies, None, next((r.failure for r in replies if r.failure), UNPARSABLE))
        return _found(replies, math.log((a + 0.5) / (b + 0.5)))

    def _question(self, messages, principle, first, second) -> list[dict]:
        asked, _ = preference_request(list(messages), principle, first, second, _ANSWER)
        return [*self._shown, _brief(asked)]


def _found(replies: list[Reply], logit: float | None, failure: str = "", logprobs: Sequence[float] = ()) -> dict:
    texts = [reply.text for reply in replies]
    usage = [sum(reply.read or 0 for reply in replies), sum(reply.written or 0 for reply in replies)]
    made_of = {"logprobs": list(logprobs), "texts": texts, "model": replies[-1].model, "usage": usage}
    return {"logit": logit, "failure": failure, **made_of}


def ask(client: Client, body: dict) -> Row:
    """A row program that asks the endpoint one question; returns a `Reply`."""
    return Reply(**(yield Outside(lambda: asdict(client.ask(body)))))


def parse_verdict(text: str) -> str | None:
    """"A" or "B" where a text is that letter, in brackets or bold or not, and nothing else; None for any other text."""
    found = _VERDICT.fullmatch(text)
    return found[1] if found else None


def verdict_logprobs(reply: Reply) -> dict[str, float] | None:
    """Log-probs of "A" and "B" at the place of the verdict; None where the text is no verdict or none are told.

    Tokens that write the same letter are added up. A letter that is not among the likeliest tokens can be no likelier
    than the last of these, and counts as that.
    """
    if reply.failure or parse_verdict(reply.text) is None:
        return None
    for token, entries in reply.logprobs:
        if parse_verdict(token) is None:
            continue
        letters = {letter: [lp for text, lp in entries if parse_verdict(text) == letter] for letter in "AB"}
        if len(entries) < 2:
            return None
        least = min(lp for _, lp in entries)
        return {letter: _log_sum(lps) if lps else least for letter, lps in letters.items()}
    return None


def _log_sum(logprobs: list[float]) -> float:
    most = max(logprobs)
    return most + math.log(sum(math.exp(lp - most) for lp in logprobs))


def _brief(turn: dict) -> dict:
    """A question asks for one letter alone; other turns stay."""
    return turn | {"content": f"{turn['content']} {_ONE_LETTER}"} if turn["role"] == "user" else turn
