"""A run folder that survives `kill -9`: its lock, the artifacts of a stage, the lines of its metrics.

A stage's done.json is written last and names the hash of every artifact. Among several processes all call, the first
writes, and what it found on disk is what all go by.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from cai_jax import distributed
from cai_jax.errors import UserError
from cai_jax.provenance import (
    cannot_write,
    content_hash,
    explain_os_errors,
    file_hash,
    json_row,
    plain,
    read_json,
    read_jsonl,
    sync_to_disk,
    to_json,
    write_atomically,
    write_json,
)

# What differs between equal runs, and the seal itself.
_NOT_ARTIFACTS = ("timing.json", "timings.jsonl", "wandb.json", "done.json", "events.out.tfevents.*", "checkpoints/*")
_MEBIBYTE = 2**20


@contextlib.contextmanager
def locked_run_folder(run_dir: str | Path) -> Iterator[Path]:
    """The run folder, made if need be, held for this process alone until the block ends.

    The kernel lets go of the lock when the process ends in whatever way. Raises UserError when another
    command holds it, when the folder cannot be written, or when its disk is as good as full.
    """
    run_dir = Path(run_dir)
    with explain_os_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / "lock", "a+", encoding="utf-8")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read(100).strip() or "another process"
            raise UserError(f"{run_dir}: in use by {owner}; wait, or choose another --run_dir") from None
        if not os.access(run_dir, os.W_OK | os.X_OK):
            raise cannot_write(run_dir, "no permission")
        check_free_space(run_dir, 64 * _MEBIBYTE)
        with explain_os_errors(run_dir):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            lock.flush()
        yield run_dir


def check_free_space(run_dir: str | Path, needed_bytes: int) -> None:
    """Raise UserError when the disk of `run_dir` has less left than is needed."""
    free = shutil.disk_usage(run_dir).free
    if free < needed_bytes:
        mebibytes = f"{free // _MEBIBYTE} MiB left on its disk, {needed_bytes // _MEBIBYTE} MiB are needed"
        raise UserError(f"{run_dir}: {mebibytes}; free some or choose another --run_dir")


class StageFolder:
    """The artifacts of one stage: begun with a fingerprint, filled, and sealed with done.json."""

    def __init__(self, run_dir: str | Path, stage: str):
        self.stage = stage
        self.path = Path(run_dir) / stage
        self._aside = Path(run_dir) / f".{stage}.discarded"

    def discard(self) -> None:
        """Throw the stage's earlier work away. Moved aside first: a kill on the way leaves no half of it."""
        distributed.by_first(self._discard)

    def _discard(self) -> None:
        with explain_os_errors(self.path):
            shutil.rmtree(self._aside, ignore_errors=True)
            if self.path.exists():
                os.replace(self.path, self._aside)
                shutil.rmtree(self._aside)

    def begin(self, fingerprint: dict) -> str:
        """"done", "resume" or "new"; `fingerprint` is a flat dict of all that the artifacts depend on.

        Raises UserError when earlier work has another fingerprint, naming what changed, and when an artifact
        of a stage that is done is missing or altered.
        """
        return distributed.by_first(lambda: self._begin(plain(fingerprint)))

    def _begin(self, fingerprint: dict) -> str:
        earlier = self._earlier_fingerprint()
        self._remove_partial_files()
        if earlier is None:
            write_json(self.path / "fingerprint.json", fingerprint)
            return "new"
        self._refuse_changes(earlier, fingerprint)
        if self.done() is None:
            return "resume"
        self.verify()
        self._remove_checkpoints()
        return "done"

    def check(self, fingerprint: dict) -> None:
        """Raise UserError where earlier work has another fingerprint; touches nothing. None: a value not known yet."""
        if (earlier := self._earlier_fingerprint()) is not None:
            unknown = {key for key, value in fingerprint.items() if value is None}
            sides = earlier, plain(fingerprint)
            self._refuse_changes(*({key: side[key] for key in side.keys() - unknown} for side in sides))

    def done(self) -> dict | None:
        """{"artifacts": {name: sha256}, "hash": one hash of them all}; None while the stage is not done."""
        path = self.path / "done.json"
        if not path.exists():
            return None
        done = read_json(path)
        if not isinstance(done, dict) or done.get("hash") != content_hash(done.get("artifacts")):
            raise self._spoiled(path, "was altered since the stage was done")
        return done

    def verify(self) -> None:
        """Raise UserError naming an artifact of the finished stage that is missing or altered."""
        for name, digest in self.done()["artifacts"].items():
            path = self.path / name
            if not path.is_file():
                raise self._spoiled(path, "is missing")
            if file_hash(path) != digest:
                raise self._spoiled(path, "was altered since the stage was done")

    def finish(self, timing: dict) -> str:
        """Seal the stage and return its hash; `timing` holds all that differs between equal runs."""
        return distributed.by_first(lambda: self._finish(timing))

    def _finish(self, timing: dict) -> str:
        write_json(self.path / "timing.json", timing)
        artifacts = {}
        for path in self._files():
            name = path.relative_to(self.path).as_posix()
            if not any(fnmatchcase(name, pattern) for pattern in _NOT_ARTIFACTS):
                sync_to_disk(path)
                artifacts[name] = file_hash(path)
        digest = content_hash(artifacts)
        write_json(self.path / "done.json", {"artifacts": artifacts, "hash": digest})
        self._remove_checkpoints()
        return digest

    def write_shard(self, index: int, count: int, rows: list[dict], prefix: str = "rows") -> None:
        """Shard `index` of `count` as a JSONL file, a row a line, all of it or nothing."""
        self.write_lines(shard_name(index, count, prefix), rows)

    def write_lines(self, name: str, rows: list[dict]) -> None:
        """A JSONL file of the stage, a row a line, all of it or nothing."""
        write_atomically(self.path / name, "".join(to_json(row) + "\n" for row in rows))

    def write_summary(self, summary: dict) -> None:
        """summary.json: the stage's counters and results, without times."""
        write_json(self.path / "summary.json", summary)

    def finished_shards(self, prefix: str = "rows") -> set[int]:
        """The numbers of the shards that are there, each read once: a malformed one is a UserError."""
        return set(distributed.by_first(lambda: self._finished_shards(prefix)))

    def _finished_shards(self, prefix: str) -> list[int]:
        paths, _ = self._shards(prefix)
        for path in paths.values():
            read_jsonl(path)
        return sorted(paths)

    def read_shards(self, prefix: str = "rows") -> list[dict]:
        """All rows in order; UserError naming a missing shard, or a malformed line by file and number."""
        distributed.meet()  # the first may still be writing them
        paths, count = self._shards(prefix)
        missing = [index for index in range(count) if index not in paths]
        if missing or not paths:
            name = shard_name(missing[0], count, prefix) if missing else f"{prefix}-*.jsonl"
            raise UserError(f"{self.path / name}: missing; run stage {self.stage} first")
        return [row for index in range(count) for row in read_jsonl(paths[index])]

    def _shards(self, prefix: str) -> tuple[dict[int, Path], int]:
        paths, counts = {}, set()
        for path in sorted(self.path.glob(f"{prefix}-*.jsonl")):
            if found := re.fullmatch(re.escape(prefix) + r"-(\d{5,})-of-(\d{5,})\.jsonl", path.name):
                paths[int(found[1])] = path
                counts.add(int(found[2]))
        if len(counts) > 1 or any(index >= max(counts) for index in paths):
            raise UserError(f"{self.path}: {prefix} shards of different runs lie together "
                            f"(of {', of '.join(map(str, sorted(counts)))}); --fresh starts the stage again")
        return paths, max(counts, default=0)

    def _files(self) -> list[Path]:
        return sorted(path for path in self.path.rglob("*") if path.is_file())

    def _earlier_fingerprint(self) -> dict | None:
        path = self.path / "fingerprint.json"
        if path.exists():
            fingerprint = read_json(path)
            if not isinstance(fingerprint, dict):
                raise self._spoiled(path, "was altered")
            return fingerprint
        left = [file for file in self._files() if file.suffix != ".tmp"] if self.path.exists() else []
        if left:
            raise self._spoiled(path, f"is missing, but {left[0].name} is there")
        return None

    def _refuse_changes(self, earlier: dict, now: dict) -> None:
        changed = [key for key in sorted({*earlier, *now}) if earlier.get(key) != now.get(key)]
        if changed:
            shown = ", ".join(f"{key} {_brief(earlier, key)} -> {_brief(now, key)}" for key in changed[:3])
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(f"{self.path}: what this stage was made from has changed: {shown}{more}; "
                            f"--fresh --stages={self.stage} does it again, another --run_dir keeps both")

    def _spoiled(self, path: Path, what: str) -> UserError:
        return UserError(f"{path}: {what}; put it back, or do the stage again: --fresh --stages={self.stage}")

    def _remove_partial_files(self) -> None:
        with explain_os_errors(self.path):
            shutil.rmtree(self._aside, ignore_errors=True)
            for path in self._files():
                if path.suffix == ".tmp" and not path.is_relative_to(self.path / "checkpoints"):
                    path.unlink()

    def _remove_checkpoints(self) -> None:
        with explain_os_errors(self.path):
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)


def shard_name(index: int, count: int, prefix: str = "rows") -> str:
    """rows-00000-of-00004.jsonl"""
    return f"{prefix}-{index:05d}-of-{count:05d}.jsonl"


def _brief(fingerprint: dict, key: str) -> str:
    """A value in an error line: hashes by their first digits, long texts cut."""
    if key not in fingerprint:
        return "(absent)"
    value = fingerprint[key]
    is_hash = isinstance(value, str) and re.fullmatch("[0-9a-f]{40,}", value)
    text = value[:12] if is_hash else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


class MetricsFile:
    """Append-only lines of training numbers, cut back on resume so that they end as if never interrupted."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def append(self, record: dict) -> None:
        """One line, handed to the system at once: a killed process loses none of it."""
        if not distributed.first():
            return
        with explain_os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write((to_json(record) + "\n").encode())

    def sync(self) -> None:
        """Flush to disk; before a checkpoint, so that the lines are never behind it."""
        if distributed.first() and self.path.exists():
            sync_to_disk(self.path)

    def read(self) -> list[dict]:
        """All records; none where there is no file yet."""
        distributed.meet()
        return read_jsonl(self.path) if self.path.exists() else []

    def truncate_to(self, step_key: str, step: int) -> None:
        """Keep the lines up to and with record[step_key] == step, as the checkpoint of that step left them.

        A torn last line goes. Raises UserError when the lines end before the checkpoint does.
        """
        distributed.by_first(lambda: self._truncate_to(step_key, step))

    def _truncate_to(self, step_key: str, step: int) -> None:
        kept_bytes, last = 0, None
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        for number, line in enumerate(lines, start=1):
            record = json_row(line, self.path, number)
            if record.get(step_key) is None:
                raise UserError(f"{self.path}:{number}: no {step_key!r}; --fresh starts the stage again")
            if record[step_key] > step:
                break
            kept_bytes, last = kept_bytes + len(line) + 1, record[step_key]
        if step > 0 and last != step:
            raise UserError(f"{self.path}: ends at {step_key} {last}, but the checkpoint is of {step_key} "
                            f"{step}; --fresh starts the stage again")
        if self.path.exists():
            with explain_os_errors(self.path):
                os.truncate(self.path, kept_bytes)
