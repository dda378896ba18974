"""Hold back some train prompts, so that settings can be chosen without a look at the eval prompts.

    python benchmarks/dev_split.py FOLDER [--config cai_smollm2_full] [--every 6] [--set NAME=VALUE...]

Writes red_team.jsonl, helpful.jsonl and look_alike.jsonl there: the train prompts of the config, one in so many of them
(by a hash of its id) with the split `eval`. Prints the overrides that make a run train on the others and evaluate on
these (a limit of the config takes its first prompts of what is left):

    python -m cai_jax.launch --config=cai_smollm2_full --set run_dir=runs/d1 $(python benchmarks/dev_split.py runs/dev)

--set changes the config first: what public_prompts.py prints adds its prompts. Safe prompts are look-alikes where the
set that they are of says so by its name, or is one of eval_look_alike's.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]  # a checkout need not be installed

from public_prompts import check_name, print_overrides, write_sets  # noqa: E402

from cai_jax.config import PromptSet  # noqa: E402
from cai_jax.errors import UserError, exit_code  # noqa: E402
from cai_jax.named_runs import load_config  # noqa: E402
from cai_jax.overrides import apply_overrides, format_value  # noqa: E402
from cai_jax.prompt_sets import load_prompts, path_and_split  # noqa: E402
from cai_jax.provenance import row_seed  # noqa: E402


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("folder", type=Path)
    flags.add_argument("--config", default="cai_smollm2_full")
    flags.add_argument("--every", type=int, default=6)
    flags.add_argument("--set", dest="changes", action="append", default=[], metavar="NAME=VALUE")
    args = flags.parse_args()
    check_name(args.folder)
    if args.every < 2:
        raise UserError(f"--every {args.every}: one prompt in at least two can be held back")
    prompts = apply_overrides(load_config(args.config)[1], args.changes).prompts
    alike = {path for path, _ in sources(prompts.eval_look_alike)}
    sets = {"red_team": [], "helpful": [], "look_alike": []}
    for name in ("red_team", "helpful"):
        prompt_set = getattr(prompts, name)
        for path, split in sources(prompt_set):
            kind = "look_alike" if name == "helpful" and ("look_alike" in path or path in alike) else name
            found = load_prompts(dataclasses.replace(prompt_set, path=path, split=split, more=(), limit=0), name).rows
            sets[kind] += [as_row(prompt, args.every) for prompt in found]
    write_sets(args.folder, sets)
    print_overrides(overrides(prompts, args.folder))


def sources(prompt_set) -> list[tuple[str, str]]:
    """Path and split of each of the sets that a config joins."""
    return [(prompt_set.path, prompt_set.split), *map(path_and_split, prompt_set.more)]


def as_row(prompt, every: int) -> dict:
    """A prompt as a line of a set; whether it is held back depends on its id alone."""
    held = row_seed(0, "dev", prompt.id) % every == 0
    return {"id": prompt.id, "category": prompt.category, "prompt": list(prompt.messages), "answer": prompt.answer,
            "split": "eval" if held else "train"}  # fmt: skip


def overrides(prompts, folder: Path) -> list[str]:
    """The fields of a config's prompts that make it train on what is left, and evaluate on what is held back alone."""
    path = {kind: str(folder.resolve() / f"{kind}.jsonl") for kind in ("red_team", "helpful", "look_alike")}
    more = (f"{path['look_alike']}:train",)
    wanted = {
        "red_team": PromptSet(path["red_team"], split="train", limit=prompts.red_team.limit),
        "helpful": PromptSet(path["helpful"], split="train", limit=prompts.helpful.limit, more=more),
    } | {f"eval_{kind}": PromptSet(path[kind], split="eval") for kind in path}
    return [
        f"prompts.{name}.{field.name}={format_value(getattr(own, field.name))}"
        for name, own in wanted.items()
        for field in dataclasses.fields(own)
        if getattr(own, field.name) != getattr(getattr(prompts, name), field.name)
    ]


if __name__ == "__main__":
    sys.exit(exit_code(main))
