"""The scripts of benchmarks/ as modules."""

import importlib.util
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def part(name):
    """A module of the benchmark, under a name that no other module has."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{Path(name).stem}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
