"""The whole page: sections in their order, one style sheet, no script and nothing from outside."""

import os
from pathlib import Path

from cai_jax.report import (
    alternatives,
    data_sections,
    evaluation,
    judge_section,
    overview,
    record,
    red_team,
    training_sections,
)
from cai_jax.report.artifacts import TITLES, Run, principle_titles, read_run
from cai_jax.report.markup import Html, el, missing, section

# No script runs and nothing is fetched, whatever a model wrote.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_STAGE_SECTIONS = {
    "red_team": red_team.section,
    "critique_revision": data_sections.critique_revision,
    "sft": training_sections.sft,
    "judge": judge_section.judge,
    "preferences": data_sections.preferences,
    "reward_model": training_sections.reward_model,
    "ppo": training_sections.ppo,
    "dpo": alternatives.dpo,
    "best_of_n": alternatives.best_of_n,
    "grpo": training_sections.grpo,
    "evaluate": evaluation.evaluate,
}


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from the artifacts in `run_dir`; returns its path.

    Any stage may be missing, unfinished or damaged: its section then says so. Raises UserError when
    `run_dir` is not a folder.
    """
    path = Path(run_dir) / "report.html"
    page = build_page(read_run(run_dir))
    unfinished = path.with_suffix(".html.tmp")
    unfinished.write_text(page, encoding="utf-8", errors="replace")
    os.replace(unfinished, path)
    return path


def build_page(run: Run) -> str:
    """The report of a run as one HTML document."""
    titles = principle_titles(run)
    body = [
        _guarded(run, "title", "Run", lambda: overview.title(run)),
        _guarded(run, "results", "What came out", lambda: overview.what_came_out(run)),
        _guarded(run, "limits", "What the numbers do and do not show", lambda: overview.limits(run)),
        _guarded(run, "ran", "What ran, on what, for how long", lambda: overview.what_ran(run)),
        [
            _guarded(run, name, TITLES[name], lambda name=name: _stage_section(run, name, titles))
            for name in run.stages
        ],
        _guarded(run, "chains", "From prompt to revision, row by row", lambda: record.chains(run, titles)),
        _guarded(run, "answers", "The models side by side", lambda: evaluation.side_by_side(run)),
        _guarded(run, "failures", "Failures and other counts", lambda: record.failures(run)),
        _guarded(run, "skipped", "Skipped rows", lambda: record.skipped(run)),
        _guarded(run, "config", "Config and provenance", lambda: record.provenance(run)),
    ]
    name = run.config.get("name") or run.folder.resolve().name
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("title", f"{name}: Constitutional AI run"),
        el("style", Html(STYLE)),
    )
    return f'<!doctype html>\n{el("html", head, el("body", el("main", body)), lang="en")}\n'


def _guarded(run: Run, anchor: str, heading: str, build) -> Html:
    """A section, or the statement that its artifacts do not have the expected shape.

    The report closes a long run: one damaged file must not cost the other sections.
    """
    try:
        return build()
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        run.problems.append(f"section “{heading}”: {type(error).__name__}: {error}")
        return section(
            anchor, heading, missing(f"This section could not be drawn: {type(error).__name__}: {error}")
        )


def _stage_section(run: Run, name: str, titles: dict[str, str]) -> Html:
    stage = run.stages[name]
    if stage.status == "not run yet":
        return section(name, TITLES[name], missing("Not run yet."))
    notice = (
        missing("Unfinished: what follows is what has been written so far.")
        if stage.status != "done"
        else None
    )
    return section(name, TITLES[name], notice, *_STAGE_SECTIONS[name](run, titles))


STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
