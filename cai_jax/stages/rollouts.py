"""Rollouts, as PPO and GRPO learn from them: which prompts, what the policy writes, as arrays and as texts."""

from dataclasses import dataclass

import numpy as np

from cai_jax.chat import encode_chat
from cai_jax.sampler.best_of import several
from cai_jax.stages.rows import messages_of, usable_prompts

PROMPT_SETS = ("red_team", "helpful")


@dataclass(frozen=True, eq=False)
class Prompts:
    """What rollouts start from."""

    rows: list
    length: int  # tokens that every prompt is left-padded to


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Responses of a policy, one a row; those to the same prompt stand side by side.

    `arrays`: prompts left-padded to P, completions from P on: `tokens`, `positions` `[B, P + N]`; `mask`,
    `old_logprobs` `[B, N]`, log-probs as the sampler saw them; `truncated` `[B]`. The stop token is part of the
    completion.
    """

    draw: str  # which draw of prompts this is: "update-3"
    prompts: list  # of each row
    texts: list[str]
    arrays: dict[str, np.ndarray]

    def token_count(self) -> int:
        """Real tokens, prompts and completions."""
        return int((self.arrays["positions"] >= 0).sum())


def usable(context, stage: str, sampler) -> tuple[Prompts, list[dict]]:
    """The prompts of a stage, and `{"id", "reason"}` of those that leave no room for a response."""
    settings = getattr(context.config, stage)
    rows, skipped = [], []
    for name in PROMPT_SETS:
        fitting, others = usable_prompts(
            sampler, context.prompts[name], settings.response.max_new_tokens, settings.max_prompt_tokens
        )
        rows, skipped = rows + fitting, skipped + others
    longest = max(len(encode_chat(sampler.model.tokenizer, messages_of(prompt))) for prompt in rows)
    return Prompts(rows, -(-longest // 32) * 32), skipped


def rows_of_pass(settings) -> int:
    """Rows of rollouts that are scored together: those of a microbatch."""
    return settings.rollouts // settings.minibatches // settings.microbatches


def draw_prompts(context, stage: str, prompts: list, count: int, draw: str) -> list:
    """`count` prompts without repeats as far as they reach, of both sets together or a share of each."""
    rng = np.random.default_rng(context.row_seed(stage, "prompts", draw))
    share = getattr(context.config, stage).red_team_share
    if not share:
        return _drawn(rng, prompts, count)
    unsafe = {prompt.id for prompt in context.prompts["red_team"].rows}
    sets = [[prompt for prompt in prompts if (prompt.id in unsafe) == of_unsafe] for of_unsafe in (True, False)]
    wanted = round(share * count)
    return _drawn(rng, sets[0], wanted) + _drawn(rng, sets[1], count - wanted)


def _drawn(rng, prompts: list, count: int) -> list:
    order = [i for _ in range(-(-count // len(prompts))) for i in rng.permutation(len(prompts))]
    return [prompts[i] for i in order[:count]]


def sample_rollouts(context, stage: str, sampler, prompts: Prompts, draw: str, group: int = 1) -> Rollouts:
    """The rollouts of a draw, `group` of them for each of its prompts, from the policy of the sampler."""
    settings = getattr(context.config, stage)
    drawn = draw_prompts(context, stage, prompts.rows, settings.rollouts // group, draw)
    drawn = [prompt for prompt in drawn for _ in range(group)]
    seeds = [context.row_seed(stage, prompt.id, draw, place) for place, prompt in enumerate(drawn)]
    samples = _sample(sampler, settings.response, drawn, seeds, group)
    arrays = _arrays(sampler.model.tokenizer, drawn, samples, prompts.length, settings.response.max_new_tokens)
    return Rollouts(draw, drawn, [sample.text for sample in samples], arrays)


def _sample(sampler, sampling, drawn, seeds, group):
    """One sample a row. Where there are more rows than slots, those of a group share a slot, and their prompt is run
    once for all that do; with fewer, slots that stand empty would cost more than a prompt does."""
    together = min(group, max(1, len(drawn) // sampler.rows))
    while group % together:
        together -= 1
    programs = [
        several(messages_of(drawn[start]), sampling, seeds[start : start + together])
        for start in range(0, len(drawn), together)
    ]
    return [sample for samples in sampler.run(programs) for sample in samples]


def _arrays(tokenizer, drawn, samples, prompt_length: int, room: int) -> dict[str, np.ndarray]:
    rows = len(samples)
    arrays = {
        "tokens": np.zeros((rows, prompt_length + room), np.int32),
        "positions": np.full((rows, prompt_length + room), -1, np.int32),
        "mask": np.zeros((rows, room), np.int32),
        "old_logprobs": np.zeros((rows, room), np.float32),
        "truncated": np.asarray([sample.truncated for sample in samples]),
    }
    for row, (start_of, sample) in enumerate(zip(drawn, samples, strict=True)):
        prompt = encode_chat(tokenizer, messages_of(start_of))
        start, end = prompt_length - len(prompt), prompt_length + len(sample.tokens)
        arrays["tokens"][row, start:end] = prompt + sample.tokens
        arrays["positions"][row, start:end] = np.arange(end - start)
        arrays["mask"][row, : len(sample.tokens)] = 1
        arrays["old_logprobs"][row, : len(sample.tokens)] = sample.logprobs
    return arrays
