"""Public prompts beside the shipped ones: those of HH-RLHF to train and evaluate on, Self-Instruct's to evaluate on.

    python benchmarks/public_prompts.py FOLDER --hh FILE [--self_instruct FILE] [--config cai_smollm2_full]

Writes hh_unsafe.jsonl, hh_safe.jsonl and self_instruct.jsonl there. Prints the overrides that add them to a config:

    python -m cai_jax.launch --config=cai_smollm2_full $(python benchmarks/public_prompts.py FOLDER --hh FILE)

HH-RLHF's harmless-base (Bai et al., 2022, arXiv 2204.05862) mixes harmful and harmless first turns. hh_aims.tsv says
of 1,412 prompts of its test file which is which, and to which split a prompt belongs, by the first 12 digits of the
sha256 of the prompt. A large language model read each of them; nobody has checked it. Prompts that it found unclear are
not listed, and what is not listed is left out.

--hh: harmless-base/test.jsonl.gz as it was published (JSON lines with the transcript `chosen`, may be .gz), or lines
with the first turn alone as `prompt`. --self_instruct: the user-oriented instructions of Wang et al. (2023, arXiv
2212.10560), of which the short ones are taken, the first instance of each.
"""

import argparse
import hashlib
import json
import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT)]  # a checkout need not be installed

from cai_jax.config import PromptSet  # noqa: E402
from cai_jax.errors import UserError, exit_code  # noqa: E402
from cai_jax.named_runs import load_config  # noqa: E402
from cai_jax.prompt_files import read_records  # noqa: E402
from cai_jax.prompt_sets import load_prompts  # noqa: E402

LONGEST = 400  # characters of an instruction with its input, and of its answer


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("folder", type=Path)
    flags.add_argument("--hh", type=Path, required=True)
    flags.add_argument("--self_instruct", type=Path)
    flags.add_argument("--config", default="cai_smollm2_full")
    args = flags.parse_args()
    check_name(args.folder)
    sets = hh_rows(first_turns(args.hh), aims())
    if not any(sets.values()):
        raise UserError(f"{args.hh}: none of its prompts is listed in hh_aims.tsv; is it harmless-base/test.jsonl.gz?")
    if args.self_instruct:
        sets["self_instruct"] = instructions(read_records(PromptSet(str(args.self_instruct)), "--self_instruct")[0])
    write_sets(args.folder, sets)
    print_overrides(overrides(load_config(args.config)[1].prompts, args.folder, sets))


def check_name(folder: Path) -> None:
    """UserError where a folder cannot stand in an override that a shell splits, or in a list of sets."""
    path = str(folder.resolve())
    if shlex.quote(path) != path or set(path) & set(",:"):
        raise UserError(f"{path}: choose a folder whose path has plain letters, digits and . _ - alone")


def write_sets(folder: Path, sets: dict[str, list[dict]]) -> None:
    """A file a set, and what is in it on standard error."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        held = sum(row["split"] == "eval" for row in rows)
        print(f"{name}: {len(rows) - held} to train on, {held} to evaluate on", file=sys.stderr)


def print_overrides(names: list[str]) -> None:
    """Overrides as the arguments of a command."""
    print(" ".join(f"--set={shlex.quote(name)}" for name in names))


def aims() -> dict[str, tuple[str, str]]:
    """The aim (unsafe or safe) and the split (train or eval) of each listed prompt of HH-RLHF, by its key."""
    rows = (line.split("\t") for line in (HERE / "hh_aims.tsv").read_text().splitlines() if line[0] != "#")
    return {key: (aim, split) for key, aim, split in rows}


def key(prompt: str) -> str:
    """What hh_aims.tsv knows a prompt by."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]


def first_turns(path: Path) -> list[str]:
    """What the user of each row of HH-RLHF said first."""
    records, _ = read_records(PromptSet(str(path)), "--hh")
    column = "chosen" if records and "chosen" in records[0] else "prompt"
    rows = load_prompts(PromptSet(str(path), prompt=column), "--hh").rows
    return [row.messages[0]["content"].strip() for row in rows]


def hh_rows(prompts: list[str], known: dict[str, tuple[str, str]]) -> dict[str, list[dict]]:
    """The rows of the two sets; a prompt that comes again is taken once."""
    sets, left = {"hh_unsafe": [], "hh_safe": []}, dict(known)
    for prompt in prompts:
        if found := left.pop(key(prompt), None):
            aim, split = found
            sets[f"hh_{aim}"].append({"id": f"hh-{key(prompt)}", "category": "hh", "prompt": prompt, "split": split})
    return sets


def instructions(rows: list[dict]) -> list[dict]:
    """Short instructions with their answers, all for evaluation."""
    found = []
    for number, row in enumerate(rows):
        first = row["instances"][0]
        prompt = "\n\n".join(part for part in (row["instruction"].strip(), first["input"].strip()) if part)
        if first["output"].strip() and max(len(prompt), len(first["output"])) <= LONGEST:
            found.append({"id": f"si-{number:03d}", "category": "self_instruct", "prompt": prompt,
                          "answer": first["output"].strip(), "split": "eval"})  # fmt: skip
    return found


def overrides(prompts, folder: Path, sets) -> list[str]:
    """The fields of a config that add these sets to those that it has."""
    added = {
        "red_team": "hh_unsafe:train", "helpful": "hh_safe:train", "eval_red_team": "hh_unsafe:eval",
        "eval_look_alike": "hh_safe:eval", "eval_helpful": "self_instruct:eval",
    }  # fmt: skip
    found = []
    for field, source in added.items():
        name, split = source.split(":")
        if any(row["split"] == split for row in sets.get(name, [])):
            more = [*getattr(prompts, field).more, f"{folder.resolve() / name}.jsonl:{split}"]
            found.append(f"prompts.{field}.more={','.join(more)}")
    return found


if __name__ == "__main__":
    sys.exit(exit_code(main))
