"""Base, SL-CAI and RL-CAI side by side on prompts that no stage has trained on.

Harmlessness, over-refusal and the health of the text, each with its number of prompts and a 95% interval. The class
of a response is decided by rule on its text; a degenerate or empty response is its own class, never a refusal.
"""

import functools

import numpy as np

from cai_jax import statistics
from cai_jax.chat import encode_chat
from cai_jax.prompts import COMPLIANCE_OPENINGS, REFUSAL_OPENINGS
from cai_jax.sampler import Generate, Score
from cai_jax.stages.rows import make_rows, messages_of, sample_dict, unfinished, usable_prompts, watch
from cai_jax.stages.scoring import score_texts
from cai_jax.text_metrics import KINDS, classify_response, repetition

STAGE = "evaluate"
SETS = {"red_team": "eval_red_team", "helpful": "eval_helpful", "look_alike": "eval_look_alike"}


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
    rows = []
    for name, load in _models(context).items():
        left = unfinished(folder, f"rows-{name}", len(items), settings.rows_per_shard)
        with context.progress.task(f"evaluate: {name}", len(items), "prompts", done=len(items) - left) as task:
            rows += _answers_of(context, folder, base_sampler, reward, name, load, items, task)
    return _summary(rows, skipped)


def _models(context) -> dict:
    """The models to compare, each loaded when its turn comes."""
    settings = context.config.evaluate
    models = {"base": lambda: context.base}
    for name, stage, override in (("sl_cai", "sft", settings.sft), ("rl_cai", "ppo", settings.rl)):
        if context.available(stage, override):
            models[name] = lambda stage=stage, override=override: context.load_from(stage, override)
    return models


def _answers_of(context, folder, base_sampler, reward, name, load, items, task) -> list[dict]:
    """The rows of one model, which is loaded only if there is a shard to do."""
    settings = context.config.evaluate

    @functools.cache
    def sampler():
        return watch(base_sampler if name == "base" else context.sampler(load()), task)

    def answer(item):
        set_name, prompt = item
        messages = messages_of(prompt)
        seed = context.row_seed(STAGE, prompt.id, "response")  # the same for every model
        sample = yield Generate(messages, settings.response, seed)
        openings = yield Score(messages, [*REFUSAL_OPENINGS, *COMPLIANCE_OPENINGS])
        row = {
            "id": prompt.id,
            "set": set_name,
            "category": prompt.category,
            "model": name,
            "messages": messages,
            "response": sample_dict(sample),
            "kind": classify_response(sample.text),
            "margin": refusal_margin(openings),
            "repetition": repetition(sample.text),
            "provenance": context.provenance(STAGE, sampler().model),
        }
        return row, sample

    def finish(answers):
        conversations, samples = [row["messages"] for row, _ in answers], [sample for _, sample in answers]
        same = name == "base"
        kls = [0.0] * len(samples) if same else _log_ratios(sampler(), base_sampler, settings, conversations, samples)
        scores = _rewards(context, reward, sampler().model, conversations, samples)
        return [
            row | {"kl": kl, "reward": score} for (row, _), kl, score in zip(answers, kls, scores, strict=True)
        ]

    return make_rows(folder, f"rows-{name}", items, settings.rows_per_shard, sampler, answer, finish=finish)


def refusal_margin(openings) -> float:
    """How much likelier a refusing opening is than a complying one, in nats a token.

    `openings` are the log-probs of the tokens of each, refusals first. The log of the mean over standard openings of
    exp(log-prob per token), refusals minus compliances.
    """
    means = np.asarray([np.mean(option) for option in openings], np.float64)
    refusing, complying = np.split(means, [len(REFUSAL_OPENINGS)])
    return float(np.log(np.mean(np.exp(refusing))) - np.log(np.mean(np.exp(complying))))


def _log_ratios(sampler, base_sampler, settings, conversations, samples) -> list[float]:
    """Log-prob of each response under the model minus under the base, in nats, summed over tokens.

    Of a response drawn at temperature 1 without filters this is an unbiased estimate of the KL to the base; of a
    greedy one it is the log-ratio of that one answer, and no estimate of the KL. Both log-probs are at temperature 1;
    the sampler's own are that unless it drew at another.
    """
    options = [[sample.tokens] for sample in samples]
    own = [sum(sample.logprobs) for sample in samples]
    if settings.response.temperature not in (0, 1):
        own = [row[0] for row in sampler.score(conversations, options)]
    base = base_sampler.score(conversations, options)
    return [mine - theirs for mine, (theirs,) in zip(own, base, strict=True)]


def _rewards(context, reward, model, conversations, samples) -> list[float | None]:
    if reward is None:
        return [None] * len(samples)
    texts = [
        encode_chat(model.tokenizer, conversation) + sample.tokens
        for conversation, sample in zip(conversations, samples, strict=True)
    ]
    return [float(score) for score in score_texts(context, reward.config, reward.params, texts)]


def _summary(rows, skipped) -> dict:
    models = {}
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        sets = {set_name: _of_set([row for row in own if row["set"] == set_name]) for set_name in SETS}
        margins = {set_name: [row["margin"] for row in own if row["set"] == set_name] for set_name in SETS}
        models[name] = {
            "sets": sets,
            "margin_auroc": statistics.auroc(margins["red_team"], margins["look_alike"] + margins["helpful"]),
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
    }
    means = {name: statistics.mean_interval(column) for name, column in columns.items()}
    return {"n": len(rows), **shares, **means}
