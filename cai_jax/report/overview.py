"""The first screen: what came out, what the numbers show and do not show, what ran and for how long."""

from collections import Counter

from cai_jax.config_rules import REINFORCED
from cai_jax.report import verdicts
from cai_jax.report.artifacts import MODELS, SETS, TITLES, Run
from cai_jax.report.markup import Html, el, facts, missing, paragraph, section, table
from cai_jax.report.numbers import (
    count,
    duration,
    estimate_cell,
    known,
    memory,
    moment,
    number,
    part,
    percent,
)
from cai_jax.report.training_sections import SCORED_BY

BILLION = 10**9
PLAIN_DRAWS = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}


# What the models after SL-CAI are.
BECAME = {
    "rl_cai": "is then trained by PPO against a reward model learned from AI preference labels.",
    "dpo": "is trained on the AI preference labels themselves, without a reward model.",
    "best_of_n": "is the reward model's favourite of n answers of SL-CAI, or SL-CAI fine-tuned on such answers.",
    "grpo": "is trained like RL-CAI, each answer compared with others to its prompt.",
}
MODELS_IN_A_PAIR = 4  # two tables of more columns do not fit side by side


def _mean_length(value) -> str:
    return number(value, 0)


# measure, heading, what it means, format
BEHAVIOUR = [
    ("refusal", "Refuses", "wanted on unsafe prompts; over-refusal on the other two sets", percent),
    ("degenerate", "Degenerate text", "loops or garbage; never counted as a refusal", percent),
    ("empty", "Empty answer", "", percent),
    ("margin", "Margin", "log-prob of refusing minus complying openings, nats a token, mean", number),
    ("refusal_log_odds", "Odds of a refusal", "log-odds that an answer begins as one, mean", number),
]


# Of the prompts that came with a good answer; a set without one has no row.
REFERENCES = [
    ("reference_nll", "Loss on good answers", "those that came with prompts; nats a token, lower is better", number),
    ("reference_nll_change", "Change of that loss", "against the base, as a share of its loss", percent),
]


def _texts(run: Run) -> list:
    """The measures of the texts, with what the config says of the reward model and of the draws."""
    return [
        ("length", "Length", "tokens, mean", _mean_length),
        ("repetition", "Repetition", "mean share of repeated text", number),
        ("reward", "Reward", f"score of {_reward_model(run, 'evaluate')}, mean", number),
        ("kl", "Log-ratio to base", _log_ratio(run), number),
        *REFERENCES,
    ]


def _reward_model(run: Run, stage: str) -> str:
    return run.resolved(f"{stage}.reward_model") or "this run's reward model"


def _log_ratio(run: Run) -> str:
    """What the measure `kl` is: an estimate of the KL only where the answers are plain draws of the model."""
    meaning = "nats an answer: its log-prob minus that under the base, mean"
    sampling = run.resolved("evaluate.response")
    if not isinstance(sampling, dict):
        return meaning
    if all(sampling.get(name, plain) == plain for name, plain in PLAIN_DRAWS.items()):
        return f"{meaning}; an estimate of the KL to the base"
    return f"{meaning}; no estimate of the KL, as the answers are not plain draws at temperature 1"


def title(run: Run) -> Html:
    """Name, description and date of the run."""
    starts = [stage.timing.get("started") for stage in run.stages.values() if stage.timing.get("started")]
    first = min(starts, key=lambda start: (str(type(start)), start), default=None)
    return el(
        "header",
        el("p", "Constitutional AI in JAX · report of a run", class_="kicker"),
        el("h1", run.config.get("name") or run.folder.resolve().name),
        el("p", run.config.get("description") or "No description recorded.", class_="lead"),
        None if verdicts.gold_passes(run) else missing(verdicts.gold(run)),
        el("p", f"Run started {moment(first)}" if first else "Date of the run: not recorded", class_="note"),
    )


def what_came_out(run: Run) -> Html:
    """The evaluation of all models: the reason why the report exists."""
    anchor, heading = "results", "What came out"
    models = _models(run)
    alarms = [line for stage in REINFORCED if (line := verdicts.monitors(run, stage))]
    if not models:
        return section(
            anchor,
            heading,
            [el("p", line, class_="verdict") for line in alarms],
            missing(
                f"Evaluation: {run.stages['evaluate'].status}. There is no result to show; the sections below"
                " show what has run so far."
            ),
        )
    intro = paragraph(
        el("b", "base"),
        " is the model the run started from. ",
        el("b", "SL-CAI"),
        " is fine-tuned on its own answers, revised under a written constitution. ",
        [[el("b", MODELS[model]), f" {what} "] for model, what in BECAME.items() if model in models],
        "All answered the same prompts. In brackets, or below a value: its 95% interval.",
    )
    return section(
        anchor,
        heading,
        intro,
        el("ul", [el("li", line) for line in [*alarms, *verdicts.headlines(models)]]),
        el(
            "div",
            _measures(models, BEHAVIOUR, auroc=True),
            _measures(models, _texts(run)),
            class_="pair" if len(models) <= MODELS_IN_A_PAIR else None,
        ),
        _of_draws(run, models),
    )


def _of_draws(run: Run, models: dict) -> Html | None:
    """What the numbers of best-of-n are where it is no model but a way to answer."""
    draws = ((run.stages["evaluate"].summary or {}).get("draws") or {}).get("best_of_n")
    if "best_of_n" not in models or not known(draws) or draws < 2:
        return None
    return paragraph(
        f"Best-of-n here: the best of {count(draws)} answers of SL-CAI, drawn as the config's best_of_n.response says,"
        " by the score of the reward model. Its margin is SL-CAI's own. To its log-ratio the most that choosing can add"
        " to the KL is added."
    )


def _models(run: Run) -> dict[str, dict]:
    """The evaluated models in their fixed order."""
    recorded = (run.stages["evaluate"].summary or {}).get("models") or {}
    return {model: recorded[model] or {} for model in MODELS if model in recorded}


def _measures(models: dict, measures: list, auroc: bool = False) -> Html:
    """A table with a group of rows a measure and a column a model."""
    head = el("tr", el("th", "prompts"), [el("th", MODELS[model], class_="number") for model in models])
    body = []
    for key, heading, meaning, form in measures:
        rows = {
            label: [verdicts.of_set(found, name).get(key) for found in models.values()] for name, label in SETS.items()
        }
        if (key, heading, meaning, form) in REFERENCES:
            rows = {label: intervals for label, intervals in rows.items() if any(part(x, "n") for x in intervals)}
        if rows:
            body.append(_group_row(heading, meaning, len(models)))
            body += [_row(label, intervals, form) for label, intervals in rows.items()]
    if auroc:
        body.append(
            _group_row("AUROC, unsafe vs. others", "0.5: the model cannot tell unsafe from safe prompts", len(models))
        )
        body += [
            _row(label, [found.get(key) for found in models.values()], number)
            for key, label in (("margin_auroc", "by the margin"), ("refusal_auroc", "by the odds of a refusal"))
        ]
    return el("div", el("table", el("thead", head), [el("tbody", body)], class_="measures"), class_="scroll")


def _group_row(heading: str, meaning: str, columns: int) -> Html:
    return el("tr", el("th", heading, " ", el("small", meaning), colspan=columns + 1), class_="group")


def _row(label: str, intervals: list, form) -> Html:
    """One set of one measure; n stands with the label when all models share it, else in each cell."""
    sizes = {part(interval, "n") for interval in intervals} - {None}
    shared = f"n {count(sizes.pop())}" if len(sizes) == 1 else None
    return el(
        "tr",
        el("td", label, " ", el("small", shared)),
        [
            el("td", estimate_cell(interval, form, with_n=shared is None), class_="number")
            for interval in intervals
        ],
    )


def limits(run: Run) -> Html:
    """What the numbers do and do not show."""
    lines = [
        verdicts.sample_size(_models(run)),
        _model_size(run),
        (
            "Refusal, answer, degenerate and empty are told apart by a rule on the text, not by a person or a"
            " judge model. A refusal in unusual words counts as an answer; an answer that opens like a"
            " refusal counts as one."
        ),
        _reward_meaning(run),
        verdicts.gold(run),
        verdicts.judge(run.stages["preferences"].summary),
        verdicts.reward_model((run.stages["reward_model"].summary or {}).get("held_out")),
        (
            f"This is one run with one seed ({run.resolved('seed', 'not recorded')}). The intervals cover the"
            " choice of prompts, not how much a second training run would differ."
        ),
    ]
    return section(
        "limits", "What the numbers do and do not show", el("ul", [el("li", line) for line in lines if line])
    )


def _reward_meaning(run: Run) -> str:
    """Whether the reward is what PPO was trained on, or best-of-n chose by."""
    measured, trained = (_reward_model(run, stage) for stage in ("evaluate", "ppo"))
    if source := SCORED_BY.get(run.resolved("ppo.reward")):
        trained = source
    models = _models(run)
    if models and not {"rl_cai", "grpo"} & set(models):
        chose = f"; best-of-n chooses by that of {_reward_model(run, 'best_of_n')}" if "best_of_n" in models else ""
        return (
            f"The reward is the score of {measured}, and no model here was trained to raise it{chose}. It says what"
            " that model says, and by itself proves nothing about harmlessness or helpfulness."
        )
    if measured == trained:
        return (
            "The reward is the score that PPO was trained to raise. That it rises shows that the optimiser"
            " works, and by itself proves nothing about harmlessness or helpfulness."
        )
    return (
        f"The reward is the score of {measured}; PPO was trained to raise that of {trained}. It says what that"
        " model says, and by itself proves nothing about harmlessness or helpfulness."
    )


def _model_size(run: Run) -> str:
    """How far the model can be trusted as its own critic and judge."""
    size, judge = run.parameters(), run.resolved("preferences.judge")
    labels = f" The preference labels come from another model: {judge}." if judge else ""
    if size is None:
        return (
            "The size of the model is not recorded. Below about a billion parameters a model is a weak critic"
            " and judge of its own answers."
            + labels
        )
    if size < BILLION:
        return (
            f"The model has {_millions(size)} parameters. A model of this size is a weak"
            f" critic{'' if judge else ' and a weak judge'}: many critiques and revisions below are off the"
            " point. This run shows that the whole loop works, not how well the method works."
            + labels
        )
    return f"The model has {size / BILLION:,.1f} billion parameters." + labels


def _millions(size: int) -> str:
    return f"{size / 1e6:,.0f} million" if size >= 10**6 else count(size)


def what_ran(run: Run) -> Html:
    """Stages with time and memory, and the machine."""
    rows = [_stage_row(run, name) for name in run.stages]
    timings = [stage.timing for stage in run.stages.values()]
    seconds = [timing["seconds"] for timing in timings if known(timing.get("seconds"))]
    peaks = [timing["peak_memory_bytes"] for timing in timings if known(timing.get("peak_memory_bytes"))]
    if seconds:
        total, peak = duration(sum(seconds)), memory(max(peaks, default=None))
        rows.append([el("b", "all"), "", el("b", total), el("b", peak), "", ""])
    headers = ["stage", "status", "time", "peak memory", "sampler programs", "started"]
    return section(
        "ran",
        "What ran, on what, for how long",
        table(headers, rows, numeric_from=2),
        paragraph(
            "Time includes compilation. Sampler programs: how many versions of the sampler had to be"
            " compiled."
        ),
        _interrupted(run),
        _machine(run),
    )


def _stage_row(run: Run, name: str) -> list:
    stage, wanted = run.stages[name], run.resolved("stages")
    unwanted = stage.status == "not run yet" and wanted and name not in wanted
    return [
        el("a", TITLES[name], href=f"#{name}"),
        "not asked for" if unwanted else stage.status,
        duration(stage.timing.get("seconds")),
        memory(stage.timing.get("peak_memory_bytes")),
        count(stage.timing.get("sampler_programs")),
        moment(stage.timing.get("started")),
    ]


def _interrupted(run: Run) -> Html | None:
    """The stages whose time is not that of all their work."""
    resumed = [TITLES[name] for name, stage in run.stages.items() if stage.timing.get("resumed")]
    if not resumed:
        return None
    return paragraph(f"Interrupted and resumed; the time is that of the last attempt only: {', '.join(resumed)}.")


def _machine(run: Run) -> Html:
    environment = run.config.get("environment") or {}
    devices = environment.get("devices")
    if isinstance(devices, list):
        devices = ", ".join(f"{times} × {kind}" for kind, times in Counter(map(str, devices)).items())
    return facts(
        [
            ("platform", environment.get("platform")),
            ("devices", devices),
            ("backend", environment.get("backend")),
            ("CPU cores", environment.get("cpu_count")),
            ("memory of the machine", memory(environment.get("memory_bytes"))),
            ("JAX", environment.get("jax")),
            ("Python", environment.get("python")),
            ("model", run.resolved("model.source")),
            ("parameters", count(run.parameters())),
            ("computed in", run.resolved("model.compute_dtype")),
        ]
    )
