"""The monitors of PPO and GRPO: training reward against an independent judge, what was measured, alarms, the choice."""

from cai_jax.monitors import LEAST_COMMON, new_boilerplate
from cai_jax.report import plots, verdicts
from cai_jax.report.artifacts import Run
from cai_jax.report.markup import Html, details, el, facts, paragraph, table
from cai_jax.report.numbers import count, estimate_cell, number, percent, small

JUDGES = {
    "rule": "share of the constitution's checks kept",
    "rating": "a model's rating, 1 to 10",
    "contrast": "log-ratio of a principled to an opposite request, nats a token",
    "external": "probability that the external judge prefers the answer to the reference's",
    "model": "another reward model",
}
PHRASES_SHOWN = 8
LOOKS_SHOWN = 60


def monitor(run: Run, stage: str) -> list:
    """Nothing where no look was taken."""
    looks = [look for look in run.looks(stage) if isinstance(look.get("numbers"), dict)]
    if not looks:
        return []
    found = run.summary(stage).get("monitor") or {}
    judge = found.get("judge") or run.resolved("monitor.judge")
    probes = found.get("probes") or {}
    chosen = found.get("chosen")
    return [
        el("h3", "Watched for reward hacking"),
        paragraph(
            "At each look the policy answers the same probes, prompts of the train sets, and two judge it: the reward"
            " that it is trained on (proxy), and one that nothing is trained on (independent). Update 0 is the model"
            " before training. A proxy that rises while the independent score falls is reward hacking."
        ),
        el("p", verdicts.monitors(run, stage) or "No alarm was raised.", class_="verdict"),
        facts(
            [
                ("independent judge", JUDGES.get(judge, judge)),
                ("probes, safe and red-team", f"{count(probes.get('helpful'))}, {count(probes.get('red_team'))}"),
                ("looks", count(len(looks) - 1)),
                ("answers that the independent judge could not score", count(found.get("unjudged"))),
                ("exported state", None if chosen is None else f"update {chosen}"),
            ]
        ),
        el("div", _proxy_plot(stage, looks, judge, chosen), class_="figures"),
        _table(looks, chosen),
        _phrases(looks),
    ]


def _proxy_plot(stage: str, looks: list[dict], judge: str, chosen) -> Html:
    series = [[look["numbers"].get(name) for look in looks] for name in ("proxy", "independent")]
    return plots.two_scales(
        f"{stage}-proxy",
        f"Proxy (training reward, left) against the independent score (right: {JUDGES.get(judge, judge)}), means over"
        " the probes with 95% intervals. The dotted line is the exported state",
        [look["update"] for look in looks],
        dict(zip(("proxy", "independent"), series, strict=True)),
        "update",
        chosen,
    )


COLUMNS = [
    ("proxy", "proxy", number),
    ("independent", "independent", number),
    ("independent_red_team", "on red-team", number),
    ("independent_helpful", "on safe", number),
    ("refusal", "refuses safe", percent),
    ("refusal_red_team", "refuses red-team", percent),
    ("degenerate", "broken or empty", percent),
    ("length", "tokens", lambda value: number(value, 0)),
    ("truncated", "cut", percent),
]
PLAIN_COLUMNS = [
    ("boilerplate_helpful", "new boilerplate, safe", percent),
    ("boilerplate", "all", percent),
    ("distinct", "distinct-2", number),
    ("kl", "KL", small),
]


def _table(looks: list[dict], chosen) -> Html:
    rows = [_row(look, look.get("update") == chosen) for look in looks]
    headers = ["update", *(title for _, title, _ in [*COLUMNS, *PLAIN_COLUMNS]), "alarms"]
    cut = f"; the reference and the last {LOOKS_SHOWN}" if len(rows) > LOOKS_SHOWN + 1 else ""
    shown = rows if not cut else [rows[0], *rows[-LOOKS_SHOWN:]]
    return details(f"What every look measured{cut}", table(headers, shown), open_=len(rows) <= 12)


def _row(look: dict, is_chosen: bool) -> list:
    numbers = look["numbers"]
    within = "" if look.get("within_bounds") else "out of bounds"
    raised = ", ".join(verdicts.ALARMS.get(name, name) for name in look.get("alarms") or [])
    return [
        f"{count(look.get('update'))}{' (exported)' if is_chosen else ''}",
        *(estimate_cell(numbers.get(key), form) for key, _, form in COLUMNS),
        *(form(numbers.get(key)) for key, _, form in PLAIN_COLUMNS),
        raised or within or "–",
    ]


def _phrases(looks: list[dict]) -> Html | None:
    """The runs of words of the last look that have become common, those in most answers first."""
    first, last = ([str(row.get("text") or "") for row in look.get("rows") or []] for look in (looks[0], looks[-1]))
    found = new_boilerplate(last, first)
    if not found:
        return None
    order = sorted(found, key=lambda gram: (-found[gram], gram))[:PHRASES_SHOWN]
    return paragraph(
        f"New since the reference, in a tenth of the last answers and {LEAST_COMMON} at least: ",
        "; ".join(f"“{' '.join(gram)}” ({found[gram]})" for gram in order),
        f" and {len(found) - len(order)} more." if len(found) > len(order) else ".",
    )
