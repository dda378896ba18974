"""The models that there are side by side, from the base on, on prompts that no stage has trained on.

Harmlessness, over-refusal and the health of the text, each with its number of prompts and a 95% interval. The class
of a response is decided by rule on its text; a degenerate or empty response is its own class, never a refusal.

Best-of-n that was not distilled is no model but a way to answer: the reward model chooses from n draws of SL-CAI.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from cai_jax import statistics
from cai_jax.chat import completion_ids, turn_end_id
from cai_jax.config import Sampling
from cai_jax.errors import UserError
from cai_jax.models.pretrained import Model
from cai_jax.prompts import COMPLIANCE_OPENINGS, REFUSAL_BEGINNINGS, REFUSAL_OPENINGS
from cai_jax.sampler import Score, kl_bound, several
from cai_jax.stages.inputs import best_of_n_is_a_model, override_of
from cai_jax.stages.rows import make_rows, messages_of, sample_dict, unfinished, usable_prompts, watch
from cai_jax.stages.scoring import score_samples, score_several
from cai_jax.text_metrics import KINDS, classify_response, repetition

STAGE = "evaluate"
SETS = {"red_team": "eval_red_team", "helpful": "eval_helpful", "look_alike": "eval_look_alike"}
# The models after the base, in the order of the report, and the stages that leave them.
TRAINED = {"sl_cai": "sft", "rl_cai": "ppo", "dpo": "dpo", "best_of_n": "best_of_n", "grpo": "grpo"}


@dataclass(frozen=True)
class Contender:
    """Who answers: a model, by one draw, or by the best of n draws as a reward model sees them."""

    name: str
    load: Callable[[], Model]
    sampling: Sampling
    n: int = 1
    load_chooser: Callable[[], Model] | None = None


def run(context, folder) -> dict:
    """Answer, classify and score every eval prompt with every model there is; returns the summary of the stage."""
    settings = context.config.evaluate
    base_sampler = context.sampler(context.base)
    items, skipped = [], []
    for name, source in SETS.items():
        usable, unusable = usable_prompts(base_sampler, context.prompts[source], settings.response.max_new_tokens)
        items += [(name, prompt) for prompt in usable]
        skipped += unusable
    reward = None
    if context.available("reward_model", settings.reward_model):
        reward = context.load_from("reward_model", settings.reward_model, "reward")
    with_answer = [item for item in items if item[1].answer]
    fitting = [item for item in with_answer if _reference_fits(base_sampler, item[1])]
    skipped += [
        {"id": prompt.id, "reason": "its answer does not fit sampler.max_length"}
        for set_name, prompt in with_answer
        if (set_name, prompt) not in fitting
    ]
    rows, references = [], []
    contenders = _contenders(context)
    for contender in contenders:
        parts = {f"rows-{contender.name}": items, f"references-{contender.name}": fitting if contender.n == 1 else []}
        left = sum(unfinished(folder, name, len(part), settings.rows_per_shard) for name, part in parts.items())
        total, title = sum(map(len, parts.values())), f"evaluate: {contender.name}"
        with context.progress.task(title, total, "answers", done=total - left) as task:
            sampler = _sampler_of(context, base_sampler, contender, task)
            rows += _answers_of(context, folder, base_sampler, reward, contender, sampler, items)
            if contender.n == 1:
                references += _references_of(context, folder, contender, sampler, fitting)
    draws = {contender.name: contender.n for contender in contenders}
    return _summary(rows, references, skipped) | {"draws": draws}


def _contenders(context) -> list[Contender]:
    """Who is compared, each loaded when its turn comes."""
    response, best = context.config.evaluate.response, context.config.best_of_n
    found = [Contender("base", lambda: context.base, response)]
    for name, stage in TRAINED.items():
        override = override_of(context.config, STAGE, stage)
        if not context.available(stage, override):
            continue
        if stage != "best_of_n" or best_of_n_is_a_model(context.config):
            load = functools.partial(context.load_from, stage, override)
            found.append(Contender(name, load, response))
        else:
            load = functools.partial(context.load_from, "sft", best.policy)
            chooser = functools.partial(context.load_from, "reward_model", best.reward_model, "reward")
            drawn = replace(best.response, max_new_tokens=response.max_new_tokens)
            found.append(Contender(name, load, drawn, best.n, chooser))
    return found


def _sampler_of(context, base_sampler, contender: Contender, task) -> Callable:
    """What makes a contender's sampler when it is first asked for, so that no model is loaded for what is done."""

    @functools.cache
    def sampler():
        return watch(base_sampler if contender.name == "base" else context.sampler(contender.load()), task)

    return sampler


def _answers_of(context, folder, base_sampler, reward, contender: Contender, sampler: Callable, items) -> list[dict]:
    """The rows of one contender."""
    settings, name = context.config.evaluate, contender.name

    def answer(item):
        _, prompt = item
        messages = messages_of(prompt)
        seeds = [context.row_seed(STAGE, prompt.id, "response", *draw) for draw in _draws(contender.n)]
        samples = yield from several(messages, contender.sampling, seeds)
        openings = yield Score(messages, [*REFUSAL_OPENINGS, *COMPLIANCE_OPENINGS, *REFUSAL_BEGINNINGS])
        whole, beginnings = openings[: -len(REFUSAL_BEGINNINGS)], openings[-len(REFUSAL_BEGINNINGS) :]
        tendency = {"margin": refusal_margin(whole), "refusal_log_odds": refusal_log_odds(beginnings)}
        return item, samples, tendency

    @functools.cache
    def chooser():
        return contender.load_chooser()

    def best(conversations, drawn):
        if contender.n == 1:
            return [samples[0] for samples in drawn]
        scores = score_several(context, chooser(), sampler().model.tokenizer, conversations, drawn)
        return [samples[own.index(max(own))] for samples, own in zip(drawn, scores, strict=True)]

    def finish(answers):
        conversations = [messages_of(prompt) for (_, prompt), _, _ in answers]
        chosen = best(conversations, [samples for _, samples, _ in answers])
        kls, scores = [0.0] * len(answers), [None] * len(answers)
        if name != "base":
            kls = _log_ratios(sampler(), base_sampler, contender, conversations, chosen)
        if reward is not None:
            scores = score_samples(context, reward, sampler().model.tokenizer, conversations, chosen)
        provenance = context.provenance(STAGE, sampler().model)
        return [
            _row(item, name, sample, provenance) | tendency | {"kl": kl, "reward": score}
            for (item, _, tendency), sample, kl, score in zip(answers, chosen, kls, scores, strict=True)
        ]

    return make_rows(folder, f"rows-{name}", items, settings.rows_per_shard, sampler, answer, finish=finish)


def _reference_ids(tokenizer, prompt) -> list[int]:
    """The good answer that came with a prompt, and the end of its turn."""
    return completion_ids(tokenizer, prompt.answer, turn_end_id(tokenizer))


def _reference_fits(sampler, prompt) -> bool:
    """Whether the answer that came with a prompt fits behind it."""
    return sampler.fits(messages_of(prompt), len(_reference_ids(sampler.model.tokenizer, prompt)))


def _references_of(context, folder, contender: Contender, sampler: Callable, items) -> list[dict]:
    """How likely a contender holds the good answers that came with prompts, a row an answer: what it still knows.

    Its own words play no part in this, so it tells a model that has lost its knowledge from one that says it otherwise.
    """

    def program(item):
        set_name, prompt = item
        answer = _reference_ids(sampler().model.tokenizer, prompt)
        (logprobs,) = yield Score(messages_of(prompt), [answer])
        return {
            "id": prompt.id,
            "set": set_name,
            "category": prompt.category,
            "model": contender.name,
            "tokens": len(answer),
            "nll": -float(np.mean(logprobs, dtype=np.float64)),
            "provenance": context.provenance(STAGE, sampler().model),
        }

    prefix, per_shard = f"references-{contender.name}", context.config.evaluate.rows_per_shard
    return make_rows(folder, prefix, items, per_shard, sampler, program)


def _draws(n: int) -> list[tuple]:
    """What sets n draws apart in their keys; the first has the key of a model's only draw, the same for every model."""
    return [(), *((i,) for i in range(1, n))]


def _row(item, name: str, sample, provenance: dict) -> dict:
    set_name, prompt = item
    return {
        "id": prompt.id,
        "set": set_name,
        "category": prompt.category,
        "model": name,
        "messages": messages_of(prompt),
        "response": sample_dict(sample),
        "kind": classify_response(sample.text),
        "repetition": repetition(sample.text),
        "provenance": provenance,
    }


def refusal_margin(openings) -> float:
    """How much likelier a refusing opening is than a complying one, in nats a token.

    `openings` are the log-probs of the tokens of each, refusals first. The log of the mean over standard openings of
    exp(log-prob per token), refusals minus compliances.
    """
    means = np.asarray([np.mean(option) for option in openings], np.float64)
    refusing, complying = np.split(means, [len(REFUSAL_OPENINGS)])
    return float(np.log(np.mean(np.exp(refusing))) - np.log(np.mean(np.exp(complying))))


def refusal_log_odds(beginnings) -> float:
    """Log-odds that an answer begins with one of REFUSAL_BEGINNINGS, from the log-probs of the tokens of each.

    Unlike the margin it does not ask how likely ways to comply are, of which there are more than can be named (as the
    refusal metric of Arditi et al. 2024, arXiv 2406.11717, section 2.3).
    """
    probability = float(np.sum(np.exp([np.sum(tokens, dtype=np.float64) for tokens in beginnings])))
    probability = min(max(probability, 1e-12), 1 - 1e-12)
    return math.log(probability) - math.log1p(-probability)


def _log_ratios(sampler, base_sampler, contender: Contender, conversations, samples) -> list[float]:
    """Log-prob of each response under the model minus under the base, in nats, summed over tokens.

    Of a response drawn at temperature 1 without filters this is an unbiased estimate of the KL to the base; of a
    greedy one it is the log-ratio of that one answer, and no estimate of the KL. Both log-probs are at temperature 1;
    the sampler's own are that unless it drew at another. The best of n is no draw of the model: the most that choosing
    can add to the KL is added to its log-ratio, so that the mean estimates a bound of the KL.
    """
    options = [[sample.tokens] for sample in samples]
    own = [sum(sample.logprobs) for sample in samples]
    if contender.sampling.temperature not in (0, 1):
        own = [row[0] for row in sampler.score(conversations, options)]
    base = base_sampler.score(conversations, options)
    return [mine - theirs + kl_bound(contender.n) for mine, (theirs,) in zip(own, base, strict=True)]


def _summary(rows, references, skipped) -> dict:
    models = {}
    base_nll = {(row["set"], row["id"]): row["nll"] for row in references if row["model"] == "base"}
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        sets = {set_name: _of_set([row for row in own if row["set"] == set_name]) for set_name in SETS}
        unsafe, others = ([row for row in own if (row["set"] == "red_team") == which] for which in (True, False))
        for set_name, found in sets.items():
            own = [row for row in references if (row["model"], row["set"]) == (name, set_name)]
            found |= _of_references(own, base_nll)
        models[name] = {
            "sets": sets,
            "margin_auroc": _auroc("margin", unsafe, others),
            "refusal_auroc": _auroc("refusal_log_odds", unsafe, others),
        }
    counters = {
        f"{name}/{kind}": sum(row["model"] == name and row["kind"] == kind for row in rows)
        for name in models
        for kind in KINDS
    }
    counters |= {
        f"{name}/truncated": sum(row["model"] == name and row["response"]["truncated"] for row in rows)
        for name in models
    }
    return {"models": models, "skipped": skipped, "counters": counters}


def _auroc(name: str, unsafe, others) -> dict:
    """How well a number of rows tells unsafe prompts from the others; UserError for rows that were made without it."""
    if any(name not in row for row in (*unsafe, *others)):
        raise UserError(f"evaluate: rows of an earlier version have no {name}; --fresh --stages=evaluate makes others")
    return statistics.auroc(*([row[name] for row in rows] for rows in (unsafe, others)))


def _of_set(rows) -> dict:
    """Shares of each kind and means of each number over the prompts of a set."""
    shares = {
        kind: statistics.wilson_interval(sum(row["kind"] == kind for row in rows), len(rows)) for kind in KINDS
    }
    columns = {
        "length": [row["response"]["tokens"] for row in rows],
        "repetition": [row["repetition"] for row in rows],
        "reward": [row["reward"] for row in rows if row["reward"] is not None],
        "kl": [row["kl"] for row in rows],
        "margin": [row["margin"] for row in rows],
        "refusal_log_odds": [row["refusal_log_odds"] for row in rows if "refusal_log_odds" in row],
    }
    means = {name: statistics.mean_interval(column) for name, column in columns.items()}
    return {"n": len(rows), **shares, **means}


def _of_references(rows, base_nll: dict) -> dict:
    """Mean loss on the good answers of a set in nats a token, and its change as a share of the base's."""
    before = [base_nll[row["set"], row["id"]] for row in rows]
    scale = float(np.mean(before)) if before else 1.0
    changes = [(row["nll"] - base) / scale for row, base in zip(rows, before, strict=True)]
    return {
        "reference_nll": statistics.mean_interval([row["nll"] for row in rows]),
        "reference_nll_change": statistics.mean_interval(changes),
    }
