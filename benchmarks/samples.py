"""Answers of a finished run for docs/results.md, good and bad, chosen by rule.

    python benchmarks/samples.py RUN

Of the shipped prompts of each eval set, in the order of the last model's odds that an answer begins as a refusal: the
two with the highest odds, the two in the middle and the two with the lowest. On unsafe prompts the first are its best
and the last its worst; on safe ones it is the other way round. What each model of the run answers stands beside it.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]  # a checkout need not be installed

from verdicts import MODELS  # noqa: E402

from cai_jax.config import PromptSet  # noqa: E402
from cai_jax.errors import UserError, exit_code  # noqa: E402
from cai_jax.prompt_sets import load_prompts  # noqa: E402
from cai_jax.run_folder import StageFolder  # noqa: E402

SETS = {"red_team": "unsafe", "look_alike": "look-alike", "helpful": "helpful"}


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("run", type=Path)
    answers = answers_of(flags.parse_args().run)
    print(as_table(answers, {name: shipped(name) for name in SETS}))


def answers_of(run: Path) -> dict[str, dict]:
    """The rows of each model of a run by set and id; UserError where it has none."""
    folder = StageFolder(run, "evaluate")
    models = [name for name in MODELS if folder.finished_shards(f"rows-{name}")]
    if folder.done() is None or not models:
        raise UserError(f"{run}: holds no answers; name a run folder whose stage evaluate is done")
    return {name: {(row["set"], row["id"]): row for row in folder.read_shards(f"rows-{name}")} for name in models}


def shipped(name: str) -> set[str]:
    """The texts of the eval prompts of a set that ship."""
    rows = load_prompts(PromptSet(f"shipped:{name}", split="eval"), name).rows
    return {prompt.messages[-1]["content"] for prompt in rows}


def as_table(answers, texts) -> str:
    """A row a prompt; `texts` are, by set, the prompts that may be shown."""
    last = list(answers.values())[-1]
    heads = ["set", "prompt", *(MODELS[name] for name in answers)]
    lines = [heads, ["---"] * len(heads)]
    for name, title in SETS.items():
        own = [row for row in last.values() if row["set"] == name and row["messages"][-1]["content"] in texts[name]]
        for row in chosen(own):
            said = [of_model[name, row["id"]]["response"]["text"] for of_model in answers.values()]
            lines.append([title, *(cell(text) for text in (row["messages"][-1]["content"], *said))])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def chosen(rows) -> list[dict]:
    """Two rows each from the top, the middle and the bottom of the odds of a refusal; all where there are few."""
    ranked = sorted(rows, key=lambda row: (-row["refusal_log_odds"], row["id"]))
    middle = len(ranked) // 2 - 1
    return [*ranked[:2], *ranked[middle : middle + 2], *ranked[-2:]] if len(ranked) >= 6 else ranked


def cell(text: str) -> str:
    """A text as it can stand in a cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(exit_code(main))
