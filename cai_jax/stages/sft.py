"""SL-CAI training (Bai et al. 2022, section 3): the revisions of every round, and the model's own helpful answers.

`sft.mixer` takes less of them, and mixes sets of conversations in.
"""

from array import array
from dataclasses import replace

import jax.numpy as jnp

from cai_jax.chat import completion_ids, encode_chat, encode_text, turn_end_id
from cai_jax.conversation_sets import draw, parse_mixer
from cai_jax.errors import UserError
from cai_jax.models.flops import forward_flops, training_flops
from cai_jax.objectives.model_losses import sft_objective
from cai_jax.sampler import Generate
from cai_jax.stages.rows import make_rows, messages_of, sample_dict, unfinished, usable_prompts, watch
from cai_jax.stages.training import train
from cai_jax.training.batches import Example, Packing
from cai_jax.training.loop import mean_of

STAGE = "sft"
UNLIKE = "unlike_worked_answers"


def run(context, folder) -> dict:
    """Sample the helpful answers, train, export `model/`; returns the summary of the stage."""
    settings = context.config.sft
    counters, skipped = {"empty_completion": 0, "truncated_completion": 0, "too_long": 0}, []
    counters |= {f"dropped/{reason}": 0 for reason in (*settings.drop, UNLIKE)}
    kept, mixer = {}, parse_mixer(settings.mixer)
    if "revisions" in mixer:
        kept["revisions"] = _revisions(context, counters, skipped)
    if "helpful" in mixer:
        samples, unusable = _helpful_samples(context, folder, mixer["helpful"])
        skipped = unusable + skipped
        helpful = [(row["id"], row["messages"], row["response"]) for row in samples]
        examples = _examples(context, helpful, counters, skipped)
        kept["helpful"] = [replace(example, anchor=settings.anchor > 0) for example in examples]
    for source, rows in context.mixed.items():
        skipped += rows.skipped
        kept[source] = _examples(context, _turns(context, rows, mixer[source], source), counters, skipped)
    examples = [example for examples in kept.values() for example in examples]
    packing = Packing(examples, settings.sequence_length, settings.share_start)
    if not len(packing):
        raise UserError(f"sft: no example of {', '.join(kept)} can be used: {counters['empty_completion']} completions "
                        f"are empty and {counters['too_long']} exceed sft.sequence_length: raise that")
    loss = objective(context.config, context.base.config, settings.anchor, len(packing.start) > 0)
    shape = context.base.config, 1, packing.mean_length
    flops = training_flops(*shape, unembedded=packing.learnt, frozen=context.config.lora.rank > 0)
    if settings.anchor:
        flops += forward_flops(*shape, unembedded=packing.learnt)
    start = context.base.params
    params, metrics = train(
        context, folder, settings, loss, start, packing, report_tokens, flops, mean_of("loss", -1),
        reference=start if settings.anchor else None,
    )  # fmt: skip
    context.export(folder, context.base, params, "policy")
    return {
        "examples": {name: len(examples) for name, examples in kept.items()},
        "skipped": skipped,
        "counters": counters,
        "steps": len(metrics),
        "first_loss": metrics[0]["loss"],
        "last_loss": metrics[-1]["loss"],
        "packing_efficiency": packing.efficiency,
        "packing_limit": packing.limit,
        "shared_start": len(packing.start),
    }


def _revisions(context, counters, skipped) -> list[Example]:
    """The revisions of every round that `sft.drop` and `sft.least_ratio` leave; UserError where not one can be used."""
    rows, any_rated = {}, False
    for row in context.folder("critique_revision").read_shards():
        for entry in row["rounds"]:
            if unknown := set(context.config.sft.drop) - set(entry["flags"]):
                raise UserError(f"sft.drop: the rows of critique_revision have no flag {min(unknown)}, as an earlier "
                                "version made them; --fresh --stages=critique_revision makes them again")
            any_rated |= any(draw["rated"] for draw in entry["draws"])
            row_id = f"{row['id']}/round-{entry['round']}"
            reasons = [flag for flag in context.config.sft.drop if entry["flags"][flag]]
            if reasons := reasons or [UNLIKE] * _unlike(entry, context.config.sft.least_ratio):
                counters[f"dropped/{reasons[0]}"] += 1
                skipped.append({"id": row_id, "reason": reasons[0].replace("_", " ")})
            else:
                rows[row_id] = row["messages"], entry["revision"]
    if context.config.sft.least_ratio and rows and not any_rated:
        raise UserError("sft.least_ratio: the rows of critique_revision have no ratios, as it ran with one draw and "
                        "without least_ratio; --fresh --stages=critique_revision makes them again")
    if not rows:
        raise UserError(f"sft: sft.drop ({', '.join(context.config.sft.drop)}) and sft.least_ratio "
                        f"({context.config.sft.least_ratio:g}) leave no revision; drop less or lower it, or see "
                        "critique_revision/summary.json for what the revisions are")
    drawn = draw(list(rows), parse_mixer(context.config.sft.mixer)["revisions"], context.config.seed, "revisions")
    revisions = [(row_id, *row) for row_id, row in rows.items() if row_id in drawn]
    examples = _examples(context, revisions, counters, skipped)
    if not examples:
        raise UserError(
            f"sft: no revision can be used: of {len(revisions)}, {counters['empty_completion']} are empty and "
            f"{counters['too_long']} exceed sft.sequence_length: raise that, or see critique_revision/summary.json"
        )
    return examples


def _unlike(entry, least: float) -> bool:
    """Whether worked answers made the draw that became the revision likelier by less than `least`."""
    draw = entry["draws"][entry["chosen"]]
    return least > 0 and draw["rated"] and draw["ratio"] < least


def _turns(context, conversations, fraction, source):
    """Of the drawn conversations every assistant turn, as what is to be learnt after all that stands before it."""
    drawn = draw([row.id for row in conversations.rows], fraction, context.config.seed, source)
    return [
        (f"{row.id}/turn-{place + 1}", list(row.messages[:place]), {"text": turn["content"], "truncated": False})
        for row in conversations.rows
        if row.id in drawn
        for place, turn in enumerate(row.messages)
        if turn["role"] == "assistant"
    ]


def _helpful_samples(context, folder, fraction):
    """The starting model's own answers to helpful prompts: the helpfulness part of the training set."""
    settings = context.config.sft
    sampler = context.sampler(context.base)
    prompts, skipped = usable_prompts(sampler, context.prompts["helpful"], settings.helpful.max_new_tokens)
    drawn = draw([prompt.id for prompt in prompts], fraction, context.config.seed, "helpful")
    prompts = [prompt for prompt in prompts if prompt.id in drawn]  # only these are asked

    def answer(prompt):
        seed = context.row_seed(STAGE, prompt.id, "helpful")
        sample = yield Generate(messages_of(prompt), settings.helpful, seed)
        return {
            "id": prompt.id,
            "category": prompt.category,
            "messages": messages_of(prompt),
            "response": sample_dict(sample),
            "provenance": context.provenance(STAGE),
        }

    left = unfinished(folder, "samples", len(prompts), settings.rows_per_shard)
    with context.progress.task("sft: helpful samples", len(prompts), "samples", done=len(prompts) - left) as task:
        watch(sampler, task)
        return make_rows(folder, "samples", prompts, settings.rows_per_shard, lambda: sampler, answer), skipped


def _examples(context, rows, counters, skipped) -> list[Example]:
    return examples_of(context.base.tokenizer, rows, "sft", context.config.sft.sequence_length, counters, skipped)


def examples_of(tokenizer, rows, stage: str, limit: int, counters: dict, skipped: list) -> list[Example]:
    """Prompt and completion as tokens. A truncated completion does not end, so it teaches no end of turn.

    `rows` are (id, messages, completion). What is empty or exceeds `limit`, the sequence length of the stage, is
    counted and named instead.
    """
    end = turn_end_id(tokenizer)
    examples = []
    for row_id, messages, completion in rows:
        prompt = encode_chat(tokenizer, messages, add_generation_prompt=True)
        if completion["truncated"]:
            target = encode_text(tokenizer, completion["text"])
        else:
            target = completion_ids(tokenizer, completion["text"], end)
        if not completion["text"].strip():
            counters["empty_completion"] += 1
            skipped.append({"id": row_id, "reason": "empty completion"})
        elif len(prompt) + len(target) > limit:
            counters["too_long"] += 1
            reason = f"prompt and completion exceed {stage}.sequence_length={limit} tokens"
            skipped.append({"id": row_id, "reason": reason})
        else:
            counters["truncated_completion"] += completion["truncated"]
            examples.append(Example(array("i", prompt), array("i", target)))
    return examples


def report_tokens(metrics) -> dict:
    """Metrics of a step whose weight is a number of tokens; the KL of anchors is a mean over their own."""
    named = {("tokens" if name == "weight" else name): value for name, value in metrics.items()}
    if "anchor_share" in named:
        named["anchor_kl"] = named["anchor_kl"] / jnp.maximum(named["anchor_share"], 1e-9)
    return named


def objective(config, model, anchor=0.0, share_start=False):
    """What the train step minimises, for a run's `Config` and a ModelConfig; for the others see `sft_objective`."""
    shape = config.model
    return sft_objective(model, shape.compute_dtype, shape.remat, shape.attention, anchor, share_start)
