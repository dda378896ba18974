"""The plots of docs/results.md, as SVG files.

    python benchmarks/results_plots.py FOLDER --records RUN_OR_RECORD... [--revisions TITLE=RUN...]

shares.svg: what each model does with unsafe and with safe prompts, with 95% intervals over prompts and the goals.
curves.svg: how many unsafe prompts the odds of a refusal tell from look-alikes, by how many look-alikes they take for
unsafe. revisions.svg: how many answers of a run of `critique_revision` decline after each of its revisions.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]  # a checkout need not be installed

from results import MODELS, SHARES, is_of, of, read_records  # noqa: E402

from cai_jax.errors import exit_code  # noqa: E402
from cai_jax.run_folder import StageFolder  # noqa: E402
from cai_jax.statistics import grouped_share, wilson_interval  # noqa: E402

SHOWN = ("unsafe prompts declined", "unsafe prompts declined or answered safely", "safe look-alikes declined",
         "helpful prompts declined")  # fmt: skip
COLOURS = dict(zip(MODELS, ("#8a8b8d", "#1f77b5", "#d95f03", "#7571b4"), strict=True))


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("folder", type=Path)
    flags.add_argument("--records", nargs="+", type=Path, default=[], metavar="RUN_OR_RECORD")
    flags.add_argument("--revisions", nargs="+", default=[], metavar="TITLE=RUN")
    args = flags.parse_args()
    if unnamed := [text for text in args.revisions if "=" not in text]:
        flags.error(f"--revisions {unnamed[0]}: write TITLE=RUN")
    if not args.records and not args.revisions:
        flags.error("name --records, --revisions or both")
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.records:
        answers = read_records(args.records)[1]
        save(args.folder / "shares.svg", (7, 3), lambda axes: shares(axes, answers))
        save(args.folder / "curves.svg", (4, 3.5), lambda axes: curves(axes, answers))
    if args.revisions:
        runs = dict(text.split("=", 1) for text in args.revisions)
        save(args.folder / "revisions.svg", (5, 3), lambda axes: revisions(axes, runs))


def save(path: Path, size: tuple[float, float], draw) -> None:
    """Draw one panel into a file, with the same bytes every time."""
    with matplotlib.rc_context({"svg.hashsalt": path.stem, "font.size": 8}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


def shares(axes, answers) -> None:
    """Bars with intervals, a group a share, a colour a model; a share that has unread answers has no bar."""
    models = [model for model in MODELS if of(answers, model)]
    for place, title in enumerate(SHOWN):
        set_name, kind, goal = SHARES[title]
        for number, model in enumerate(models):
            own = of(answers, model, set_name)
            hits = [is_of(line, kind) for line in own]
            if own and None not in hits:
                share = grouped_share(hits, [line["id"] for line in own])
                x = place + (number - (len(models) - 1) / 2) / (len(models) + 1)
                label = MODELS[model] if place == 0 else None
                axes.bar(x, share["value"], 0.9 / (len(models) + 1), color=COLOURS[model], yerr=reach([share]),
                         capsize=2, error_kw={"linewidth": 0.8}, label=label)  # fmt: skip
        if goal:
            axes.hlines(float(goal.split()[1]), place - 0.45, place + 0.45, colors="#0a0b0c", linestyles=":")
    axes.set_xticks(range(len(SHOWN)), [title.replace(" declined", "\ndeclined") for title in SHOWN])
    axes.set_ylim(0, 1)


def reach(intervals: list[dict]) -> np.ndarray:
    """How far intervals reach down and up from their values, `[2, count]`; rounding may make that less than 0."""
    value, low, high = (np.asarray([interval[name] for interval in intervals]) for name in ("value", "low", "high"))
    return np.maximum([value - low, high - value], 0)


def curves(axes, answers) -> None:
    """Share of unsafe prompts whose odds are above a threshold, by that of look-alikes; a line a seed."""
    known = [line for line in answers if line["refusal_log_odds"] is not None]  # as records of earlier versions have it
    for model, seed in product(MODELS, sorted({line["seed"] for line in answers})):
        own = [line for line in of(known, model) if line["seed"] == seed]
        unsafe, safe = (
            np.asarray([line["refusal_log_odds"] for line in own if line["set"] == name])
            for name in ("red_team", "look_alike")
        )
        if len(unsafe) and len(safe):
            thresholds = np.concatenate([[np.inf], np.sort(np.concatenate([unsafe, safe]))[::-1]])
            told, taken = (np.mean(x >= thresholds[:, None], axis=1) for x in (unsafe, safe))
            label = None if any(line.get_label() == MODELS[model] for line in axes.lines) else MODELS[model]
            axes.plot(taken, told, color=COLOURS[model], label=label)
    axes.axvline(0.05, color="#0a0b0c", linestyle=":", linewidth=0.8)
    axes.set(xlabel="look-alikes above the threshold", ylabel="unsafe prompts above it", xlim=(0, 1), ylim=(0, 1))


def revisions(axes, runs: dict[str, str]) -> None:
    """Share that declines after no, one, two ... revisions, with 95% intervals."""
    for title, run in runs.items():
        rows = StageFolder(Path(run), "critique_revision").read_shards()
        kinds = [[row["kind"], *(entry["kind"] for entry in row["rounds"])] for row in rows]
        counts = range(min(map(len, kinds)))
        found = [wilson_interval(sum(row[n] == "refusal" for row in kinds), len(kinds)) for n in counts]
        axes.errorbar(counts, [share["value"] for share in found], reach(found), capsize=2, label=title)
    axes.set(xlabel="revisions", ylabel="answers that decline", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
