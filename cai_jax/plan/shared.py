"""The programs that stages have in common: scoring of rollouts, pairs and texts, and the train step."""

from math import ceil

import jax

from cai_jax.plan import arithmetic
from cai_jax.plan.arithmetic import Batch, Work
from cai_jax.plan.programs import SCORING, TRAINING, Program, Run, int32, size
from cai_jax.sampler.engine import bucket
from cai_jax.stages import rewards, scoring
from cai_jax.stages.rollouts import rows_of_pass
from cai_jax.stages.training import parts
from cai_jax.training.step import make_optimizer, make_schedule, make_train_step


def score_program(run: Run, stage: str, reference, value, reward, prompt: int, held: int, batches: int) -> Program:
    """Reference log-probs, values and rewards in one program; each a pair of shape and params, or of None.

    `held`: all that the stage holds, these params included.
    """
    settings = getattr(run.config, stage)
    answer, rows = settings.response.max_new_tokens, rows_of_pass(settings)
    length = prompt + answer
    part = run.rows({
        **{name: int32(rows, length) for name in ("tokens", "positions")}, "mask": int32(rows, answer),
    })  # fmt: skip
    scalars = Batch(rows, length, None)
    passes = [(reference[0], Batch(rows, length, answer)), *((shape, scalars) for shape, _ in (value, reward) if shape)]
    shapes, params = zip(reference, value, reward, strict=True)
    # With adapters what gives the values and what is frozen beside it are one copy of what does not train.
    shared = size(parts(value[1])[1]) if value[1] else 0
    forms = run.config.model, run.config.lora, settings.frozen_dtype
    return Program(
        stage, "score rollouts", SCORING, run.key("score rollouts", *shapes, rows, length, answer, *forms),
        lambda: rewards.lower_score(run.config, stage, *shapes, run.mesh, *params, part), size(params, part), 0,
        sum(arithmetic.pass_temporaries(model, run.mesh, batch, run.itemsize) for model, batch in passes),
        held - size(params) + shared,
        sum((arithmetic.forward_work(model, run.mesh, batch, run.itemsize) for model, batch in passes), Work()),
        batches * (settings.rollouts // rows), shared=shared,
    )  # fmt: skip


def pair_program(run: Run, stage: str, model, length: int, resident: int, pairs: int) -> Program:
    """Log-probs of pairs; the model that gives them is among what the stage holds."""
    rows = scoring.rows_of_pass(run.mesh)
    length = bucket(length, scoring.SMALLEST_BUCKET)
    params = run.params(model, "policy")
    texts = run.rows({name: int32(rows, length) for name in ("tokens", "positions", "segments")})
    batch = Batch(rows, length, length)
    return Program(
        stage, "score pairs", SCORING, run.key("pairs", model, rows, length, run.config.model),
        lambda: scoring.lower_pairs(run.config, model, run.mesh, params, texts), size(params, texts), 0,
        arithmetic.pass_temporaries(model, run.mesh, batch, run.itemsize), resident - size(params),
        arithmetic.forward_work(model, run.mesh, batch, run.itemsize), ceil(pairs / rows),
    )  # fmt: skip


def reward_program(run: Run, stage: str, model, length: int, resident: int, texts: int) -> Program:
    """The reward model's scores of texts; it is among what the stage holds."""
    rows = scoring.rows_of_pass(run.mesh)
    length = bucket(length, scoring.SMALLEST_BUCKET)
    params = run.params(model, "reward")
    texts_of = run.rows({name: int32(rows, length) for name in ("tokens", "positions")})
    batch = Batch(rows, length, None)
    return Program(
        stage, "score texts", SCORING, run.key("rewards", model, rows, length, run.config.model),
        lambda: scoring.lower_rewards(run.config, model, run.mesh, params, *texts_of.values()),
        size(params, texts_of), 0, arithmetic.pass_temporaries(model, run.mesh, batch, run.itemsize),
        resident - size(params), arithmetic.forward_work(model, run.mesh, batch, run.itemsize), ceil(texts / rows),
    )  # fmt: skip


def train_program(
    run: Run, stage, objective, params, settings, steps, batch, resident, passes, reference=None
) -> Program:  # fmt: skip
    """A train step. `passes`: models that it trains, each with the batch that goes through it.

    `resident` are the models as they were loaded: with adapters the step is handed them, without it has a copy. Of a
    `reference` model, which is one of them, the step runs a forward pass on what goes through the first of `passes`.
    """
    model, microbatches = run.config.model, settings.microbatches
    schedule = make_schedule(settings.optimizer, max(1, steps))
    optimizer = make_optimizer(settings.optimizer, schedule)
    params = run.adapted(params)
    trained, kept = parts(params, reference)
    state = run.train_state(trained, optimizer)
    shapes = tuple((name, leaf.shape, str(leaf.dtype)) for name, leaf in batch.items())
    models, count = tuple(config for config, _ in passes), sum(leaf.size for leaf in jax.tree.leaves(trained))
    anchored = reference is not None
    shared = size(kept["policy"]) if anchored else 0  # what adapters stand on is the reference itself
    key = run.key(f"{stage} train step", models, shapes, microbatches, model, run.config.lora, anchored)
    sizes = [
        (config, run.mesh, whole, microbatches, model.remat, run.itemsize, count // len(passes))
        for config, whole in passes
    ]
    work = [arithmetic.training_work(*each) for each in sizes]
    if anchored:
        work.append(arithmetic.forward_work(passes[0][0], run.mesh, passes[0][1], run.itemsize))
    temporaries = [arithmetic.training_temporaries(*each) for each in sizes]
    if anchored:
        temporaries.append(arithmetic.pass_temporaries(passes[0][0], run.mesh, passes[0][1], run.itemsize))

    def lower():
        return make_train_step(objective, optimizer, schedule, run.mesh, state, microbatches).lower(state, batch, kept)

    return Program(
        stage, "train step", TRAINING, key, lower, size(state, batch, kept), 0, sum(temporaries),
        resident - size(kept) + shared, sum(work, Work()), steps, passes[0][1].rows * passes[0][1].length, shared,
    )  # fmt: skip
