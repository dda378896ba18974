"""Records of a prompt set from wherever they lie: our own sets, a file, a folder saved by `datasets`, or the hub.

A source that cannot be read is a `UserError` that names it and the place in it. What a record means is
`prompt_sets`' business.
"""

import csv
import difflib
import glob
import gzip
import importlib.resources
import io
import json
import re
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cai_jax import config
from cai_jax.errors import UserError

_SHIPPED = importlib.resources.files("cai_jax") / "data" / "prompts"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_records(prompt_set: config.PromptSet, where: str) -> tuple[list[dict], str]:
    """All records of the set, and the value of the column "split" that is still to be chosen ("": none)."""
    path = Path(prompt_set.path).expanduser()
    readers = {".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(Path(path.name.removesuffix(".gz")).suffix)
    from_hub = reader is None and not path.exists() and _HUB_ID.fullmatch(prompt_set.path)
    if prompt_set.subset and not from_hub:
        raise UserError(f"{where} is no hub dataset, and only these have subsets; set subset to ''")
    if from_hub:
        return _read_hub(prompt_set, where), ""
    if prompt_set.path.startswith("shipped:"):
        return _read_shipped(prompt_set.path.removeprefix("shipped:"), where), prompt_set.split
    if path.is_dir():
        return _read_folder(path, prompt_set.split, where)
    if path.name.endswith(".parquet.gz") or (path.is_file() and reader is None):
        kinds = ".jsonl, .json, .csv (each also .gz) or .parquet"
        raise UserError(f"{where}: not a kind of file that can be read; give {kinds}, or a folder")
    if path.is_file():
        return reader(path, where), prompt_set.split
    raise UserError(f"{where}: no such file or folder; check the path")


def _read_shipped(name: str, where: str) -> list[dict]:
    names = sorted(entry.name.removesuffix(".jsonl") for entry in _SHIPPED.iterdir())
    if name not in names:
        raise UserError(f"{where}: no shipped set {name!r}{nearest(name, names)}")
    with importlib.resources.as_file(_SHIPPED / f"{name}.jsonl") as path:
        return _read_json(path, where)


def _read_text(path: Path, where: str) -> str:
    """The text of a file, unzipped if need be; white space inside it is left as it is."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:  # gzip: bad magic, cut short, damaged
        raise UserError(f"{where} cannot be read ({_one_line(error)}); check the file") from error


def _read_json(path: Path, where: str) -> list[dict]:
    """Objects one a line, or a list of objects.

    Parsed here and not by `datasets`, which names no line, turns a column of dates into timestamps, and
    guesses the types of a large file from its first part.
    """
    text = _read_text(path, where)
    if text.lstrip().startswith("["):
        placed = [(f"entry {n} of the list", row) for n, row in enumerate(_parse_json(text, 1, where), 1)]
    else:
        lines = enumerate(text.split("\n"), 1)
        placed = [(f"line {n}", _parse_json(line, n, where)) for n, line in lines if line.strip()]
    for place, record in placed:
        if not isinstance(record, dict):
            raise UserError(f"{where}, {place} is not a JSON object; write {{...}} there")
    return [record for _, record in placed]


def _parse_json(text: str, first_line: int, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"line {first_line + error.lineno - 1} is not JSON ({error.msg} at column {error.colno})"
        raise UserError(f"{where}, {problem}; mend or remove that line") from error
    except (RecursionError, ValueError) as error:  # nested too deep; a number with thousands of digits
        problem = f"line {first_line} is not usable JSON ({_one_line(error)})"
        raise UserError(f"{where}, {problem}; mend or remove that line") from error


def _read_csv(path: Path, where: str) -> list[dict]:
    """Every field as the text that stands there.

    Not by `datasets` (pandas): it reads "NA" as missing and "007" as 7, and when all rows have one field
    more than the header it shifts the columns without a word.
    """
    lines = csv.reader(io.StringIO(_read_text(path, where), newline=""), strict=True)
    try:
        header = next(lines, [])
        repeated = sorted({column for column in header if header.count(column) > 1})
        if repeated:
            raise UserError(f"{where}: the header has {repeated[0]!r} twice; rename one of the columns")
        records = []
        for fields in lines:
            if fields and len(fields) != len(header):
                raise UserError(
                    f"{where}, line {lines.line_num} has {len(fields)} fields but the header {len(header)}; "
                    "mend that line (a field with a comma needs quotes)"
                )
            if fields:
                records.append(dict(zip(header, fields, strict=True)))
        return records
    except csv.Error as error:
        problem = f"line {lines.line_num} is not CSV ({_one_line(error)})"
        raise UserError(f"{where}, {problem}; mend that line") from error


def _read_parquet(path: Path, where: str) -> list[dict]:
    import datasets  # here and below: importing it takes over a second, which most runs need not spend

    # A cache folder that goes again: even a streamed read makes one, and the default may not be writable.
    with tempfile.TemporaryDirectory() as cache:
        return _or_user_error(
            lambda: list(
                datasets.load_dataset(
                    "parquet", data_files=glob.escape(str(path)), split="train", streaming=True, cache_dir=cache
                )
            ),
            f"{where} is not a Parquet file",
        )


def _read_folder(path: Path, split: str, where: str) -> tuple[list[dict], str]:
    import datasets

    data = _or_user_error(
        lambda: datasets.load_from_disk(str(path)), f"{where} is not a folder saved by datasets.save_to_disk"
    )
    if isinstance(data, datasets.DatasetDict):
        return _choose_split(data, split, where).to_list(), ""
    return data.to_list(), split


def _read_hub(prompt_set: config.PromptSet, where: str) -> list[dict]:
    import datasets

    data = _or_user_error(
        lambda: datasets.load_dataset(prompt_set.path, prompt_set.subset or None),
        f"{where} is no file or folder here, and the hub dataset of that name cannot be had",
    )
    return _choose_split(data, prompt_set.split, where).to_list()


def _choose_split(data: Mapping[str, Any], split: str, where: str) -> Any:
    if split in data:
        return data[split]
    if not split and len(data) == 1:
        return next(iter(data.values()))
    problem = f"no split {split!r}" if split else "it has several splits"
    raise UserError(f"{where}: {problem}; set split to one of {', '.join(data)}")


def _or_user_error(read: Callable[[], Any], problem: str) -> Any:
    """`datasets` fails with errors of a dozen libraries below it; each of them is a source that is not there."""
    try:
        return read()
    except Exception as error:
        raise UserError(f"{problem} ({_one_line(error)}); check the path or the network") from error


def nearest(wanted: str, names: list[str]) -> str:
    """The end of an error line: the nearest name, if any is near, and the names there are."""
    close = difflib.get_close_matches(wanted, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    listed = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
    return f"{hint} there are: {listed}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
