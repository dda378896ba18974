"""The section of the evaluation, and what the models wrote side by side."""

import math
from collections import Counter, defaultdict

from cai_jax.report import plots
from cai_jax.report.artifacts import MODELS, SETS, Run, order
from cai_jax.report.markup import Html, badge, details, el, paragraph, section, table, text_block
from cai_jax.report.numbers import count, known, number
from cai_jax.report.verdicts import of_set

WARNING = "Content warning: prompts written to draw out harm, and unfiltered answers of a model to them."
PROMPTS_A_SET = 2


def evaluate(run: Run, titles: dict[str, str]) -> list:
    """Plots of the evaluation and what changed prompt by prompt."""
    summary = run.stages["evaluate"].summary or {}
    models = {model: found or {} for model, found in (summary.get("models") or {}).items() if model in MODELS}
    rows = list(run.rows("evaluate"))
    figures = [
        _grouped(
            models,
            "refusal",
            "ev-refusal",
            "Share refused, with 95% intervals. Wanted: high on unsafe prompts, low on the others",
            share=True,
        ),
        _grouped(
            models, "degenerate", "ev-degenerate", "Share of degenerate text, with 95% intervals", share=True
        ),
        _grouped(models, "length", "ev-length", "Mean length of an answer in tokens, with 95% intervals"),
    ]
    return [
        paragraph(
            "Every model answers prompts that no stage trained on: unsafe ones, safe ones that look unsafe,"
            " and plain helpful ones. The table stands at the top of the page."
        ),
        el("div", figures, _margins(rows), class_="figures"),
        _changes(rows),
    ]


def _grouped(models: dict, measure: str, name: str, caption: str, share: bool = False) -> Html:
    groups = {
        label: {model: of_set(found, key).get(measure) for model, found in models.items()}
        for key, label in SETS.items()
    }
    found = any(
        (interval or {}).get("value") is not None for bars in groups.values() for interval in bars.values()
    )
    return plots.grouped_bars(name, caption, groups, share) if found else Html("")


def _margins(rows: list[dict]) -> list[Html]:
    """One panel a model: the margin on unsafe prompts and on the others."""
    margins = defaultdict(lambda: {"unsafe": [], "others": []})
    for row in rows:
        if known(row.get("margin")):
            margins[row["model"]]["unsafe" if row["set"] == "red_team" else "others"].append(row["margin"])
    everything = [value for groups in margins.values() for values in groups.values() for value in values]
    if not everything:
        return []
    span = (min(everything), max(everything) + 1e-6)
    return [
        plots.outlines(
            f"ev-margin-{model}",
            f"{label}: margin of refusing over complying. Apart: the model tells unsafe prompts from others",
            margins[model],
            "log-prob of refusing − complying",
            span,
        )
        for model, label in MODELS.items()
        if model in margins
    ]


def sign_test(one_way: int, other_way: int) -> float:
    """Exact two-sided sign test (McNemar's): how often a fair coin splits at least this unevenly."""
    n, most = one_way + other_way, max(one_way, other_way)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(most, n + 1)) / 2**n) if n else 1.0


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else number(p, 3)


def _changes(rows: list[dict]) -> Html | None:
    """The same prompts before and after: how many changed between refused and not."""
    refused = {(row["set"], row["id"], row["model"]): row["kind"] == "refusal" for row in rows}
    tally = defaultdict(Counter)
    for (name, prompt, model), after in refused.items():
        before = refused.get((name, prompt, "base"))
        if model != "base" and before is not None:
            tally[name, model][before, after] += 1
    if not tally:
        return None
    body = [
        [
            SETS[name],
            MODELS[model],
            count(cell.total()),
            count(cell[False, True]),
            count(cell[True, False]),
            _p_value(sign_test(cell[False, True], cell[True, False])),
        ]
        for name in SETS
        for model in MODELS
        if (cell := tally.get((name, model)))
    ]
    return Html(
        el("h3", "The same prompts, base against trained")
        + table(["prompts", "model", "n", "newly refused", "no longer refused", "p"], body, numeric_from=2)
        + paragraph(
            "p: how often chance alone would split the changed prompts at least this unevenly (exact sign"
            " test). Several tests stand here at once; one p below 0.05 among them is no surprise."
        )
    )


def side_by_side(run: Run) -> Html:
    """What each model wrote to the same prompts, a few of each set, chosen without looking at the texts."""
    prompts = defaultdict(dict)
    for row in run.rows("evaluate"):
        prompts[row["set"], row["id"]][row["model"]] = row
    blocks = []
    for name, label in SETS.items():
        chosen = sorted((key for key in prompts if key[0] == name), key=lambda key: order(key[1]))[
            :PROMPTS_A_SET
        ]
        shown = [_one_prompt(prompts[key]) for key in chosen]
        if shown and name == "red_team":
            blocks.append(details(f"{WARNING} Show {len(shown)} unsafe prompts.", shown, class_="warned"))
        elif shown:
            blocks.append(Html(el("h3", label.capitalize()) + "".join(shown)))
    rule = paragraph(
        f"Chosen by rule: of each set, the {PROMPTS_A_SET} prompts whose id comes first by SHA-256, whatever"
        " the models wrote."
    )
    return section(
        "answers",
        "The models side by side",
        *(
            [rule, *blocks]
            if blocks
            else [el("p", f"Evaluation: {run.stages['evaluate'].status}.", class_="missing")]
        ),
    )


def _one_prompt(answers: dict[str, dict]) -> Html:
    first = next(iter(answers.values()))
    return el(
        "article",
        conversation(first["messages"], first["id"], first.get("category")),
        el("div", [_answer(model, answers[model]) for model in MODELS if model in answers], class_="columns"),
    )


def conversation(messages: list[dict], row_id, category) -> Html:
    """The prompt with all earlier turns."""
    return el(
        "div",
        el("p", badge(category) if category else None, " ", el("code", row_id), class_="note"),
        [el("div", el("h5", message["role"]), text_block(message["content"])) for message in messages],
        class_="prompt",
    )


def _answer(model: str, row: dict) -> Html:
    numbers = (
        f"margin {number(row.get('margin'))} · reward {number(row.get('reward'))} ·"
        f" log-ratio to base {number(row.get('kl'))}"
    )
    return el(
        "div",
        el("h4", MODELS[model], " ", badge(row["kind"], row["kind"])),
        text_block(row["response"]["text"]),
        extent(row["response"]),
        el("p", numbers, class_="note"),
    )


def extent(text: dict) -> Html:
    """Tokens of a text, and whether it was cut."""
    return el(
        "p",
        f"{count(text['tokens'])} tokens",
        " ",
        badge("cut at the limit", "bad") if text["truncated"] else None,
        class_="note",
    )
