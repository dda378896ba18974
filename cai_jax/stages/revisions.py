"""The revisions that a round of `critique_revision` draws: what each is by rule, and which of them is taken."""

from cai_jax.chat import encode_text
from cai_jax.config import NO_REVISIONS
from cai_jax.config_rules import rates_revisions
from cai_jax.labelers.examples import log_ratios
from cai_jax.prompts import unlike_answers, worked_answers
from cai_jax.similarity import Index
from cai_jax.text_metrics import classify_response, first_sentences

_UNFIT = (*NO_REVISIONS, "revision_empty")


def told(context, worked: Index, newest: str, critique: str | None, drawn: dict) -> dict:
    """A revision and what can be said of it by rule; `newest` is what it revises, `worked` the worked revisions.

    Whether it repeats something is asked of the whole text that was drawn, the rest of what is kept of it.
    """
    settings = context.config.critique_revision
    kept, whole = _shortened(context, drawn), drawn["text"].strip()
    overlap, _ = worked.nearest(drawn["text"])
    kind = classify_response(kept["text"])
    flags = {
        "revision_truncated": kept["truncated"],
        "revision_empty": not kept["text"].strip(),
        "revision_unchanged": newest.strip() in (whole, kept["text"].strip()),
        "revision_copies_critique": bool(critique and critique.strip()) and whole == critique.strip(),
        "revision_copies_example": overlap >= settings.copy_overlap,
        "revision_degenerate": kind == "degenerate",
    }
    return {"revision": kept, "kind": kind, "flags": flags}


def _shortened(context, revision: dict) -> dict:
    """A revision with no more than `critique_revision.sentences`; what is cut off in time was not truncated."""
    count = context.config.critique_revision.sentences
    text = first_sentences(revision["text"], count) if count else None
    if text is None:
        return revision
    tokens = len(encode_text(context.base.tokenizer, text))
    return revision | {"text": text, "tokens": tokens, "truncated": False}


def compared(constitution, principle) -> tuple:
    """The worked answers of a principle's aim, and those of others, between which draws are told apart."""
    return worked_answers(constitution, [principle]), unlike_answers(constitution, [principle])


def choose(context, sampler, messages: list[dict], principle, drawn: list[dict]):
    """A row program: the place of the draw that worked answers before it make likeliest, and log-ratios.

    The worked answers are those of the principle's aim, as against those of other aims, or none where there are no
    others. A single draw has a ratio where `sft.least_ratio` goes by it.

    A draw that is no revision has no ratio, and is chosen, the first, only where all are such or where the context
    does not hold the worked answers.
    """
    fit = [i for i, each in enumerate(drawn) if not any(each["flags"][flag] for flag in _UNFIT)]
    ratios = None
    if fit and rates_revisions(context.config):
        texts = [drawn[i]["revision"]["text"] for i in fit]
        worked = compared(context.constitution, principle)
        ratios = yield from log_ratios(sampler.model.tokenizer, sampler.fits, *worked, messages, texts, per_token=True)
    if ratios is None:
        return next(iter(fit), 0), {}
    ratios = dict(zip(fit, ratios, strict=True))
    return max(ratios, key=ratios.get), ratios
