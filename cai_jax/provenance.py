"""Hashes, row keys, and JSON files that survive `kill -9`.

Everything is written to NAME.tmp, flushed to disk and renamed, so a file that is there is whole. Among several
processes all call, the first writes.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from cai_jax import distributed
from cai_jax.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT,
                 errno.ENAMETOOLONG, errno.EISDIR)


# ---------------------------------------------------------------- hashes and keys


def content_hash(obj) -> str:
    """sha256 of the canonical JSON of a value: sorted keys, no spaces, UTF-8. Tuples hash as lists."""
    return hashlib.sha256(to_json(obj, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_hash(path: str | Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def row_seed(run_seed: int, stage: str, row_id: str, *rest: int | str) -> int:
    """The key of a row: 64 bits, from what the row is and not from where it is computed.

    The first 8 bytes, big-endian, of the sha256 of the JSON list [run_seed, stage, row_id, *rest]; `rest`
    tells draws of one row apart (a round, a pair, an update). So a row's text does not depend on its batch,
    its slot, a restart or the Python that runs it.
    """
    return int(content_hash([run_seed, stage, row_id, *rest])[:16], 16)


# ---------------------------------------------------------------- files


def write_json(path: str | Path, obj) -> None:
    """A JSON file for people: sorted, indented, replaced atomically. Numbers not finite become null."""
    write_atomically(Path(path), to_json(obj, sort_keys=True, indent=2) + "\n")


def read_json(path: str | Path):
    """The value in a JSON file; UserError where it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); --fresh starts the stage again") from None


@contextlib.contextmanager
def explain_os_errors(path: str | Path) -> Iterator[None]:
    """Turn a full disk or a path that cannot be written into a UserError; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(f"{path}: no space left; free some and run again to go on") from None
        if error.errno in _NOT_WRITABLE:
            raise cannot_write(path, error.strerror) from None
        raise


def cannot_write(path: str | Path, why: str) -> UserError:
    """What to raise for a path that cannot be written."""
    return UserError(f"{path}: cannot be written ({why}); choose another --run_dir")


def to_json(obj, **style) -> str:
    """The JSON of a value; `style` as for json.dumps. TypeError for what has no JSON form."""
    # Text stays readable (no \u escapes), which is safe as JSON escapes every line break that a reader of
    # lines splits at; plain has replaced what UTF-8 cannot hold.
    return json.dumps(plain(obj), ensure_ascii=False, allow_nan=False, **style)


def plain(obj):
    """Plain dicts, lists, strings and numbers that every JSON reader takes."""
    if isinstance(obj, str):
        # Lone surrogates have no UTF-8; readers refuse their escapes too.
        return obj.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if obj is None or isinstance(obj, (bool, int)):
        return obj
    if isinstance(obj, dict):
        return {plain(str(key)): plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain(value) for value in obj]
    if dataclasses.is_dataclass(obj):
        return plain(dataclasses.asdict(obj))
    if hasattr(obj, "tolist"):  # a NumPy or JAX scalar or array
        return plain(obj.tolist())
    raise TypeError(f"{type(obj).__name__} has no JSON form")


def write_atomically(path: Path, text: str) -> None:
    """A text file, all of it or what was there before; by the first process alone."""
    if not distributed.first():
        return
    partial = path.with_name(path.name + ".tmp")
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_to_disk(path.parent)


def sync_to_disk(path: Path) -> None:
    """Return once a file, or the names in a folder, are on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- lines of JSON


def read_jsonl(path: str | Path) -> list[dict]:
    """The rows of a JSONL file; UserError naming file and line where a line is malformed or not ended."""
    rows = []
    lines = Path(path).read_bytes().split(b"\n")  # not splitlines: U+2028 stays inside a text
    for number, line in enumerate(lines[:-1], start=1):
        rows.append(json_row(line, path, number))
    if lines[-1]:
        raise UserError(f"{path}:{len(lines)}: the last line is not ended; --fresh starts the stage again")
    return rows


def json_row(line: bytes, path: str | Path, number: int) -> dict:
    """The object on line `number` of a file; UserError where it is none."""
    try:
        row, why = json.loads(line), "a row must be a JSON object"
    except ValueError as error:
        row, why = None, str(error)
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: not a row of ours ({why}); --fresh starts the stage again")
    return row
