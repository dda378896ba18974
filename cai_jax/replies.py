"""What an OpenAI-compatible server answers to one question, read so that nothing in it is taken on trust."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Reply:
    """What came back for one question, ready for JSON.

    `failure` names what is wrong with it: "malformed" (no JSON object), "no_choices", "no_text", "filtered", or
    "http_STATUS" where the server has refused the question; `text` is empty then.
    """

    text: str = ""
    truncated: bool = False  # it ended at the limit of tokens
    model: str = ""  # as the server names it
    read: int | None = None  # tokens of the question, as the server counts
    written: int | None = None  # tokens of the answer
    logprobs: Sequence = ()  # a token of the text: [token, [[token that may stand here, its log-prob], ...]]
    failure: str = ""


def parse_reply(content: bytes) -> Reply:
    """The reply in the body of an answer; what is missing or of a wrong kind becomes a failure or is left out."""
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        return Reply(failure="malformed")
    if not isinstance(answer, dict):
        return Reply(failure="malformed")
    model = answer.get("model")
    about = Reply(model=model if isinstance(model, str) else "", **_usage(answer.get("usage")))
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return replace(about, failure="no_choices")
    message, finish = choices[0].get("message"), choices[0].get("finish_reason")
    text = message.get("content") if isinstance(message, dict) else None
    if finish == "content_filter":
        return replace(about, failure="filtered")
    if not isinstance(text, str):
        return replace(about, failure="no_text")
    return replace(about, text=text, truncated=finish == "length", logprobs=_logprobs(choices[0].get("logprobs")))


def _usage(usage) -> dict:
    """The tokens of question and answer, as far as the server tells them."""
    found = {}
    for name, theirs in (("read", "prompt_tokens"), ("written", "completion_tokens")):
        value = usage.get(theirs) if isinstance(usage, dict) else None
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53:
            found[name] = value
    return found


def _logprobs(found) -> list:
    places = found.get("content") if isinstance(found, dict) else None
    listed = []
    for place in places if isinstance(places, list) else []:
        if not isinstance(place, dict) or not isinstance(place.get("token"), str):
            return []
        top = place.get("top_logprobs")
        entries = [place, *(top if isinstance(top, list) else [])]
        listed.append([place["token"], list({
            entry["token"]: [entry["token"], float(entry["logprob"])] for entry in entries if _is_logprob(entry)
        }.values())])  # fmt: skip
    return listed


def _is_logprob(entry) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("token"), str):
        return False
    value = entry.get("logprob")
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9  # not NaN, not infinite
