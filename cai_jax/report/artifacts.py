"""What a run folder holds, read so that a missing, unfinished or torn file never stops the report."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cai_jax.config import OPTIONAL, STAGES
from cai_jax.constitution import load_constitution
from cai_jax.errors import UserError

TITLES = {
    "red_team": "Red-team prompts by model",
    "critique_revision": "Critique and revision",
    "sft": "Supervised fine-tuning",
    "judge": "Judge",
    "preferences": "AI preference labels",
    "reward_model": "Reward model",
    "ppo": "PPO",
    "dpo": "DPO",
    "best_of_n": "Best-of-n",
    "grpo": "GRPO",
    "evaluate": "Evaluation",
}
MODELS = {
    "base": "base",
    "sl_cai": "SL-CAI",
    "rl_cai": "RL-CAI",
    "dpo": "DPO",
    "best_of_n": "best-of-n",
    "grpo": "GRPO",
}
SETS = {"red_team": "unsafe", "look_alike": "safe look-alikes", "helpful": "helpful"}


@dataclass
class Stage:
    """One stage of a run; `status` is 'done', 'unfinished' or 'not run yet'."""

    name: str
    status: str
    summary: dict | None
    timing: dict
    metrics: list[dict]


@dataclass
class Run:
    """A run folder; `problems` collects every file that could not be read, to be shown."""

    folder: Path
    config: dict = field(default_factory=dict)  # config.json as written: name, description, config, ...
    stages: dict[str, Stage] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def summary(self, stage: str) -> dict:
        """summary.json of a stage; {} where there is none, or the run does not have the stage."""
        return (self.stages[stage].summary if stage in self.stages else None) or {}

    def resolved(self, dotted: str, default=None):
        """A value of the resolved config, such as 'ppo.kl_coef'."""
        value = self.config.get("config") or {}
        for key in dotted.split("."):
            if not isinstance(value, dict) or key not in value:
                return default
            value = value[key]
        return value

    def parameters(self) -> int | None:
        """Parameters of the model that the run starts from, None when not recorded."""
        recorded = self.config.get("parameters")
        return recorded if isinstance(recorded, int) and recorded > 0 else None

    def rows(self, stage: str, prefix: str = "rows") -> Iterator[dict]:
        """Rows of a stage, shard after shard, one in memory at a time."""
        for path in sorted((self.folder / stage).glob(f"{prefix}-*.jsonl")):
            yield from self._lines(path)

    def lines(self, path: str) -> Iterator[dict]:
        """Rows of a file of the run; none where it is not there."""
        return self._lines(self.folder / path) if (self.folder / path).exists() else iter(())

    def looks(self, stage: str) -> list[dict]:
        """What the monitors of a stage saw, in the order of updates."""
        paths = sorted((self.folder / stage / "looks").glob("update-*.json"))
        return [look for path in paths if (look := self._json(path)) is not None]

    def _lines(self, path: Path) -> Iterator[dict]:
        torn = 0
        try:
            with path.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    row = _object(line)
                    if row is not None:
                        yield row
                    elif line.strip():
                        torn += 1
        except OSError as error:
            self._complain(f"{path.relative_to(self.folder)}: {error.strerror}")
        if torn:
            self._complain(f"{path.relative_to(self.folder)}: {torn} lines are not JSON objects")

    def _json(self, path: Path) -> dict | None:
        if not path.exists():
            return None
        try:
            content = _object(path.read_text(encoding="utf-8", errors="replace"))
        except OSError as error:
            self._complain(f"{path.relative_to(self.folder)}: {error.strerror}")
            return None
        if content is None:
            self._complain(f"{path.relative_to(self.folder)}: not a JSON object")
        return content

    def _complain(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)


def _object(text: str) -> dict | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def read_run(folder: Path) -> Run:
    """Read config, summaries, metrics and timings; rows stay on disk until asked for.

    A stage that a run need not have, was not asked for and has not begun is left out. Raises UserError when `folder`
    is not a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no run folder at {folder}: give the folder that a run has written")
    run = Run(folder)
    run.config = run._json(folder / "config.json") or {}
    asked = run.resolved("stages")
    wanted = asked if isinstance(asked, list) else STAGES
    for name in STAGES:
        here = folder / name
        done = (here / "done.json").exists()
        begun = here.is_dir() and any(here.iterdir())
        if name in OPTIONAL and name not in wanted and not begun:
            continue
        run.stages[name] = Stage(
            name=name,
            status="done" if done else "unfinished" if begun else "not run yet",
            summary=run._json(here / "summary.json"),
            timing=run._json(here / "timing.json") or {},
            metrics=list(run._lines(here / "metrics.jsonl")) if (here / "metrics.jsonl").exists() else [],
        )
    return run


def order(row_id) -> str:
    """The place of a row in an order that knows nothing of its content: the SHA-256 of its id."""
    return hashlib.sha256(str(row_id).encode("utf-8", errors="replace")).hexdigest()


def principle_titles(run: Run) -> dict[str, str]:
    """Title of each principle of the run's constitution; {} when it is gone or no longer the same text."""
    source = run.resolved("constitution")
    if not source:
        return {}
    try:
        constitution = load_constitution(source, run.resolved("principles") or ())
    except (UserError, OSError):
        return {}
    recorded = (run.config.get("constitution") or {}).get("hash")
    if recorded is not None and recorded != constitution.hash:
        return {}
    return {principle.id: principle.title for principle in constitution.principles}
