"""What of a run folder must be the same whenever and however often the run was interrupted."""

from fnmatch import fnmatch
from pathlib import Path

IGNORED = ("timing.json", "timings.jsonl", "config.json", "log.txt", "report.html", "lock", "events.out.tfevents.*")


def artifacts(folder: Path) -> dict[str, bytes]:
    """Name and bytes of every file that has no times in it; `config.json` of a model is one of them."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "profile" not in path.relative_to(folder).parts
        and (path.parent.name == "model" or not any(fnmatch(path.name, pattern) for pattern in IGNORED))
    }  # fmt: skip
