"""What the artifacts of a stage depend on: a stage goes on where it stopped only while all of that is the same."""

from cai_jax.config_rules import REINFORCED, rates_revisions
from cai_jax.models.pretrained import model_hash
from cai_jax.overrides import flatten
from cai_jax.stages import labelling
from cai_jax.stages.inputs import (
    HELPERS,
    asks_endpoint,
    best_of_n_is_a_model,
    is_watched,
    judge_of,
    override_of,
    sources,
)

PROMPT_SETS = {
    "red_team": ("red_team", "helpful", "eval_red_team", "eval_helpful", "eval_look_alike"),
    "critique_revision": ("red_team",),
    "sft": ("helpful",),
    "judge": (),
    "preferences": ("red_team", "helpful"),
    "reward_model": (),
    "ppo": ("red_team", "helpful"),
    "dpo": (),
    "best_of_n": ("red_team", "helpful"),
    "grpo": ("red_team", "helpful"),
    "evaluate": ("eval_red_team", "eval_helpful", "eval_look_alike"),
}
# Stages that train, and so depend on adapters and on which state is exported.
TRAINING = ("sft", "reward_model", "ppo", "dpo", "best_of_n", "grpo")
# Fields of the endpoint that decide what it answers, in the stages that can ask it.
ENDPOINT_FIELDS = {
    "critique_revision": ("base_url", "model"),
    **dict.fromkeys(
        ("judge", "preferences", *REINFORCED), ("base_url", "model", "logprobs", "samples", "verdict_tokens")
    ),
}
# Fields of `preferences` that decide what its labelers say.
LABELING = (
    "labelers", "judge", "orders", "guard", "thought.", "contrast.", "examples.", "rating.", "rule.", "rows_per_shard",
)  # fmt: skip
# Fields that decide what is done about the result of a stage, not the result.
AFTERWARDS = ("judge.minimum_accuracy", "judge.on_failure")


def fingerprint_of(context, stage: str) -> dict:
    """All that the artifacts of a stage depend on, flat. None: an input that is still to be made.

    The mesh is no part of it: on another one sums are rounded otherwise, and a run may go on there.
    """
    flat = flatten(context.config)
    wanted = ("sampler.", "model.", f"{stage}.")
    if stage in TRAINING:
        wanted += ("checkpoints.export", "lora.")
    draws = stage == "evaluate" and _draws_best_of_n(context)
    if draws:
        wanted += ("best_of_n.",)
    if stage in REINFORCED and getattr(context.config, stage).reward == "examples":
        wanted += ("preferences.examples.",)
    if stage == "judge":
        wanted += tuple(f"preferences.{name}" for name in LABELING)
    fingerprint = {
        f"config.{key}": value
        for key, value in flat.items()
        if (key.startswith(wanted) or key == "seed") and key not in ("model.source", *AFTERWARDS)
    }
    fingerprint |= {"input.model": context.base.hash, "input.constitution": context.constitution.hash}
    fingerprint |= {f"input.prompts.{name}": _prompts_hash(context, stage, name) for name in PROMPT_SETS[stage]}
    if stage == "critique_revision" and context.config.critique_revision.draws == 1 and rates_revisions(context.config):
        fingerprint["input.ratios"] = "of each revision"
    if stage == "sft":
        fingerprint |= {f"input.conversations.{source}": rows.hash for source, rows in context.mixed.items()}
    if stage == "judge":
        fingerprint["input.gold"] = context.gold.hash
    if stage == "preferences":
        fingerprint |= _calibration(context)
    if is_watched(context.config, stage):
        fingerprint |= {f"config.{key}": value for key, value in flat.items() if key.startswith("monitor.")}
        if context.config.monitor.model:
            fingerprint["input.monitor.model"] = model_hash(context.config.monitor.model)
    if asks_endpoint(context.config, stage):
        fingerprint |= {f"config.endpoint.{name}": flat[f"endpoint.{name}"] for name in ENDPOINT_FIELDS[stage]}
    for source, override_field in sources(context.config, stage).items():
        if override := override_of(context.config, stage, source):
            fingerprint[f"input.{override_field}"] = model_hash(override)
        elif (done := context.folder(source).done()) is not None:
            fingerprint[f"input.{source}"] = done["hash"]
        elif source in context.config.stages:
            fingerprint[f"input.{source}"] = None
    if source := judge_of(context.config, stage):
        fingerprint["input.judge"] = model_hash(source)
    for role in HELPERS.get(stage, ()):
        if model := getattr(getattr(context.config, stage), role):
            fingerprint[f"input.{role}"] = model_hash(model)
    if draws:
        best = context.config.best_of_n
        named = {"policy": best.policy, "reward_model": best.reward_model}
        fingerprint |= {f"input.best_of_n.{name}": model_hash(model) for name, model in named.items() if model}
    return fingerprint


def _prompts_hash(context, stage: str, name: str) -> str | None:
    """What a stage's prompts are; None where the stage red_team is still to add to them."""
    if stage == "red_team":
        return context.given[name].hash
    if name == "red_team" and "red_team" in context.config.stages and context.folder("red_team").done() is None:
        return None
    return context.prompts[name].hash


def _draws_best_of_n(context) -> bool:
    """Whether the evaluation answers with the best of n draws."""
    there = "best_of_n" in context.config.stages or context.folder("best_of_n").done() is not None
    return there and not best_of_n_is_a_model(context.config)


def _calibration(context) -> dict:
    """What labels take from the judge stage: its temperatures. Nothing where there are none."""
    done, selected = context.folder("judge").done(), "judge" in context.config.stages
    if done is None:
        return {"input.calibration": None} if selected and context.config.judge.calibrate else {}
    digest = done["artifacts"].get(labelling.CALIBRATION)
    return {"input.calibration": digest} if digest else {}
