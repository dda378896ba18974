"""The programs of each stage, with what the stage holds in memory while they run."""

from dataclasses import replace
from math import ceil, comb

from cai_jax.config_rules import rates_revisions
from cai_jax.conversation_sets import taken
from cai_jax.labelers.pleading import PLEAS
from cai_jax.plan.arithmetic import Batch
from cai_jax.plan.programs import GENERATION, SCORING, Program, Run, float32, int32, size
from cai_jax.plan.sampling import Load, sampler_bytes, sampler_programs
from cai_jax.plan.shared import pair_program, reward_program, score_program, train_program
from cai_jax.sampler.engine import bucket
from cai_jax.stages import dpo, grpo, ppo, reward_model, scoring, sft
from cai_jax.stages.inputs import best_of_n_is_a_model, labelers_of
from cai_jax.stages.training import parts


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
    answer, revision = settings.response.max_new_tokens, settings.revision.max_new_tokens
    critique = settings.critique.max_new_tokens if settings.critiques else 0
    new_tokens = answer + settings.rounds * (critique + settings.draws * revision)
    context = max(run.workload.starts["critique_revision"]) + prompt + answer + critique + revision / 2
    prefilled = prompt + settings.rounds * (prompt + answer)  # each round asks about the newest revision
    if rates_revisions(run.config):  # all are scored after two sets of worked answers, which all rows share
        prefilled += settings.rounds * 2 * (prompt + settings.draws * revision)
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
    work = [(model, Batch(*shape, settings.sequence_length))]
    loss = sft.objective(run.config, model, settings.anchor, settings.share_start)
    train = train_program(
        run, "sft", loss, base, settings, steps, batch, size(base), work, base if settings.anchor else None
    )
    return [*sampler_programs(run, "sft", model, base, size(base), load), train]


def _pairs(run: Run) -> int:
    """How many pairs `preferences` makes: each two responses of a prompt."""
    return _asked(run) * comb(run.config.preferences.responses_per_prompt, 2)


def _asked(run: Run) -> int:
    """How many prompts `preferences` takes."""
    share = run.config.preferences.share
    return sum(taken(share, run.workload.rows(name)) for name in ("red_team", "helpful"))


def _preferences(run: Run) -> list[Program]:
    settings, base = run.config.preferences, run.params(run.models["model.source"], "policy")
    policy, judge = run.models["preferences.policy"], run.models["preferences.judge"]
    pairs = _pairs(run)
    prompt, answer = run.workload.tokens("red_team", "helpful"), settings.response.max_new_tokens
    slots = run.config.sampler.rows
    prompts, responses = _asked(run), settings.responses_per_prompt
    starts = run.workload.starts["responses"]  # a prompt is run once for each
    answers = Load.of(
        slots, prompts, responses * answer, len(starts) * prompt, max(starts) + prompt + answer / 2
    )
    principles = settings.principles or run.workload.principles
    asked = settings.labelers, 2 if settings.orders == "both" else 1, principles
    new_tokens, prefilled = _label_tokens(run, *asked, prompt, 2 * answer)
    context = max(run.workload.starts["labels"]) + prompt + 2 * answer
    labels = Load.of(slots, pairs, new_tokens, prefilled, context)
    writer, reader = run.params(policy, "policy"), run.params(judge, "policy")
    beside = size(base) + (size(reader) if run.config.preferences.judge else 0)
    return [
        *sampler_programs(run, "preferences", policy, writer, size(base, writer), answers),
        *sampler_programs(run, "preferences", judge, reader, beside, labels, SCORING),
    ]


def _judge(run: Run) -> list[Program]:
    settings, reader = run.config.judge, run.models["preferences.judge"]
    names, gold = labelers_of(run.config, "judge"), run.workload.gold
    base, judge = run.params(run.models["model.source"], "policy"), run.params(reader, "policy")
    principles = run.workload.principles if settings.principles == "all" else 1
    new_tokens, prefilled = _label_tokens(run, names, 2, principles, 0, gold.tokens)
    pleading = min(settings.pleas, gold.rows) * (len(PLEAS) + (1 + len(PLEAS)) * run.config.preferences.guard)
    context = max(run.workload.starts["judge"]) + gold.tokens
    load = Load.of(run.config.sampler.rows, gold.rows + pleading, new_tokens, prefilled, context)
    beside = size(base) + (size(judge) if run.config.preferences.judge else 0)
    return sampler_programs(run, "judge", reader, judge, beside, load, SCORING)


def _label_tokens(run: Run, names, orders: int, principles: int, prompt: float, answers: float) -> tuple[int, float]:
    """What labelers draw and what they run of a pair; principles share the pair where it stands before them."""
    reasoning = run.config.preferences.thought.reasoning.max_new_tokens
    pair = prompt + answers
    prefilled = {
        "options": orders * pair,
        "thought": orders * (pair + principles * reasoning),
        "contrast": 2 * principles * pair,
        "examples": 2 * pair,
        "rating": 2 * prompt + answers,
    }
    new_tokens = orders * principles * reasoning if "thought" in names else 0
    return new_tokens, sum(prefilled.get(name, 0) for name in names)


def _reward_model(run: Run) -> list[Program]:
    settings = run.config.reward_model
    model = replace(run.models["reward_model.start"], score_heads=settings.heads)
    start = run.params(model, "reward")
    pairs = _pairs(run)
    held_out = ceil(settings.held_out * pairs)
    shape = settings.batch_size, settings.max_length
    batch = run.rows({
        **{name: int32(*shape) for name in ("tokens", "positions", "segments")},
        "last": int32(settings.batch_size, 2),
        "probability": float32(settings.batch_size),
        "real": int32(settings.batch_size),
        **({"head_weights": float32(settings.batch_size, settings.heads)} if settings.heads > 1 else {}),
    })  # fmt: skip
    steps = settings.epochs * ceil((pairs - held_out) / settings.batch_size)
    objective = reward_model.objective(run.config, model)
    adapted = run.adapted(start)
    _, kept = parts(adapted)  # what trains is donated to the state
    train = train_program(
        run, "reward_model", objective, start, settings, steps, batch, size(kept), [(model, Batch(*shape, None))]
    )
    held = train.resident + train.arguments - size(batch)
    return [train, reward_program(run, "reward_model", model, settings.max_length, held, 2 * held_out)]


def _ppo(run: Run) -> list[Program]:
    settings, policy, scorer = run.config.ppo, run.models["ppo.policy"], run.models.get("ppo.reward_model")
    params, value = {"policy": run.params(policy, "policy")}, None
    if settings.value_trunk == "separate":
        value = replace(scorer or policy, score_heads=1)
        params["value"] = run.params(value, "reward")
    else:
        params["policy"]["score"] = run.params(policy, "reward")["score"]
    objective = ppo.objective(run.config, policy, value, bias=0.0)
    columns = ("old_logprobs", "advantages", "returns", "old_values")
    valued = (value or policy, "value" if value else "policy")
    return _reinforced(run, "ppo", objective, params, columns, valued, settings.updates + 1)


def _grpo(run: Run) -> list[Program]:
    policy = run.models["grpo.policy"]
    params, objective = {"policy": run.params(policy, "policy")}, grpo.objective(run.config, policy)
    return _reinforced(run, "grpo", objective, params, ("old_logprobs", "ref_logprobs"), None, run.config.grpo.updates)


def _reinforced(run: Run, stage: str, objective, params, columns, valued, draws: int) -> list[Program]:
    """The programs of a stage that learns from `draws` draws of rollouts.

    `params` are the models that train, by name, `columns` those of its batch with a number a token. `valued`: what
    gives the values of rollouts, its shape and its name in `params`; None where nothing does.
    """
    settings, policy = getattr(run.config, stage), run.models[f"{stage}.policy"]
    scorer, judge = (run.models.get(f"{stage}.{name}") for name in ("reward_model", "judge"))
    prompt = ceil(settings.max_prompt_tokens / 32) * 32
    answer, rollouts = settings.response.max_new_tokens, settings.rollouts
    reference = run.params(policy, "policy", settings.frozen_dtype)
    reward = run.params(scorer, "reward", settings.frozen_dtype) if scorer else None
    rater = run.params(judge, "policy") if judge else None
    watcher = run.models.get("monitor.model")
    watches = run.params(watcher, "reward" if run.config.monitor.judge == "model" else "policy") if watcher else None
    rows, length = rollouts // settings.minibatches, prompt + answer
    batch = run.rows({
        **{name: int32(rows, length) for name in ("tokens", "positions")}, "mask": int32(rows, answer),
        **{name: float32(rows, answer) for name in columns},
        **({} if "advantages" in columns else {"advantages": float32(rows)}),
    })  # fmt: skip
    passes = [(policy, Batch(rows, length, answer))]
    if "value" in params:
        passes.append((valued[0], Batch(rows, length, None)))
    train = train_program(
        run, stage, objective, params, settings, settings.updates * settings.epochs * settings.minibatches, batch,
        size(reference, reward, rater, watches), passes,
    )  # fmt: skip
    adapted, held = run.adapted(params), train.resident + train.arguments - size(batch)
    value = (valued[0], adapted[valued[1]]) if valued else (None, None)
    score = score_program(run, stage, (policy, reference), value, (scorer, reward), prompt, held, draws)
    slots = run.config.sampler.rows
    load = Load.of(slots, rollouts, answer, prompt, prompt + answer / 2, draws)
    programs = sampler_programs(run, stage, policy, adapted["policy"], held, load)
    if judge:
        # A request holds the conversation and some words around it.
        asked = Load.of(slots, rollouts, 0, length, length, draws)
        programs += sampler_programs(run, stage, judge, rater, held, asked, SCORING)
    programs += _looks(run, stage, (policy, adapted["policy"]), scorer, (judge, rater), (watcher, watches), held)
    return [*programs, score, train]


def _looks(run: Run, stage: str, policy, scorer, judge, watcher, held: int) -> list[Program]:
    """What the monitors add: answers to the probes, and their scores by the training reward and the independent judge.

    `policy`, `judge` and `watcher` are pairs of shape and params, or of None. `held`: all that the stage holds.
    """
    settings, slots = run.config.monitor, run.config.sampler.rows
    if not settings.every:
        return []
    sets = ("red_team", "helpful")
    prompt, answer = run.workload.tokens(*sets), settings.response.max_new_tokens
    probes = sum(min(settings.probes, run.workload.rows(name)) for name in sets)
    looks = 1 + ceil(getattr(run.config, stage).updates / settings.every)  # one is at the reference
    length = bucket(round(prompt) + answer, scoring.SMALLEST_BUCKET)
    load = Load.of(slots, probes, answer, prompt, prompt + answer / 2, looks)
    programs = sampler_programs(run, stage, *policy, held, load)

    def asked(model, params, requests):
        load = Load.of(slots, probes, 0, requests * (prompt + answer), prompt + answer, looks)
        return sampler_programs(run, stage, model, params, held, load, SCORING)

    if scorer:
        programs.append(reward_program(run, stage, scorer, length, held, looks * probes))
    if judge[0]:
        programs += asked(*judge, 1)
    if settings.judge == "model":
        programs.append(reward_program(run, stage, watcher[0], length, held, looks * probes))
    elif watcher[0]:
        principles = run.workload.principles if settings.principles == "all" else 1
        programs += asked(*watcher, principles * (2 if settings.judge == "contrast" else 1))
    return programs


def _dpo(run: Run) -> list[Program]:
    settings, model = run.config.dpo, run.models["dpo.policy"]
    start = run.params(model, "policy")
    pairs = _pairs(run)
    held_out = ceil(settings.held_out * pairs)
    shape = settings.batch_size, settings.max_length
    batch = run.rows({
        **{name: int32(*shape) for name in ("tokens", "positions", "segments")},
        "ref_logprobs": float32(settings.batch_size, 2),
        "real": int32(settings.batch_size),
        **({"smoothing": float32(settings.batch_size)} if settings.soft_labels else {}),
    })  # fmt: skip
    steps = settings.epochs * ceil((pairs - held_out) / settings.batch_size)
    train = train_program(
        run, "dpo", dpo.objective(run.config, model), start, settings, steps, batch, size(start),
        [(model, Batch(*shape, settings.max_length))],
    )  # fmt: skip
    # The reference's before training, the policy's of the held-out ones after it.
    held = train.resident + train.arguments - size(batch)
    return [pair_program(run, "dpo", model, settings.max_length, held, pairs + held_out), train]


def _best_of_n(run: Run) -> list[Program]:
    settings = run.config.best_of_n
    policy, scorer = run.models["best_of_n.policy"], run.models["best_of_n.reward_model"]
    params, new_tokens = run.params(policy, "policy"), settings.response.max_new_tokens
    rows, prompt = run.workload.rows("red_team", "helpful"), run.workload.tokens("red_team", "helpful")
    held = size(params, run.params(scorer, "reward"))
    load = Load.of(run.config.sampler.rows, rows, settings.n * new_tokens, prompt, prompt + new_tokens / 2)
    programs = [
        *sampler_programs(run, "best_of_n", policy, params, held, load),
        reward_program(run, "best_of_n", scorer, round(prompt) + new_tokens, held + sampler_bytes(run, policy),
                 settings.n * rows),
    ]  # fmt: skip
    if not settings.distill:
        return programs
    shape = settings.batch_size, settings.sequence_length
    steps = settings.epochs * ceil(rows * (prompt + new_tokens) / settings.sequence_length / settings.batch_size)
    batch = run.rows({name: int32(*shape) for name in ("tokens", "positions", "segments", "targets")})
    train = train_program(
        run, "best_of_n", sft.objective(run.config, policy), params, settings, steps, batch, size(params),
        [(policy, Batch(*shape, settings.sequence_length))],
    )  # fmt: skip
    return [*programs, train]


def _evaluate(run: Run) -> list[Program]:
    settings, base_model = run.config.evaluate, run.models["model.source"]
    sets = ("eval_red_team", "eval_helpful", "eval_look_alike")
    rows, prompt = run.workload.rows(*sets), run.workload.tokens(*sets)
    answer = settings.response.max_new_tokens
    model, reward = run.models["evaluate.rl"], run.models["evaluate.reward_model"]
    base, other = run.params(base_model, "policy"), run.params(model, "policy")
    held = size(base, other, run.params(reward, "reward")) + sampler_bytes(run, base_model)
    # Each contender answers and reads a good answer; the base reads what the others wrote.
    contenders = _contenders(run.config)
    draws, read = sum(contenders.values()), len(contenders) * (prompt + 2 * (prompt + answer))
    load = Load.of(run.config.sampler.rows, rows, draws * answer, read, prompt + answer / 2)
    return [
        *sampler_programs(run, "evaluate", model, other, held, load),
        reward_program(
            run, "evaluate", reward, bucket(round(prompt) + answer, scoring.SMALLEST_BUCKET), held, draws * rows
        ),
    ]


def _contenders(config) -> dict[str, int]:
    """Who is evaluated, with draws a prompt: base, SL-CAI, and what the config makes or names, else RL-CAI."""
    named = {"ppo": "rl", "dpo": "dpo", "best_of_n": "best_of_n", "grpo": "grpo"}
    made = [stage for stage, field in named.items() if stage in config.stages or getattr(config.evaluate, field)]
    found = dict.fromkeys(["base", "sft", *(made or ["ppo"])], 1)
    if "best_of_n" in found and not best_of_n_is_a_model(config):
        found["best_of_n"] = config.best_of_n.n
    return found


_STAGES = {
    "red_team": _red_team,
    "critique_revision": _critique_revision,
    "sft": _sft,
    "judge": _judge,
    "preferences": _preferences,
    "reward_model": _reward_model,
    "ppo": _ppo,
    "dpo": _dpo,
    "best_of_n": _best_of_n,
    "grpo": _grpo,
    "evaluate": _evaluate,
}
