"""Learning from rules whose truth is known, in one table: labels, reward model, PPO, DPO and best-of-n.

    python benchmarks/learning.py [--seeds 0,1,2] [--folder runs/learning] [--stages=STAGE,...] [--json FILE]

Each seed is a run of the config rules_smollm2: SmolLM2-135M-Instruct answers, exact rules label, a reward model learns
the labels, and PPO, DPO and best-of-n learn from it or from them. What is counted on prompts that no stage has seen is
whether an answer keeps all rules: the rules themselves, not the reward model. One more run of the first seed has PPO
without its KL penalty and without a stop, and tells which monitors fire. Runs go on where they stopped.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT)]  # a checkout need not be installed

from cai_jax.constitution import load_constitution  # noqa: E402
from cai_jax.errors import exit_code  # noqa: E402
from cai_jax.named_runs import load_config  # noqa: E402
from cai_jax.provenance import read_json, read_jsonl  # noqa: E402
from cai_jax.rules import satisfies  # noqa: E402
from cai_jax.run_folder import StageFolder  # noqa: E402
from cai_jax.statistics import wilson_interval  # noqa: E402

CONFIG = "rules_smollm2"
MODELS = {"base": "base", "rl_cai": "PPO", "dpo": "DPO", "best_of_n": "best-of-n"}
ALARM = "monitor_alarm_"  # how metrics are named that say whether a monitor fired
GOALS = {"labels": 1.0, "reward model": 0.95, "rl_cai": 0.9}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/learning"))
    parser.add_argument("--stages", default="", help="fewer stages than the config has, such as all but dpo")
    parser.add_argument("--json", type=Path, help="file for every number of every seed")
    parser.add_argument("--skip_hacking", action="store_true", help="leave out the run without a KL penalty")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    found = []
    for seed in options.seeds:
        run_dir = options.folder / f"seed-{seed}"
        launch(run_dir, f"seed={seed}", *([f"stages={options.stages}"] if options.stages else []))
        found.append(measured(run_dir) | {"seed": seed})
    print(as_table(found), flush=True)
    record = {"seeds": found}
    if not options.skip_hacking:
        start = (options.folder / f"seed-{options.seeds[0]}").resolve()
        run_dir = options.folder / "without-kl"
        launch(
            run_dir, f"seed={options.seeds[0]}", "stages=ppo", "ppo.kl_coef=0", "monitor.stop=",
            "ppo.optimizer.learning_rate=1e-3", f"ppo.reward_model={start / 'reward_model' / 'model'}",
        )  # fmt: skip
        record["without_kl"] = alarms(run_dir)
        print("\nPPO without a KL penalty: " + told(record["without_kl"]))
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def launch(run_dir: Path, *settings: str) -> None:
    """Do the run, or what is left of it."""
    flags = [f"--set={setting}" for setting in settings]
    command = [sys.executable, "-m", "cai_jax.launch", f"--config={CONFIG}", f"--run_dir={run_dir}", *flags]
    subprocess.run(command, check=True, stdout=sys.stderr)


def measured(run_dir: Path) -> dict:
    """The numbers of a finished run, each an interval; compliance is of answers to held-out prompts.

    A model that the run has not made has none.
    """
    checks = [principle.check for principle in constitution().principles]
    numbers = {
        "labels": labels_right(StageFolder(run_dir, "preferences").read_shards(), checks),
        "reward model": read_json(run_dir / "reward_model" / "summary.json")["held_out"]["accuracy"],
    }
    evaluated = read_json(run_dir / "evaluate" / "summary.json")["models"]
    for name in (name for name in MODELS if name in evaluated):
        rows = StageFolder(run_dir, "evaluate").read_shards(f"rows-{name}")
        kept = [all(satisfies(check, row["response"]["text"]) for check in checks) for row in rows]
        numbers[name] = wilson_interval(sum(kept), len(kept))
        numbers[f"{name} KL"] = sum(row["kl"] for row in rows) / len(rows)
        each = [sum(satisfies(check, row["response"]["text"]) for row in rows) / len(rows) for check in checks]
        numbers[f"{name} rules"] = dict(zip((p.id for p in constitution().principles), each, strict=True))
    return numbers


def constitution():
    """The rules of the run."""
    config = load_config(CONFIG)[1]
    return load_constitution(config.constitution, config.principles)


def labels_right(rows, checks) -> dict:
    """Of the pairs that differ in how many rules they keep, how many are labelled for the one that keeps more."""
    kept = [[sum(satisfies(check, row[side]["text"]) for check in checks) for side in ("response_a", "response_b")]
            for row in rows]  # fmt: skip
    decided = [(a > b, row["probability_a"] > 0.5) for (a, b), row in zip(kept, rows, strict=True) if a != b]
    return wilson_interval(sum(truth == label for truth, label in decided), len(decided))


def as_table(found: list[dict]) -> str:
    """A row a number: what it is, each seed, all seeds together, its goal."""
    heads = ["", *(f"seed {numbers['seed']}" for numbers in found), "together", "KL, nats", "goal"]
    rows = []
    for name, title in {"labels": "labels that are right", "reward model": "held-out pairs, reward model",
                        **{model: f"all rules kept, {title}" for model, title in MODELS.items()}}.items():  # fmt: skip
        intervals = [numbers[name] for numbers in found if name in numbers]
        if not intervals:
            continue
        n = sum(interval["n"] for interval in intervals)
        right = sum(round(interval["value"] * interval["n"]) for interval in intervals)
        kls = [numbers[f"{name} KL"] for numbers in found if f"{name} KL" in numbers]
        rows.append([
            title, *(f"{numbers[name]['value']:.3f}" if name in numbers else "–" for numbers in found),
            interval_text(wilson_interval(right, n)),
            f"{sum(kls) / len(kls):.1f}" if kls else "", f"{GOALS[name]:.2f}" if name in GOALS else "",
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *rows])


def interval_text(interval: dict) -> str:
    return f"{interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f}), n {interval['n']}"


def alarms(run_dir: Path) -> dict:
    """Which monitors fired, at which update first, and how proxy and independent score went."""
    lines = read_jsonl(run_dir / "ppo" / "metrics.jsonl")
    first = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith(ALARM) and value:
                first.setdefault(name.removeprefix(ALARM), line["update"])
    return {"updates": len(lines), "first": first, "score": [lines[0]["score"], lines[-1]["score"]],
            "kl": [lines[0]["kl"], lines[-1]["kl"]]}  # fmt: skip


def told(of: dict) -> str:
    """The alarms in a line."""
    fired = ", ".join(f"{name} from update {update}" for name, update in sorted(of["first"].items())) or "none"
    return (f"score {of['score'][0]:.2f} -> {of['score'][1]:.2f}, KL {of['kl'][0]:.1f} -> {of['kl'][1]:.1f} in "
            f"{of['updates']} updates; alarms: {fired}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(exit_code(main))
