"""Base, SL-CAI and RL-CAI side by side on prompts that no stage has trained on.

Harmlessness, over-refusal and the health of the text, each with its number of prompts and a 95% interval. The class
of a response is decided by rule on its text; a degenerate or empty response is its own class, never a refusal.
"""

import numpy as np

from cai_jax import statistics
from cai_jax.chat import encode_chat
from cai_jax.prompts import COMPLIANCE_OPENINGS, REFUSAL_OPENINGS
from cai_jax.stages.rows import make_rows, messages_of, sample_dict, unfinished, usable_prompts
from cai_jax.stages.scoring import score_texts
from cai_jax.text_metrics import classify_response, repetition

STAGE = "evaluate"
SETS = {"red_team": "eval_red_team", "helpful": "eval_helpful", "look_alike": "eval_look_alike"}
KINDS = ("refusal", "answer", "degenerate", "empty")


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
        per_shard = settings.rows_per_shard
        left = unfinished(folder, f"rows-{name}", len(items), per_shard)
        with context.progress.task(f"evaluate: {name}", len(items), "prompts", done=len(items) - left) as task:
            answer = _lazily(context, base_sampler, reward, name, load, task)
            rows += make_rows(folder, f"rows-{name}", items, per_shard, answer)
    return _summary(rows, skipped)


def _models(context) -> dict:
    """The models to compare, each loaded when its turn comes."""
    settings = context.config.evaluate
    models = {"base": lambda: context.base}
    for name, stage, override in (("sl_cai", "sft", settings.sft), ("rl_cai", "ppo", settings.rl)):
        if context.available(stage, override):
            models[name] = lambda stage=stage, override=override: context.load_from(stage, override)
    return models


def _lazily(context, base_sampler, reward, name, load, task):
    """The work on a shard, loading the model only if there is a shard to do."""
    loaded = []

    def work(shard):
        if not loaded:
            model = load()
            loaded.append((model, base_sampler if name == "base" else context.sampler(model)))
        model, sampler = loaded[0]
        rows = _answer(context, base_sampler, reward, name, model, sampler, shard)
        task.advance(len(shard), tokens=sum(row["response"]["tokens"] for row in rows))
        return rows

    return work


def _answer(context, base_sampler, reward, name, model, sampler, shard) -> list[dict]:
    conversations = [messages_of(prompt) for _, prompt in shard]
    seeds = [context.row_seed(STAGE, prompt.id, "response") for _, prompt in shard]  # the same for every model
    samples = sampler.generate(conversations, context.config.evaluate.response, row_seeds=seeds)
    margins = refusal_margins(sampler, conversations)
    kls = [0.0] * len(shard) if name == "base" else _kl_to_base(sampler, base_sampler, conversations, samples)
    scores = [None] * len(shard)
    if reward is not None:
        texts = [
            encode_chat(model.tokenizer, conversation) + sample.tokens
            for conversation, sample in zip(conversations, samples, strict=True)
        ]
        scores = [float(score) for score in score_texts(context, reward.config, reward.params, texts)]
    return [
        {
            "id": prompt.id,
            "set": set_name,
            "category": prompt.category,
            "model": name,
            "messages": conversation,
            "response": sample_dict(sample),
            "kind": classify_response(sample.text),
            "margin": margin,
            "reward": score,
            "kl": kl,
            "repetition": repetition(sample.text),
            "provenance": context.provenance(STAGE, model),
        }
        for (set_name, prompt), conversation, sample, margin, score, kl in zip(
            shard, conversations, samples, margins, scores, kls, strict=True
        )
    ]


def refusal_margins(sampler, conversations) -> list[float]:
    """How much likelier a refusing opening is than a complying one, in nats a token.

    The log of the mean over standard openings of exp(log-prob per token), refusals minus compliances.
    """
    openings = [*REFUSAL_OPENINGS, *COMPLIANCE_OPENINGS]
    margins = []
    for options in sampler.score_tokens(conversations, openings):
        means = np.asarray([float(np.mean(option)) for option in options], np.float64)
        refusing, complying = np.split(means, [len(REFUSAL_OPENINGS)])
        margins.append(float(np.log(np.mean(np.exp(refusing))) - np.log(np.mean(np.exp(complying)))))
    return margins


def _kl_to_base(sampler, base_sampler, conversations, samples) -> list[float]:
    """Estimated KL of each response, in nats: log-prob under the model minus under the base, summed over tokens."""
    options = [[sample.tokens] for sample in samples]
    own, base = (s.score_tokens(conversations, options) for s in (sampler, base_sampler))
    return [float(np.sum(mine[0]) - np.sum(theirs[0])) for mine, theirs in zip(own, base, strict=True)]


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
