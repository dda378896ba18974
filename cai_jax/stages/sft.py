"""SL-CAI training (Bai et al. 2022, section 3): the revisions of every round, and the model's own helpful answers."""

from cai_jax.chat import completion_ids, encode_chat, encode_text, turn_end_id
from cai_jax.errors import UserError
from cai_jax.objectives.model_losses import sft_objective
from cai_jax.sampler import Generate
from cai_jax.stages.rows import make_rows, messages_of, sample_dict, unfinished, usable_prompts, watch
from cai_jax.stages.training import train
from cai_jax.training.batches import Example, pack

STAGE = "sft"


def run(context, folder) -> dict:
    """Sample the helpful answers, train, export `model/`; returns the summary of the stage."""
    counters, skipped = {"empty_completion": 0, "truncated_completion": 0, "too_long": 0}, []
    kept = {"revisions": _revisions(context, counters, skipped)}
    samples, unusable = _helpful_samples(context, folder)
    helpful = [(row["id"], row["messages"], row["response"]) for row in samples]
    kept["helpful"] = _examples(context, helpful, counters, skipped)
    examples = kept["revisions"] + kept["helpful"]
    packed = pack(examples, context.config.sft.sequence_length)
    loss = objective(context.config, context.base.config)
    params, metrics = train(context, folder, context.config.sft, loss, context.base.params, packed, _report)
    context.export(folder, context.base, params, "policy")
    return {
        "examples": {name: len(rows) for name, rows in kept.items()},
        "skipped": unusable + skipped,
        "counters": counters,
        "steps": len(metrics),
        "first_loss": metrics[0]["loss"],
        "last_loss": metrics[-1]["loss"],
        "packing_efficiency": sum(map(len, examples)) / packed["tokens"].size,
    }


def _revisions(context, counters, skipped) -> list[Example]:
    """The revisions of every round; UserError where not one can be used, before anything else is computed."""
    rows = [
        (f"{row['id']}/round-{entry['round']}", row["messages"], entry["revision"])
        for row in context.folder("critique_revision").read_shards()
        for entry in row["rounds"]
    ]
    examples = _examples(context, rows, counters, skipped)
    if not examples:
        raise UserError(
            f"sft: no revision can be used: of {len(rows)}, {counters['empty_completion']} are empty and "
            f"{counters['too_long']} exceed sft.sequence_length: raise that, or see critique_revision/summary.json"
        )
    return examples


def _helpful_samples(context, folder):
    """The starting model's own answers to helpful prompts: the helpfulness part of the training set."""
    settings = context.config.sft
    sampler = context.sampler(context.base)
    prompts, skipped = usable_prompts(sampler, context.prompts["helpful"], settings.helpful.max_new_tokens)

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
    """Prompt and completion as tokens. A truncated completion does not end, so it teaches no end of turn."""
    tokenizer, limit = context.base.tokenizer, context.config.sft.sequence_length
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
            skipped.append({"id": row_id, "reason": f"prompt and completion exceed sft.sequence_length={limit} tokens"})
        else:
            counters["truncated_completion"] += completion["truncated"]
            examples.append(Example(tuple(prompt), tuple(target)))
    return examples


def objective(config, model):
    """What the train step minimises, for a run's `Config` and a ModelConfig."""
    return sft_objective(model, config.model.compute_dtype, config.model.remat)


def _report(metrics) -> dict:
    return {("tokens" if name == "weight" else name): value for name, value in metrics.items()}
