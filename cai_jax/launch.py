"""The door: read a named run, run its stages, say where the report is.

    python -m cai_jax.launch --config=NAME [--set a.b=value]... [--stages=sft,ppo] [--run_dir=DIR] [--fresh]
    python -m cai_jax.launch --list
    python -m cai_jax.launch --config=NAME --show
    python -m cai_jax.launch --config=NAME --plan=v4-32 [--price=3.22] [--plan_json=FILE]

Exit codes: 0 done, 2 a mistake that the user can mend (one line on stderr), 130 interrupted.
"""

import contextlib
import dataclasses
import errno
import os
import platform
import re
import shlex
import sys
from pathlib import Path

from absl import app, flags, logging

from cai_jax import provenance
from cai_jax.config import Config, apply_overrides, cache_folder, flatten, format_value, to_dict
from cai_jax.errors import UserError
from cai_jax.named_runs import load_config, named_runs, validate
from cai_jax.progress import Progress

_CONFIG = flags.DEFINE_string("config", None, "The run: a name in configs/, or a path to a Python file.")
_SET = flags.DEFINE_multi_string("set", [], "A field of the config, as dotted.name=value; repeatable.")
_STAGES = flags.DEFINE_list("stages", [], "Run these stages only, with commas between, in their order.")
_RUN_DIR = flags.DEFINE_string("run_dir", None, "The run folder; without it, the config's, or runs/NAME.")
_FRESH = flags.DEFINE_bool("fresh", False, "Throw the earlier work of the selected stages away first.")
_LIST = flags.DEFINE_bool("list", False, "Print the named runs, one line each.")
_SHOW = flags.DEFINE_bool("show", False, "Print the resolved config, a field a line.")
_PLAN = flags.DEFINE_string(
    "plan",
    None,
    "Plan the run on a slice that need not be there (v4-32, v5e-16, h100x8), or on the smallest one of a chip (v4): "
    "bytes, time and cost of every program; nothing is run.",
)
_PLAN_JSON = flags.DEFINE_string("plan_json", None, "With --plan: also write the plan to this file, as JSON.")
_PRICE = flags.DEFINE_float("price", None, "With --plan: the price of one chip and hour.")


def main(argv: list[str]) -> int:
    """The absl entry point: a UserError becomes one line and exit code 2."""
    try:
        if _LIST.value:
            print_named_runs()
            return 0
        name, config = resolve_config()
        if _SHOW.value:
            print_config(name, config)
            return 0
        if _PLAN.value:
            from cai_jax.plan.command import plan_run

            plan_run(name, config, _PLAN.value, _PLAN_JSON.value, _PRICE.value)
            return 0
        if _PLAN_JSON.value or _PRICE.value is not None:
            raise UserError("--plan_json and --price belong to a plan: add --plan=v4-32, or leave them out")
        report = run(name, config, _FRESH.value, command=argv)
        print(f"report: {report}")
        return 0
    except UserError as error:
        return _user_error(str(error))
    except KeyboardInterrupt:
        without = " without --fresh" if _FRESH.value else ""
        print(f"interrupted; run the same command{without} to go on", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _user_error(f"{error.filename or 'disk'}: no space left; free some and run again to go on")


def resolve_config() -> tuple[str, Config]:
    """Name and config of the run that the flags ask for: loaded, overridden, checked."""
    if not _CONFIG.value:
        names = ", ".join(name for name, _ in named_runs())
        raise UserError(f"--config=NAME is missing; the named runs are {names} (--list says more)")
    name, config = load_config(_CONFIG.value)
    config = apply_overrides(config, _SET.value)
    if _STAGES.present:
        stages = tuple(stage.strip() for stage in _STAGES.value)
        config = dataclasses.replace(config, stages=stages)
    run_dir = _RUN_DIR.value or config.run_dir or os.path.join("runs", name)
    config = dataclasses.replace(config, run_dir=os.path.expanduser(run_dir))
    validate(config)
    return name, config


def run(name: str, config: Config, fresh: bool, command: list[str]) -> Path:
    """Run the config's stages in its run folder and return the path of the report."""
    _set_environment()
    with provenance.locked_run_folder(config.run_dir) as run_dir:
        progress = Progress(run_dir)
        # These import JAX; a wrong flag or config has been refused by now.
        from cai_jax.report import write_report
        from cai_jax.stages.context import prepare

        context = prepare(name, config, run_dir, fresh, progress)
        provenance.write_json(run_dir / "config.json", {
            "name": name,
            "description": config.description,
            "config": to_dict(config),
            "command": shlex.join(["python", "-m", "cai_jax.launch", *command[1:]]),
            "environment": _environment(),
            **context.describe(),
        })
        try:
            for stage in config.stages:
                context.run_stage(stage)
        except BaseException:
            with contextlib.suppress(Exception):  # the report of what there is; the first error is what counts
                write_report(run_dir)
            raise
        with provenance.explain_os_errors(run_dir / "report.html"):
            return write_report(run_dir)


def print_named_runs() -> None:
    """Every named run with its description."""
    runs = named_runs()
    width = max((len(name) for name, _ in runs), default=0)
    for name, description in runs:
        print(f"{name:<{width}}  {description}")


def print_config(name: str, config: Config) -> None:
    """Every field in the form that --set takes."""
    print(f"# {name}: {config.description}")
    for field, value in flatten(config).items():
        print(f"{field}={format_value(value)}")


def _environment() -> dict:
    import jax

    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def _set_environment() -> None:
    """Defaults that must stand before JAX and the tokenizers are imported; what the user has set stays."""
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": str(cache_folder() / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "TF_CPP_MIN_LOG_LEVEL": "2",  # XLA logs through TensorFlow's names
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # "PyTorch was not found": it is not needed
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for variable, value in defaults.items():
        os.environ.setdefault(variable, value)
    logging.set_verbosity(logging.WARNING)


def _user_error(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with its complaints in our one line. Returns the command as it was typed."""
    if {"--help", "-help", "--helpshort"} & set(argv[1:]):
        print(f"{__doc__}\n{flags.FLAGS.main_module_help()}")
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        message = re.sub(r"\. Did you mean: (\S+) \?", r"; did you mean --\1?", str(error))
        sys.exit(_user_error(f"{message} (--help lists the flags)"))
    if len(rest) > 1:
        sys.exit(_user_error(f"{rest[1]!r} belongs to no flag; write --config=NAME, --set name=value"))
    return argv


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
