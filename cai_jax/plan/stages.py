"""The programs of each stage, with what the stage holds in memory while they run."""

from math import ceil

import jax

from cai_jax.models import lora
from cai_jax.plan import arithmetic
from cai_jax.plan.arithmetic import Batch, Work
from cai_jax.plan.programs import GENERATION, SCORING, TRAINING, Program, Run, float32, int32, size
from cai_jax.plan.sampling import Load, sampler_bytes, sampler_programs
from cai_jax.sampler.engine import bucket
from cai_jax.stages import ppo, reward_model, scoring, sft
from cai_jax.training.step import make_optimizer, make_schedule, make_train_step, split


def programs_of(run: Run) -> list[Program]:
    """The programs of the run's stages, in their order."""
    return [program for stage in run.config.stages for program in _STAGES[stage](run)]


WRITTEN, QUESTION_TOKENS = 5, 64  # prompts asked for in a list of red_team; tokens of a request beside its prompts


def _red_team(run: Run) -> list[Program]:
    settings, base = run.config.red_team, run.params(run.models["model.source"], "policy")
    writer, target = run.models["red_team.writer"], run.models["red_team.target"]
    given, prompt = run.workload.rows("red_team"), run.workload.tokens("red_team")
    lists = settings.draws * run.workload.prompts["red_team"].categories
    written, answered = settings.request.max_new_tokens, settings.response.max_new_tokens
    shown, slots = settings.examples * prompt + QUESTION_TOKENS, run.config.sampler.rows
    write = Load.of(slots, lists, written, shown, shown + written / 2)
    sort = Load.of(slots, given + WRITTEN * lists, 0, prompt + QUESTION_TOKENS, prompt + QUESTION_TOKENS)
    answer = Load.of(slots, WRITTEN * lists, answered, prompt, prompt + answered / 2)
    programs = []
    for model, field, load, share in (
        (writer, "writer", write, GENERATION), (writer, "writer", sort, SCORING), (target, "target", answer, GENERATION)
    ):  # fmt: skip
        params = run.params(model, "policy")
        held = size(base) + (size(params) if getattr(settings, field) else 0)
        programs += sampler_programs(run, "red_team", model, params, held, load, share)
    return programs


def _critique_revision(run: Run) -> list[Program]:
    settings, base = run.config.critique_revision, run.params(run.models["model.source"], "policy")
    rows, prompt = run.workload.rows("red_team"), run.workload.tokens("red_team")
    answer, critique, revision = (
        sampling.max_new_tokens for sampling in (settings.response, settings.critique, settings.revision)
    )
    new_tokens = answer + settings.rounds * (critique + revision)
    context = run.workload.preambles["critique_revision"] + prompt + answer + critique + revision / 2
    prefilled = prompt + settings.rounds * (prompt + answer)  # each round asks about the newest revision
    load = Load.of(run.config.sampler.rows, rows, new_tokens, prefilled, context)
    return sampler_programs(run, "critique_revision", run.models["model.source"], base, size(base), load)


def _sft(run: Run) -> list[Program]:
    settings, model = run.config.sft, run.models["model.source"]
    base = run.params(model, "policy")
    rows, prompt = run.workload.rows("helpful"), run.workload.tokens("helpful")
    new_tokens = settings.helpful.max_new_tokens
    load = Load.of(run.config.sampler.rows, rows, new_tokens, prompt, prompt + new_tokens / 2)
    chains = run.config.critique_revision
    revisions = run.workload.rows("red_team") * chains.rounds
    tokens = revisions * (run.workload.tokens("red_team") + chains.revision.max_new_tokens)
    tokens += rows * (prompt + new_tokens)
    steps = settings.epochs * ceil(tokens / settings.sequence_length / settings.batch_size)
    shape = settings.batch_size, settings.sequence_length
    batch = run.rows({name: int32(*shape) for name in ("tokens", "positions", "segments", "targets")})
    train = _training(
        run, "sft", sft.objective(run.config, model), base, settings, steps, batch, size(base),
        [(model, Batch(*shape, settings.sequence_length))],
    )  # fmt: skip
    return [*sampler_programs(run, "sft", model, base, size(base), load), train]


def _preferences(run: Run) -> list[Program]:
    settings, base = run.config.preferences, run.params(run.models["model.source"], "policy")
    policy, judge = run.models["preferences.policy"], run.models["preferences.judge"]
    pairs = run.workload.rows("red_team", "helpful") * settings.pairs_per_prompt
    prompt, answer = run.workload.tokens("red_team", "helpful"), settings.response.max_new_tokens
    slots = run.config.sampler.rows
    answers = Load.of(slots, pairs, 2 * answer, prompt, prompt + answer / 2)
    pair = prompt + 2 * answer
    labels = Load.of(slots, pairs, 0, 2 * pair, run.workload.preambles["preferences"] + pair)
    writer, reader = run.params(policy, "policy"), run.params(judge, "policy")
    beside = size(base) + (size(reader) if run.config.preferences.judge else 0)
    return [
        *sampler_programs(run, "preferences", policy, writer, size(base, writer), answers),
        *sampler_programs(run, "preferences", judge, reader, beside, labels, SCORING),
    ]


def _reward_model(run: Run) -> list[Program]:
    settings, model = run.config.reward_model, run.models["reward_model.start"]
    start = run.params(model, "reward")
    pairs = run.workload.rows("red_team", "helpful") * run.config.preferences.pairs_per_prompt
    held_out = ceil(settings.held_out * pairs)
    shape = settings.batch_size, settings.max_length
    batch = run.rows({
        **{name: int32(*shape) for name in ("tokens", "positions", "segments")},
        "last": int32(settings.batch_size, 2),
        "probability": float32(settings.batch_size),
        "real": int32(settings.batch_size),
    })  # fmt: skip
    steps = settings.epochs * ceil((pairs - held_out) / settings.batch_size)
    objective = reward_model.objective(run.config, model)
    train = _training(
        run, "reward_model", objective, start, settings, steps, batch, size(start), [(model, Batch(*shape, None))]
    )
    held = train.resident + train.arguments - size(batch)
    return [train, _rewards(run, "reward_model", model, settings.max_length, held, 2 * held_out)]


def _ppo(run: Run) -> list[Program]:
    settings, policy, value = run.config.ppo, run.models["ppo.policy"], run.models["ppo.reward_model"]
    prompt = ceil(settings.max_prompt_tokens / 32) * 32
    answer, rollouts, updates = settings.response.max_new_tokens, settings.rollouts, settings.updates
    reference, reward = (
        run.params(model, kind, settings.frozen_dtype) for model, kind in ((policy, "policy"), (value, "reward"))
    )
    rows, length = rollouts // settings.minibatches, prompt + answer
    batch = run.rows({
        **{name: int32(rows, length) for name in ("tokens", "positions")},
        "mask": int32(rows, answer),
        **{name: float32(rows, answer) for name in ("old_logprobs", "advantages", "returns", "old_values")},
    })  # fmt: skip
    params = {"policy": run.params(policy, "policy"), "value": run.params(value, "reward")}
    train = _training(
        run, "ppo", ppo.objective(run.config, policy, value, bias=0.0), params, settings,
        updates * settings.epochs * settings.minibatches, batch, size(reference, reward),
        [(policy, Batch(rows, length, answer)), (value, Batch(rows, length, None))],
    )  # fmt: skip
    load = Load.of(run.config.sampler.rows, rollouts, answer, prompt, prompt + answer / 2, updates + 1)
    adapted, held = run.adapted(params), train.resident + train.arguments - size(batch)
    score = _score(run, policy, value, (reference, adapted["value"], reward), prompt, held, updates + 1)
    return [*sampler_programs(run, "ppo", policy, adapted["policy"], held, load), score, train]


def _score(run: Run, policy, value, params, prompt: int, held: int, batches: int) -> Program:
    """Reference log-probs, values and rewards in one program. `held`: all that the stage holds, its params included."""
    settings = run.config.ppo
    answer, parts = settings.response.max_new_tokens, settings.minibatches * settings.microbatches
    rows = settings.rollouts // parts
    length = prompt + answer
    part = run.rows({
        **{name: int32(rows, length) for name in ("tokens", "positions")}, "mask": int32(rows, answer),
    })  # fmt: skip
    scalars = value, Batch(rows, length, None)
    passes = [(policy, Batch(rows, length, answer)), scalars, scalars]
    # With adapters the value model and the reward model are one copy of what stays frozen.
    shared = size(split(params[1], lora.trainable(params[1]))[1])
    forms = run.config.model, run.config.lora, settings.frozen_dtype
    return Program(
        "ppo", "score rollouts", SCORING, run.key("ppo score", policy, value, rows, length, answer, *forms),
        lambda: ppo.lower_score(run.config, policy, value, *params, part), size(params, part), 0,
        sum(arithmetic.pass_temporaries(model, run.mesh, batch, run.itemsize) for model, batch in passes),
        held - size(params) + shared,
        sum((arithmetic.forward_work(model, run.mesh, batch, run.itemsize) for model, batch in passes), Work()),
        batches * parts, shared=shared,
    )  # fmt: skip


def _evaluate(run: Run) -> list[Program]:
    settings, base_model = run.config.evaluate, run.models["model.source"]
    sets = ("eval_red_team", "eval_helpful", "eval_look_alike")
    rows, prompt = run.workload.rows(*sets), run.workload.tokens(*sets)
    answer = settings.response.max_new_tokens
    model, reward = run.models["evaluate.rl"], run.models["evaluate.reward_model"]
    base, other = run.params(base_model, "policy"), run.params(model, "policy")
    held = size(base, other, run.params(reward, "reward")) + sampler_bytes(run, base_model)
    # Three models answer; the base reads what the others wrote.
    load = Load.of(run.config.sampler.rows, rows, 3 * answer, 3 * prompt + 3 * (prompt + answer), prompt + answer / 2)
    return [
        *sampler_programs(run, "evaluate", model, other, held, load),
        _rewards(run, "evaluate", reward, bucket(round(prompt) + answer, scoring.SMALLEST_BUCKET), held, 3 * rows),
    ]


def _rewards(run: Run, stage: str, model, length: int, resident: int, texts: int) -> Program:
    """The reward model's scores of texts; it is among what the stage holds."""
    rows = scoring.rows_of_pass(run.mesh)
    length = bucket(length, scoring.SMALLEST_BUCKET)
    params = run.params(model, "reward")
    texts_of = run.rows({name: int32(rows, length) for name in ("tokens", "positions")})
    batch = Batch(rows, length, None)
    return Program(
        stage, "score texts", SCORING, run.key("rewards", model, rows, length, run.config.model),
        lambda: scoring.lower_rewards(run.config, model, params, *texts_of.values()),
        size(params, texts_of), 0, arithmetic.pass_temporaries(model, run.mesh, batch, run.itemsize),
        resident - size(params), arithmetic.forward_work(model, run.mesh, batch, run.itemsize), ceil(texts / rows),
    )  # fmt: skip


def _training(run: Run, stage, objective, params, settings, steps, batch, resident, passes) -> Program:
    """A train step. `passes`: models that it trains, each with the batch that goes through it.

    `resident` are the models as they were loaded: with adapters the step is handed them, without it has a copy.
    """
    model, microbatches = run.config.model, settings.microbatches
    schedule = make_schedule(settings.optimizer, max(1, steps))
    optimizer = make_optimizer(settings.optimizer, schedule)
    params = run.adapted(params)
    trained, kept = split(params, lora.trainable(params))
    state = run.train_state(trained, optimizer)
    shapes = tuple((name, leaf.shape, str(leaf.dtype)) for name, leaf in batch.items())
    models, count = tuple(config for config, _ in passes), sum(leaf.size for leaf in jax.tree.leaves(trained))
    key = run.key(f"{stage} train step", models, shapes, microbatches, model, run.config.lora)
    sizes = [
        (config, run.mesh, whole, microbatches, model.remat, run.itemsize, count // len(passes))
        for config, whole in passes
    ]
    work = [arithmetic.training_work(*each) for each in sizes]
    temporaries = [arithmetic.training_temporaries(*each) for each in sizes]

    def lower():
        return make_train_step(objective, optimizer, schedule, run.mesh, state, microbatches).lower(state, batch, kept)

    return Program(
        stage, "train step", TRAINING, key, lower, size(state, batch, kept), 0, sum(temporaries),
        resident - size(kept), sum(work, Work()), steps, passes[0][1].rows * passes[0][1].length,
    )  # fmt: skip


_STAGES = {
    "red_team": _red_team,
    "critique_revision": _critique_revision,
    "sft": _sft,
    "preferences": _preferences,
    "reward_model": _reward_model,
    "ppo": _ppo,
    "evaluate": _evaluate,
}
