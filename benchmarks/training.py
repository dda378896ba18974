"""Training against TRL, in one table: SFT, pairwise reward model, PPO.

    python benchmarks/training.py [--repeats 3] [--json FILE] [--engines ours,trl] [--parts sft,pairwise,ppo] ...

SmolLM2-135M-Instruct in all places. SFT: 8 rows of 512 tokens a step, all of them counted. Pairwise: 4 pairs a step,
each a prompt of 256 tokens with two responses of 256. PPO: 8 prompts of 64 tokens, 64 sampled after each, then 4
optimizer steps with all rows; policy, value, reference and reward model have 135M parameters each. Ours runs in float32
and with bfloat16 operands, TRL in float32, with which both are compared. The text is this repository's. AdamW as TRL
has it; gradient checkpointing is off in TRL. Every measurement is a process of its own with two threads; engines take
turns; loading, compiling and the first step are not counted. Memory is the most that the process has held.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(HERE / "peers"), str(ROOT)]  # a checkout need not be installed

from environments import python_of  # noqa: E402
from sampler import LOUD, PRECISIONS, OthersUse, last_json, names_of, processor, wait_for_quiet  # noqa: E402
from table import OURS, aligned  # noqa: E402

from cai_jax.config import cache_folder  # noqa: E402
from cai_jax.errors import UserError, exit_code  # noqa: E402

SCRIPTS = {OURS: "ours_training.py", "trl": "peers/trl_training.py"}
PARTS = {"sft": "tokens/s", "pairwise": "pairs/s", "ppo": "rollouts/s"}
ROWS, LENGTH = 8, 512
PAIRS, PAIR_PART = 4, 256
ROLLOUTS, PROMPT_TOKENS, NEW_TOKENS, EPOCHS = 8, 64, 64, 4
STEPS = {"sft": 4, "pairwise": 4, "ppo": 3}  # the first of them is not counted
# Ours over TRL in float32, at least: (part, our precision) -> ratio.
GOALS = {
    ("sft", "float32"): 1.5, ("sft", "bfloat16"): 2.5, ("pairwise", "float32"): 1.5, ("pairwise", "bfloat16"): 2.5,
    ("ppo", "float32"): 3.0,
}  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; lists are comma-separated names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, known in (("engines", tuple(SCRIPTS)), ("parts", tuple(PARTS)), ("precisions", PRECISIONS)):
        parser.add_argument(f"--{name}", type=names_of(known), default=known, help=f"of {','.join(known)}")
    parser.add_argument(
        "--peer_precisions", type=names_of(PRECISIONS), default=("float32",), help="TRL's; its float32 is compared with"
    )
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each; medians are shown")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--remat", default="dots", help="ours: a policy of model.remat")
    parser.add_argument("--json", type=Path, help="file for every single measurement")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    folder = cache_folder() / "bench"
    model = cache_folder() / "SmolLM2-135M-Instruct"
    if not (model / "model.safetensors").exists():
        raise UserError(f"{model}: is not there; run make model")
    pythons = {name: sys.executable if name == OURS else python_of(name, folder) for name in options.engines}
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    work = prepare(folder, model)
    machine = last_json([sys.executable, HERE / "machine.py"], folder / "machine.log")
    turns = turns_of(options)
    runs = []
    for number, turn in enumerate(turns, start=1):
        runs.append(measured(turn, pythons[turn[0]], folder, options))
        print(f"[{number}/{len(turns)}] {json.dumps(runs[-1])}", file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps({"machine": machine, "runs": runs}, indent=1) + "\n")
    print(summary(machine, runs, json.loads((model / "config.json").read_text()), work))
    return int(any("failed" in run for run in runs))


def turns_of(options) -> list[tuple[str, str, str]]:
    """(engine, part, precision) of every measurement, in order: engines take turns, and all of them repeat."""
    return [
        (engine, part, precision)
        for part in options.parts for precision in PRECISIONS for engine in options.engines
        if precision in (options.precisions if engine == OURS else options.peer_precisions)
    ] * options.repeats  # fmt: skip


def prepare(folder: Path, model: Path) -> dict:
    """The work file in `folder` (see peers/steps.py), and a copy of the model with a scalar head; returns the work."""
    from transformers import AutoTokenizer
    from work import exact_conversation

    from cai_jax.chat import encode_chat

    folder.mkdir(parents=True, exist_ok=True)
    reward = folder / "SmolLM2-135M-reward"
    if not (reward / "model.safetensors").exists():
        write_reward_model(model, reward)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = iter(text_ids(tokenizer))

    def take(count):
        return [next(ids) for _ in range(count)]

    def prompt(number):
        messages = exact_conversation(tokenizer, number, PROMPT_TOKENS)
        return {"messages": messages, "ids": encode_chat(tokenizer, messages)}

    work = {
        "model": str(model), "reward": str(reward), "new_tokens": NEW_TOKENS, "epochs": EPOCHS,
        "optimizer": {"learning_rate": 1e-5, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "clip_norm": 1.0},
        "sft": [[take(LENGTH) for _ in range(ROWS)] for _ in range(STEPS["sft"])],
        "pairwise": [
            [{name: take(PAIR_PART) for name in ("prompt", "chosen", "rejected")} for _ in range(PAIRS)]
            for _ in range(STEPS["pairwise"])
        ],
        "ppo": [[prompt(ROLLOUTS * step + row) for row in range(ROLLOUTS)] for step in range(STEPS["ppo"])],
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(work), encoding="utf-8")
    return work


def text_ids(tokenizer) -> list[int]:
    """Tokens of this repository's own files."""
    files = [ROOT / "README.md", ROOT / "WORKSPACE.md", *sorted((ROOT / "cai_jax").rglob("*.py"))]
    return tokenizer("\n".join(file.read_text(encoding="utf-8") for file in files), verbose=False)["input_ids"]


def write_reward_model(model: Path, folder: Path) -> None:
    """The model with a new scalar head, as a folder that both sides load."""
    from cai_jax.models.pretrained import load_model, save_model

    scalar = load_model(model, kind="reward", new_head=True)
    save_model(folder, scalar.config, scalar.params, scalar.tokenizer, scalar.hf_config, "reward")


def measured(turn: tuple[str, str, str], python, folder: Path, options) -> dict:
    """One measurement in a quiet moment; made once more if it was not quiet after all, and the quieter one counts."""
    engine, part, precision = turn
    command = [
        python, HERE / SCRIPTS[engine], folder / "training.json", "--part", part, "--precision", precision,
        "--threads", options.threads, "--remat", options.remat,
    ]  # fmt: skip
    tried = []
    while len(tried) < 2 and (not tried or tried[-1]["others"] > LOUD):
        waited, others = wait_for_quiet(), OthersUse()
        try:
            result = last_json(command, folder / f"{engine}.{part}.{precision}.log")
        except UserError as error:
            return {"engine": engine, "part": part, "precision": precision, "failed": str(error)}
        tried.append(result | {"others": others.cores(), "waited": waited})
    return {"engine": engine, "part": part, "precision": precision, **min(tried, key=lambda run: run["others"])}


def flops_of_step(config: dict, part: str) -> float:
    """Floating-point operations that a step cannot do without: 6 a weight and token, causal scores; PPO's likewise."""
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    body = layers * width * (2 * queries + 2 * keys + 3 * config["intermediate_size"])
    head = config["vocab_size"] * width

    def forward(rows, length, predicted):  # `predicted`: tokens a row whose logits are needed
        return 2 * rows * (length * body + predicted * head + layers * length * length * queries)

    if part == "sft":
        return 3 * forward(ROWS, LENGTH, LENGTH)
    if part == "pairwise":
        return 3 * forward(PAIRS, 3 * PAIR_PART, 0)
    length = PROMPT_TOKENS + NEW_TOKENS
    policy, scalar = forward(ROLLOUTS, length, NEW_TOKENS), forward(ROLLOUTS, length, 0)
    return policy + (policy + 2 * scalar) + 3 * EPOCHS * (policy + scalar)  # write, score, train


def summary(machine: dict, runs: list[dict], config: dict, work: dict) -> str:
    """The machine, the versions, the table and the losses."""
    versions = {run["engine"]: run["version"] for run in runs if "version" in run}
    loudest = max((run["others"] for run in runs if "others" in run), default=0.0)
    done = [run for run in runs if "failed" not in run]
    return "\n".join([
        f"{processor()}: multiplies {machine['float32_flops_per_second'] / 1e9:.0f} GFLOP/s in float32, "
        f"{machine['bfloat16_flops_per_second'] / 1e9:.0f} with bfloat16 operands",
        *(f"{engine}: {version}" for engine, version in versions.items()),
        f"others used at most {loudest:.2f} cores during a measurement",
        "",
        *table(done, machine, config),
        "",
        *losses(done),
        *("failed: {engine}, {part}, {precision}: {failed}".format(**run) for run in runs if "failed" in run),
    ])  # fmt: skip


def table(runs: list[dict], machine: dict, config: dict) -> list[str]:
    """A line for each part, engine and precision: medians of all steps of all runs."""
    amount = {"sft": ROWS * LENGTH, "pairwise": PAIRS, "ppo": ROLLOUTS}
    found: dict[tuple, dict] = {}
    for run in runs:
        at = found.setdefault((run["part"], run["engine"], run["precision"]), {"seconds": [], "bytes": []})
        at["seconds"] += run["seconds"]
        at["bytes"].append(run["peak_bytes"])
    cells = [("part", "engine", "precision", "speed", "", "seconds a step", "peak GiB", "ours / TRL float32", "goal")]
    for part, unit in PARTS.items():
        of_trl = found.get((part, "trl", "float32"))
        for (_, engine, precision), at in ((key, at) for key, at in found.items() if key[0] == part):
            seconds = median(at["seconds"])
            ours = engine == OURS
            ratio = median(of_trl["seconds"]) / seconds if of_trl and ours else None
            goal = GOALS.get((part, precision)) if ours else None
            cells.append((
                part, engine, precision, f"{amount[part] / seconds:.4g}", unit, f"{seconds:.2f}",
                f"{max(at['bytes']) / 2**30:.2f}", f"{ratio:.2f}" if ratio else "", f"{goal:.1f}" if goal else "",
            ))  # fmt: skip
        for precision in sorted({key[2] for key in found if key[0] == part}, reverse=True):
            seconds = flops_of_step(config, part) / machine[f"{precision}_flops_per_second"]
            cells.append((part, "machine's limit", precision, f"{amount[part] / seconds:.4g}", unit, f"{seconds:.2f}",
                          "", "", ""))  # fmt: skip
    return aligned(cells)


def losses(runs: list[dict]) -> list[str]:
    """The losses of the steps, a line for each part, engine and precision, and how far bfloat16 is from float32.

    Runs of one kind have the same losses: the first of them is shown.
    """
    curves: dict[tuple, list[float]] = {}
    for run in runs:
        curves.setdefault((run["part"], run["engine"], run["precision"]), run["losses"])
    lines = []
    for (part, engine, precision), curve in curves.items():
        line = f"losses of {part}, {engine}, {precision}: " + " ".join(f"{loss:.4f}" for loss in curve)
        exact = curves.get((part, engine, "float32"))
        if precision != "float32" and exact:
            furthest = max(abs(loss - other) for loss, other in zip(curve, exact, strict=True))
            line += f" (at most {furthest:.4f} from float32)"
        if curve:
            lines.append(line)
    return lines


if __name__ == "__main__":
    sys.exit(exit_code(main))
