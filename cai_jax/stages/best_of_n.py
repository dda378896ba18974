"""Best-of-n: of n answers of the SL-CAI model the one that the reward model scores highest.

It needs no training, and choosing moves the answers away from the model by a KL that is known (`kl_bound`): what PPO
reaches at its KL is to be measured by it. The curve of the score against n is estimated without bias from all answers.
With `best_of_n.distill` the SL-CAI model is fine-tuned on the best answers and exported.
"""

import numpy as np

from cai_jax import statistics
from cai_jax.errors import UserError
from cai_jax.models.flops import training_flops
from cai_jax.sampler import expected_best, kl_bound, several
from cai_jax.stages.critique_revision import count_flags
from cai_jax.stages.rows import make_rows, messages_of, sample_dict, unfinished, usable_prompts, watch
from cai_jax.stages.scoring import score_several
from cai_jax.stages.sft import examples_of, objective, report_tokens
from cai_jax.stages.training import train
from cai_jax.training.batches import Packing
from cai_jax.training.loop import mean_of

STAGE = "best_of_n"
PROMPTS = ("red_team", "helpful")


def run(context, folder) -> dict:
    """Draw and choose; with `distill` train and export `model/`. Returns the summary of the stage."""
    rows, skipped = _choose(context, folder)  # its models and its sampler end with it
    summary = _summary(rows) | {"skipped": skipped}
    if not context.config.best_of_n.distill:
        return summary
    counters = {"empty_completion": 0, "truncated_completion": 0, "too_long": 0}
    distillation = _distill(context, folder, rows, counters, summary["skipped"])
    return summary | {"distillation": distillation, "counters": summary["counters"] | counters}


def _choose(context, folder):
    """A row for each prompt, with its n answers, their scores and the choice; and the prompts that were left out."""
    settings = context.config.best_of_n
    policy = context.load_from("sft", settings.policy)
    reward = context.load_from("reward_model", settings.reward_model, "reward")
    sampler, new_tokens = context.sampler(policy), settings.response.max_new_tokens
    prompts, skipped = [], []
    for name in PROMPTS:
        usable, unusable = usable_prompts(
            sampler, context.prompts[name], new_tokens, reward.config.max_position - new_tokens
        )
        prompts, skipped = prompts + usable, skipped + unusable

    def answer(prompt):
        seeds = [context.row_seed(STAGE, prompt.id, i) for i in range(settings.n)]
        return prompt, (yield from several(messages_of(prompt), settings.response, seeds))

    def finish(answers):
        conversations, drawn = [messages_of(prompt) for prompt, _ in answers], [samples for _, samples in answers]
        scores = score_several(context, reward, policy.tokenizer, conversations, drawn)
        provenance = context.provenance(STAGE, policy) | {"reward_model_hash": reward.hash}
        return [_row(*answered, own, provenance) for answered, own in zip(answers, scores, strict=True)]

    left = unfinished(folder, "rows", len(prompts), settings.rows_per_shard)
    with context.progress.task("best_of_n: answers", len(prompts), "prompts", done=len(prompts) - left) as task:
        watch(sampler, task)
        rows = make_rows(folder, "rows", prompts, settings.rows_per_shard, lambda: sampler, answer, finish=finish)
    return rows, skipped


def _row(prompt, samples, scores, provenance) -> dict:
    """A row of a prompt; of equal scores the first counts."""
    chosen = scores.index(max(scores))
    return {
        "id": prompt.id,
        "category": prompt.category,
        "messages": messages_of(prompt),
        "samples": [sample_dict(sample) for sample in samples],
        "scores": scores,
        "chosen": chosen,
        "flags": {
            "chosen_truncated": samples[chosen].truncated,
            "chosen_empty": not samples[chosen].text.strip(),
            "all_alike": len({sample.text for sample in samples}) == 1,
        },
        "provenance": provenance,
    }


def _summary(rows) -> dict:
    n = len(rows[0]["scores"])
    lengths = [[sample["tokens"] for sample in row["samples"]] for row in rows]
    first, best = ([pick(row["scores"]) for row in rows] for pick in (lambda scores: scores[0], max))
    return {
        "prompts": len(rows),
        "n": n,
        "kl_bound": kl_bound(n),
        "first": statistics.mean_interval(first),
        "best": statistics.mean_interval(best),
        "gain": statistics.mean_interval(np.subtract(best, first)),
        "curve": [
            {
                "n": k,
                "kl_bound": kl_bound(k),
                "score": statistics.mean_interval([expected_best(row["scores"], k) for row in rows]),
            }
            for k in ladder(n)
        ],
        "length": statistics.mean_interval([np.mean(tokens) for tokens in lengths]),
        "chosen_length": statistics.mean_interval([own[row["chosen"]] for own, row in zip(lengths, rows, strict=True)]),
        "counters": count_flags(rows),
    }


def ladder(n: int) -> list[int]:
    """1, 2, 4 and so on below n, and n."""
    steps = [1]
    while 2 * steps[-1] < n:
        steps.append(2 * steps[-1])
    return [*steps, n]


def _distill(context, folder, rows, counters, skipped) -> dict:
    """Fine-tune the policy on the best answers and export it."""
    settings = context.config.best_of_n
    policy = context.load_from("sft", settings.policy)
    best = [(row["id"], row["messages"], row["samples"][row["chosen"]]) for row in rows]
    examples = examples_of(policy.tokenizer, best, STAGE, settings.sequence_length, counters, skipped)
    if not examples:
        raise UserError(
            f"best_of_n: no answer can be learnt: of {len(rows)}, {counters['empty_completion']} are empty and "
            f"{counters['too_long']} exceed best_of_n.sequence_length: raise that, or set best_of_n.distill=false"
        )
    packing = Packing(examples, settings.sequence_length)
    shape = policy.config, 1, packing.mean_length
    flops = training_flops(*shape, unembedded=packing.learnt, frozen=context.config.lora.rank > 0)
    loss = objective(context.config, policy.config)
    params, metrics = train(
        context, folder, settings, loss, policy.params, packing, report_tokens, flops, mean_of("loss", -1)
    )
    context.export(folder, policy, params, "policy")
    return {
        "examples": len(examples),
        "steps": len(metrics),
        "first_loss": metrics[0]["loss"],
        "last_loss": metrics[-1]["loss"],
    }
