"""Where the score of a rollout comes from, and the arrays that a frozen model adds to it.

    model     a reward model reads prompt and response
    judge     a language model rates the response from 1 to 10 under principles; the score is the mean of that rating
              (direct RLAIF: Lee et al. 2023, arXiv 2309.00267, section 2.2.2)
    examples  a language model finds the response likelier after worked answers of the aim of the prompt's set than
              after those of the other aim, by so many nats (labelers/examples.py); direct RLAIF, too
    rule      the checks of the constitution: the share of them that the response satisfies, exactly

A rollout without a score (the judge cannot hold it) is counted and left out of the update; none is made up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from cai_jax.constitution import Principle
from cai_jax.errors import UserError
from cai_jax.labelers.examples import Examples
from cai_jax.labelers.judge import Judge
from cai_jax.labelers.rating import Rating
from cai_jax.mesh import on_host
from cai_jax.models.heads import cautious, head_values, last_real
from cai_jax.models.pretrained import Model
from cai_jax.objectives.model_losses import completion_logprobs, completion_values
from cai_jax.prompts import resolve_ratings
from cai_jax.rules import satisfies
from cai_jax.stages.rollouts import Rollouts, rows_of_pass
from cai_jax.stages.rows import messages_of


@dataclass(frozen=True, eq=False)
class Source:
    """What scores rollouts: `model` is the reward model or the judge, None for a rule."""

    kind: str
    model: Model | None = None


def load_source(context, stage: str) -> Source:
    """The source that the config of a stage names, with its model in memory."""
    settings = getattr(context.config, stage)
    if settings.reward == "model":
        dtype = settings.frozen_dtype
        return Source("model", context.load_from("reward_model", settings.reward_model, "reward", dtype=dtype))
    if settings.reward in ("judge", "examples"):
        return Source(settings.reward, context.load(settings.judge or context.config.model.source, "policy"))
    return Source("rule")


def measure(context, stage: str, reference: Model, source: Source, rollouts: Rollouts, value=(None, None)):
    """Reference log-probs and values `[B, N]`, uncertainty and scores `[B]`, nan where there is no score; on the host.

    The uncertainty is the deviation of the reward model's heads; scores lose `uncertainty_penalty` of it.
    `value`: ModelConfig and params that give the values; without them these are None.
    """
    settings, shape = getattr(context.config, stage), context.config.model
    reward = source.model if source.kind == "model" else None
    columns = []
    rows = rows_of_pass(settings)
    for start in range(0, settings.rollouts, rows):
        part = {name: rollouts.arrays[name][start : start + rows] for name in ("tokens", "positions", "mask")}
        scored = _score(
            reference.config, value[0], reward and reward.config, context.mesh, reference.params, value[1],
            reward and reward.params, context.put_rows(part), settings.response.temperature, shape.compute_dtype,
            shape.attention,
        )  # fmt: skip
        columns.append([None if x is None else on_host(x) for x in scored])
    ref_logprobs, old_values, scores = (
        None if column[0] is None else np.concatenate(column) for column in zip(*columns, strict=True)
    )
    if scores is None:
        scores = text_scores(context, stage, source, rollouts)
        return ref_logprobs, old_values, np.zeros_like(scores), scores
    return ref_logprobs, old_values, scores.std(axis=-1), cautious(scores, settings.uncertainty_penalty)


@partial(jax.jit, static_argnames=("config", "value_config", "reward_config", "mesh", "dtype", "attention"))
def _score(config, value_config, reward_config, mesh, reference, value, reward, part, temperature, dtype, attention):
    """Reference log-probs and values of the completion tokens `[B, N]`, raw scores by every head `[B, K]`.

    Of what has no params comes None.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for those who ask which mesh is in use
        arrays = part["tokens"], part["positions"], part["mask"]
        ref_logprobs_BN, _ = completion_logprobs(config, reference, *arrays, temperature, dtype, attention=attention)
        values_BN = scores_BK = None
        if value is not None:
            values_BN = completion_values(value_config, value, *arrays, dtype, attention=attention)
        if reward is not None:
            arrays = part["tokens"], part["positions"]
            scores_BTK = head_values(reward_config, reward, *arrays, attention=attention, dtype=dtype)
            scores_BK = last_real(scores_BTK, part["positions"])
        return ref_logprobs_BN, values_BN, scores_BK


def lower_score(config, stage, policy, value_config, scorer, mesh, reference, value, reward, part):
    """The scoring program of a run's `Config`, lowered from shapes in the place of params and rollouts."""
    temperature, shape = getattr(config, stage).response.temperature, config.model
    return _score.lower(
        policy, value_config, scorer, mesh, reference, value, reward, part, temperature, shape.compute_dtype,
        shape.attention,
    )


def text_scores(context, stage: str, source: Source, rollouts: Rollouts) -> np.ndarray:
    """Scores `[B]` of texts by a judge, of either kind, or a rule; nan for those that the judge cannot rate.

    Raises UserError where it can rate none of them.
    """
    if source.kind == "examples":
        principles = _of_the_sets_aim(context, rollouts.prompts)
    else:
        principles = [_principles(context, stage, source, rollouts, prompt) for prompt in rollouts.prompts]
    asked = list(zip(rollouts.prompts, rollouts.texts, principles, strict=True))
    if source.kind == "rule":
        return np.asarray([rule_score(text, under) for _, text, under in asked], np.float32)
    sampler = context.sampler(source.model)
    if source.kind == "examples":
        reader = Judge(source.model.tokenizer, source.model.hash, sampler.max_length)
        labeler = Examples(reader, context.config.preferences.examples, context.constitution)
        rate, starts = labeler.rate, labeler.starts(principles)
    else:
        rate, starts = rater(source.model, sampler.max_length), []
    programs = (rate(messages_of(prompt), text, under) for prompt, text, under in asked)
    ratings = sampler.run(programs, *starts[:1], more=starts[1:])
    if all(rating is None for rating in ratings):
        raise UserError(
            f"{stage}: the judge ({source.model.tokenizer.name_or_path}) can rate not one of {len(asked)} rollouts "
            f"within sampler.max_length={sampler.max_length}; raise it or lower {stage}.max_prompt_tokens"
        )
    return np.asarray([np.nan if rating is None else rating for rating in ratings], np.float32)


def rater(judge: Model, max_length: int) -> Callable:
    """`(messages, response, principles) -> Row`: a row program that returns the rating, None for what is too long."""
    return Rating(Judge(judge.tokenizer, judge.hash, max_length), resolve_ratings(judge.tokenizer)).rate


def _principles(context, stage: str, source: Source, rollouts: Rollouts, prompt) -> Sequence[Principle]:
    """Those that judge or rule go by: all, or one drawn for the prompt of this draw, the same for a whole group."""
    principles = context.constitution.principles
    if source.kind == "rule":
        principles = [principle for principle in principles if principle.check]
    if getattr(context.config, stage).principles == "all":
        return principles
    key = context.row_seed(stage, prompt.id, rollouts.draw, "principle")
    return [principles[key % len(principles)]]


def _of_the_sets_aim(context, prompts: Sequence) -> list[Sequence[Principle]]:
    """For each prompt the principles of the aim of its set, by whose worked answers `examples` goes."""
    unsafe = {row.id for row in context.prompts["red_team"].rows}
    return [context.constitution.matching("", "harmless" if p.id in unsafe else "helpful") for p in prompts]


def rule_score(text: str, principles: Sequence[Principle]) -> float:
    """Share of the principles whose check the text satisfies, 0 to 1."""
    return sum(satisfies(principle.check, text) for principle in principles) / len(principles)


def scored_only(rollouts: Rollouts, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mask `[B, N]` without the rows that have no score, and the scores with 0 for these."""
    has_score = np.isfinite(scores)
    return rollouts.arrays["mask"] * has_score[:, None], np.where(has_score, scores, 0).astype(np.float32)
