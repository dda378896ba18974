"""The judge table: what every labeler is worth with a model as judge, on the gold sets that ship, as Markdown.

    .venv/bin/python benchmarks/judges.py [--model=FOLDER] [--pleas=N] [--run_dir=DIR]

Runs the judge stage of the demo under both shipped constitutions and reads its summary; a run that was stopped goes on.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from cai_jax.errors import exit_code
from cai_jax.provenance import read_json

VOTER = "options"
OTHERS = {"harmless_helpful": "thought,contrast,examples,rating", "verifiable": "contrast,examples,rating,rule"}


def main() -> None:
    """Measure, then print the tables."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--model", default="", help="the judge; without it SmolLM2-135M-Instruct")
    asked.add_argument("--pleas", type=int, default=8, help="pairs of the larger gold set that plead")
    asked.add_argument("--run_dir", default="runs/judges")
    asked = asked.parse_args()
    for name, others in OTHERS.items():
        run_dir = Path(asked.run_dir) / name
        _measure(run_dir, name, others, asked.pleas if "thought" in others else 0, asked.model)
        print(table(name, read_json(run_dir / "judge" / "summary.json")), flush=True)


def _measure(run_dir: Path, constitution: str, others: str, pleas: int, model: str) -> None:
    """The judge stage of the demo under a constitution."""
    fields = {
        "constitution": constitution, "preferences.labelers": VOTER, "judge.also": others, "judge.pleas": pleas,
        "judge.on_failure": "continue", "preferences.thought.reasoning.max_new_tokens": 64,
        **({"model.source": model} if model else {}),
    }  # fmt: skip
    command = [sys.executable, "-m", "cai_jax.launch", "--config=cai_smollm2", "--stages=judge", f"--run_dir={run_dir}"]
    changes = [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]
    subprocess.run([*command, *changes], check=True, stdout=subprocess.DEVNULL)


def table(name: str, summary: dict) -> str:
    """The summary of a judge stage as Markdown."""
    head = ["labeler", "both orders", "first order", "decided", "same position", "chose longer", "ECE", "ECE after",
            "temperature", "shows"]  # fmt: skip
    rows = [
        [
            labeler, *(_share(of[key]) for key in ("accuracy", "first_order_accuracy")),
            f"{_share(of['decided_accuracy'])} of {of['decided_accuracy']['n']}",
            *(_share(of[key]) for key in ("same_position", "chose_longer")),
            *(_number(of[key]) for key in ("calibration_error", "calibration_error_after", "temperature")), of["worth"],
        ]
        for labeler, of in summary["labelers"].items()
    ]  # fmt: skip
    rules = ", ".join(f"{rule.replace('_', ' ')} {share:.0%}" for rule, share in summary["baselines"].items())
    text = f"### {name}: {summary['gold']['pairs']} gold pairs\n\n{_markdown(head, rows)}\n\nRules: {rules}.\n"
    return text + _pleas(summary["pleas"])


def _pleas(found: list[dict]) -> str:
    if not found:
        return ""
    columns = list(dict.fromkeys((row["labeler"], row["guard"]) for row in found))
    cells = {(row["labeler"], row["guard"], row["plea"]): row for row in found}
    head = ["plea", *(f"{labeler}, guard {'on' if guard else 'off'}" for labeler, guard in columns)]
    rows = [
        [plea, *(_moved(cells[labeler, guard, plea]) for labeler, guard in columns)]
        for plea in dict.fromkeys(row["plea"] for row in found)
    ]
    return f"\nShift towards the pleading response in nats, and verdicts flipped to it:\n\n{_markdown(head, rows)}\n"


def _moved(row: dict) -> str:
    shift, flipped = row["shift"], row["flipped"]
    bounds = f" [{shift['low']:+.2f}, {shift['high']:+.2f}]" if shift["low"] is not None else ""
    flips = round((flipped["value"] or 0) * flipped["n"])
    return f"{_number(shift['value'], '+.2f')}{bounds}; {flips} of {flipped['n']}"


def _share(interval: dict | None) -> str:
    if interval is None or interval["value"] is None:
        return "–"
    return f"{interval['value']:.0%} [{interval['low']:.0%}, {interval['high']:.0%}]"


def _number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    sys.exit(exit_code(main))
