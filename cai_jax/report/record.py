"""The record: chains of a few rows, failures and skipped rows by name, config and provenance."""

from collections import Counter

from cai_jax.report.artifacts import TITLES, Run, order
from cai_jax.report.data_sections import principle_name
from cai_jax.report.evaluation import WARNING, conversation, extent
from cai_jax.report.markup import (
    Html,
    badge,
    details,
    el,
    facts,
    missing,
    paragraph,
    section,
    table,
    text_block,
)
from cai_jax.report.numbers import count

CHAINS = 5
SKIPPED_SHOWN = 30  # of a stage or a prompt set
HASH_SHOWN = 16  # characters; the whole hash stands in config.json


def chains(run: Run, titles: dict[str, str]) -> Html:
    """Prompt, response, critique and revision of every round for a few rows chosen by a rule."""
    first_of = {}
    for row in run.rows("critique_revision"):
        kept = first_of.get(row.get("category"))
        if kept is None or order(row["id"]) < order(kept["id"]):
            first_of[row.get("category")] = row
    chosen = sorted(first_of.values(), key=lambda row: order(row["id"]))[:CHAINS]
    if not chosen:
        return section(
            "chains",
            "From prompt to revision, row by row",
            missing(f"Critique and revision: {run.stages['critique_revision'].status}."),
        )
    rule = paragraph(
        "Chosen by rule: rows in the order of the SHA-256 of their id, the first of each category, at most "
        f"{CHAINS}; whatever the model wrote."
    )
    return section(
        "chains",
        "From prompt to revision, row by row",
        rule,
        details(
            f"{WARNING} Show {len(chosen)} chains.", [_chain(row, titles) for row in chosen], class_="warned"
        ),
    )


def _chain(row: dict, titles: dict[str, str]) -> Html:
    return el(
        "article",
        conversation(row["messages"], row["id"], row.get("category")),
        el("h4", "Response"),
        text_block(row["response"]["text"]),
        extent(row["response"]),
        _flags(row.get("flags") or {}),
        [_round(step, titles) for step in row["rounds"]],
    )


def _round(step: dict, titles: dict[str, str]) -> Html:
    return el(
        "div",
        el(
            "h4",
            f"Round {step['round']}: ",
            principle_name(step["principle"], titles),
            " ",
            _flags(step["flags"]),
        ),
        el(
            "div",
            [
                el("div", el("h5", what.capitalize()), text_block(step[what]["text"]), extent(step[what]))
                for what in ("critique", "revision")
                if step[what]
            ],
            class_="columns",
        ),
        class_="round",
    )


def _flags(flags: dict[str, bool]) -> list[Html]:
    """Badges of the raised flags; what was cut says so below its own text."""
    return [badge(name, "bad") for name, raised in flags.items() if raised and not name.endswith("_truncated")]


def failures(run: Run) -> Html:
    """Every counter of every stage, the zero ones too."""
    rows = []
    for name, stage in run.stages.items():
        counters = (stage.summary or {}).get("counters")
        if counters is None:
            rows.append(
                [
                    TITLES[name],
                    el("em", stage.status if stage.summary is None else "no counters recorded"),
                    "",
                ]
            )
        rows += [
            [TITLES[name], el("code", counter), el("b", count(times)) if times else count(times)]
            for counter, times in sorted((counters or {}).items())
        ]
    unreadable = (
        [
            el("h3", "Files of this run that could not be read"),
            el("ul", [el("li", problem) for problem in run.problems]),
        ]
        if run.problems
        else None
    )
    return section(
        "failures",
        "Failures and other counts",
        paragraph(
            "Nothing is repaired in silence: what goes wrong with a row is counted here by name. A zero is "
            "shown, so that one sees what was looked for."
        ),
        table(["stage", "counter", "times"], rows, numeric_from=2),
        unreadable,
    )


def skipped(run: Run) -> Html:
    """Rows left out, by prompt set or stage and by reason."""
    sources = [
        (f"Prompts {name}", rows.get("skipped") or [], "config.json")
        for name, rows in (run.config.get("prompts") or {}).items()
    ]
    sources += [
        (TITLES[name], (stage.summary or {}).get("skipped") or [], f"{name}/summary.json")
        for name, stage in run.stages.items()
    ]
    blocks = [_left_out(*source) for source in sources if source[1]]
    return section("skipped", "Skipped rows", *(blocks or [paragraph("No finished stage skipped a row.")]))


def _left_out(source: str, rows: list[dict], file: str) -> Html:
    """How many rows for which reason, and the first of them by id."""
    reasons = Counter(str(row.get("reason")) for row in rows).most_common()
    which = [[el("code", row.get("id")), row.get("reason")] for row in rows[:SKIPPED_SHOWN]]
    more = (
        f"The first {SKIPPED_SHOWN} of {len(rows):,}; all stand in {file}."
        if len(rows) > SKIPPED_SHOWN
        else ""
    )
    return el(
        "div",
        el("h3", f"{source}: {len(rows):,}"),
        table(["reason", "rows"], [[reason, count(times)] for reason, times in reasons]),
        details("Which", table(["id", "reason"], which, numeric_from=9), paragraph(more) if more else None),
    )


def provenance(run: Run) -> Html:
    """What the run was made from, and its whole resolved config."""
    constitution = run.config.get("constitution") or {}
    named = "@".join(
        str(constitution[key]) for key in ("name", "version") if constitution.get(key) is not None
    )
    versions = run.config.get("versions") or {}
    prompts = run.config.get("prompts") or {}
    config = _flat(run.config.get("config") or {})
    return section(
        "config",
        "Config and provenance",
        facts(
            [
                ("constitution", named or None),
                ("its hash", _code(constitution.get("hash"))),
                ("model hash", _code(run.config.get("model_hash"))),
                ("seed", run.resolved("seed")),
                ("command", _code(run.config.get("command"))),
                ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or None),
            ]
        ),
        (
            table(
                ["prompts", "rows", "hash"],
                [
                    [name, count(rows.get("rows")), el("code", str(rows.get("hash"))[:HASH_SHOWN])]
                    for name, rows in prompts.items()
                ],
            )
            if prompts
            else None
        ),
        (
            details(
                f"Resolved config, {len(config)} values",
                table(
                    ["name", "value"],
                    [[el("code", name), el("code", value)] for name, value in config],
                    numeric_from=9,
                ),
            )
            if config
            else missing("The resolved config is not recorded.")
        ),
    )


def _code(value) -> Html | None:
    return None if value is None else el("code", value)


def _flat(config: dict, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted names and values of a nested config."""
    pairs = []
    for name, value in config.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", '""' if value == "" else str(value)))
    return pairs
