"""Named runs, one Python file each with a function `config() -> Config`."""

import hashlib
import os
import re
import sys
import traceback
import types
from pathlib import Path

from cai_jax import config as c
from cai_jax.config import Config
from cai_jax.errors import UserError, did_you_mean


def load_config(name_or_path: str) -> tuple[str, Config]:
    """The run's name and its config, from a name in configs/ or a path to a Python file.

    The file is executed, so it must be one you trust; its values are not checked here (`validate` does).
    Raises UserError where there is no such file, where it fails (with file and line) or returns no Config.
    """
    path = _find(name_or_path)
    result = _call_config(path, _execute(path))
    if not isinstance(result, Config):
        raise UserError(f"{path}: config() must return a cai_jax.config.Config, not {type(result).__name__}")
    return path.stem, result


def named_runs() -> list[tuple[str, str]]:
    """Name and one-line description of every run in configs/; a file that fails says why in its line."""
    runs = []
    for name in _names():
        try:
            runs.append((name, load_config(name)[1].description))
        except UserError as error:
            runs.append((name, f"cannot be read: {error}"))
    return runs


def configs_folder() -> Path:
    """configs/ inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def _names() -> list[str]:
    return sorted(path.stem for path in configs_folder().glob("*.py") if not path.stem.startswith("_"))


def _find(name_or_path: str) -> Path:
    is_path = name_or_path.endswith(".py") or os.sep in name_or_path
    path = Path(name_or_path).expanduser() if is_path else configs_folder() / f"{name_or_path}.py"
    if path.is_file():
        return path
    names = _names()
    nearest = did_you_mean(Path(name_or_path).stem, names)
    what = f"no config file {path}" if is_path else f"no named run {name_or_path!r}"
    raise UserError(f"--config: there is {what}{nearest} (named runs: {', '.join(names)})")


def _execute(path: Path) -> types.ModuleType:
    try:
        code = compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno or 1}: {error.msg}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {_one_line(error)}") from None
    # A name of its own: a run called "json" must not stand in the way of the real one. Dataclasses look
    # their module up while they are made, so it is registered for as long as the file runs.
    name = "cai_jax_named_run_" + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        raise _failure(path, error) from None
    finally:
        del sys.modules[name]
    return module


def _call_config(path: Path, module: types.ModuleType):
    function = getattr(module, "config", None)
    if not callable(function):
        raise UserError(f"{path}: has no function config(); a named run is `def config() -> Config: ...`")
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise _failure(path, error) from None


def _failure(path: Path, error: BaseException) -> UserError:
    """The error in one line with the last line of the config file that it passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    where = f"{path}:{lines[-1]}" if lines else str(path)
    return UserError(f"{where}: {type(error).__name__}: {_one_line(error)}{_nearest_field(str(error))}")


def _nearest_field(message: str) -> str:
    """For `Ppo(kl_coeff=...)`: the field of Ppo that was probably meant."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    section = getattr(c, found[1], None) if found else None
    known = getattr(section, "__dataclass_fields__", {})
    return did_you_mean(found[2], known) if known else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
