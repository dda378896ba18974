"""Hold back some train prompts, so that settings can be chosen without a look at the eval prompts.

    python benchmarks/dev_split.py FOLDER [--config cai_smollm2_full] [--every 6]

Writes red_team.jsonl, helpful.jsonl and look_alike.jsonl there: the train prompts of the config, one in so many of them
(by a hash of its id) with the split `eval`. Prints the overrides that make a run train and evaluate on them:

    python -m cai_jax.launch --config=cai_smollm2_full --run_dir=FOLDER/run $(python benchmarks/dev_split.py FOLDER)

Safe prompts are look-alikes where the set that they are of says so by its name.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT)]  # a checkout need not be installed

from cai_jax.named_runs import load_config  # noqa: E402
from cai_jax.prompt_sets import load_prompts, path_and_split  # noqa: E402
from cai_jax.provenance import row_seed  # noqa: E402


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("folder", type=Path)
    flags.add_argument("--config", default="cai_smollm2_full")
    flags.add_argument("--every", type=int, default=6)
    args = flags.parse_args()
    prompts = load_config(args.config)[1].prompts
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = {"red_team": [], "helpful": [], "look_alike": []}
    for name in ("red_team", "helpful"):
        for source, found in by_source(getattr(prompts, name), name):
            kind = "look_alike" if name == "helpful" and "look_alike" in source else name
            rows[kind] += [as_row(prompt, args.every) for prompt in found]
    for kind, own in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own)
        (args.folder / f"{kind}.jsonl").write_text(text, encoding="utf-8")
        held = sum(row["split"] == "eval" for row in own)
        print(f"{kind}: {len(own) - held} to train on, {held} held back", file=sys.stderr)
    print(" ".join(f"--set={shlex.quote(override)}" for override in overrides(args.folder)))


def by_source(prompt_set, name: str):
    """(path, prompts) of each of the sets that a config joins."""
    for source in (f"{prompt_set.path}:{prompt_set.split}" if prompt_set.split else prompt_set.path, *prompt_set.more):
        path, split = path_and_split(source)
        yield path, load_prompts(dataclasses.replace(prompt_set, path=path, split=split, more=()), name).rows


def as_row(prompt, every: int) -> dict:
    """A prompt as a line of a set; whether it is held back depends on its id alone."""
    held = row_seed(0, "dev", prompt.id) % every == 0
    return {"id": prompt.id, "category": prompt.category, "prompt": list(prompt.messages), "answer": prompt.answer,
            "split": "eval" if held else "train"}  # fmt: skip


def overrides(folder: Path) -> list[str]:
    """The fields of a config that make it train on what is left, and evaluate on what is held back."""
    path = {kind: folder.resolve() / f"{kind}.jsonl" for kind in ("red_team", "helpful", "look_alike")}
    chosen = {"red_team.path": path["red_team"], "red_team.more": "", "helpful.path": path["helpful"],
              "helpful.more": f"{path['look_alike']}:train", "eval_red_team.path": path["red_team"],
              "eval_helpful.path": path["helpful"], "eval_look_alike.path": path["look_alike"]}  # fmt: skip
    return [f"prompts.{name}={value}" for name, value in chosen.items()]


if __name__ == "__main__":
    main()
