"""The door: read a named run, run its stages, say where the report is.

    python -m cai_jax.launch --config=NAME [--set a.b=value]... [--stages=sft,ppo] [--run_dir=DIR] [--fresh] [--profile]
    python -m cai_jax.launch --list
    python -m cai_jax.launch --config=NAME --show
    python -m cai_jax.launch --config=NAME --coordinator=HOST:PORT --processes=N --process=I
    python -m cai_jax.launch --config=NAME --plan=v4-32 [--price=3.22] [--plan_json=FILE]

On TPU hosts and under SLURM or Open MPI the processes of a run find each other; elsewhere each is told its place by the
last three flags or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

Exit codes: 0 done; 2 a mistake that the user can mend (one line on stderr); 130 and 143 ended by Ctrl-C or SIGTERM, the
state under training saved; 75 another process of the run is gone. After the last three the same command goes on.
"""

import contextlib
import dataclasses
import errno
import os
import platform
import re
import shlex
import signal
import sys
import traceback
from pathlib import Path

from absl import app, flags, logging

from cai_jax import distributed, interrupts, provenance, run_folder
from cai_jax.config import Config, cache_folder
from cai_jax.config_rules import validate
from cai_jax.errors import UserError
from cai_jax.metrics_log import check_wandb
from cai_jax.named_runs import load_config, named_runs
from cai_jax.overrides import apply_overrides, flatten, format_value, to_dict
from cai_jax.profiling import Profiler
from cai_jax.progress import Progress

_CONFIG = flags.DEFINE_string("config", None, "The run: a name in configs/, or a path to a Python file.")
_SET = flags.DEFINE_multi_string("set", [], "A field of the config, as dotted.name=value; repeatable.")
_STAGES = flags.DEFINE_list("stages", [], "Run these stages only, with commas between, in their order.")
_RUN_DIR = flags.DEFINE_string("run_dir", None, "The run folder; without it, the config's, or runs/NAME.")
_FRESH = flags.DEFINE_bool("fresh", False, "Throw the earlier work of the selected stages away first.")
_LIST = flags.DEFINE_bool("list", False, "Print the named runs, one line each.")
_PROFILE = flags.DEFINE_bool("profile", False, "Write xprof traces of a few steps and sampler passes of each stage.")
_SHOW = flags.DEFINE_bool("show", False, "Print the resolved config, a field a line.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "With several processes: HOST:PORT of the first of them.")
_PROCESSES = flags.DEFINE_integer("processes", None, "With several processes: how many.")
_PROCESS = flags.DEFINE_integer("process", None, "With several processes: the number of this one, from 0.")
_PLAN = flags.DEFINE_string(
    "plan",
    None,
    "Plan the run on a slice that need not be there (v4-32, v5e-16, h100x8), or on the smallest one of a chip (v4): "
    "bytes, time and cost of every program; nothing is run.",
)
_PLAN_JSON = flags.DEFINE_string("plan_json", None, "With --plan: also write the plan to this file, as JSON.")
_PRICE = flags.DEFINE_float("price", None, "With --plan: the price of one chip and hour.")


def main(argv: list[str]) -> int:
    """The absl entry point: a UserError becomes one line and exit code 2, a signal one line and 128 + its number."""
    try:
        with interrupts.obeyed():
            _command(argv)
        return 0
    except UserError as error:
        return _fail(2, f"error: {error}")
    except KeyboardInterrupt as interrupt:
        stop = interrupt if isinstance(interrupt, interrupts.Stopped) else interrupts.Stopped(signal.SIGINT)
        without = " without --fresh" if _FRESH.value else ""
        line = f"{stop}; run the same command{without} to go on"
        if not stop.saved:
            return _fail(stop.exit_code, line)
        distributed.finish()  # all processes have stopped at the same step
        print(line, file=sys.stderr)
        return stop.exit_code
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(2, f"error: {error.filename or 'disk'}: no space left; free some and run again to go on")
        if distributed.several():
            distributed.await_verdict()
            traceback.print_exc()
            distributed.end_all(1, f"{type(error).__name__}, see its output")
        raise


def _command(argv: list[str]) -> None:
    if _LIST.value:
        return print_named_runs()
    name, config = resolve_config()
    if _SHOW.value:
        return print_config(name, config)
    if _PLAN.value:
        from cai_jax.plan.command import plan_run

        return plan_run(name, config, _PLAN.value, _PLAN_JSON.value, _PRICE.value)
    if _PLAN_JSON.value or _PRICE.value is not None:
        raise UserError("--plan_json and --price belong to a plan: add --plan=v4-32, or leave them out")
    _set_environment()
    distributed.start(distributed.place(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value))
    report = run(name, config, _FRESH.value, command=argv, profile=_PROFILE.value)
    distributed.finish()
    if distributed.first():
        print(f"report: {report}")


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


def run(name: str, config: Config, fresh: bool, command: list[str], profile: bool = False) -> str:
    """Run the config's stages in its run folder and return the path of the report."""
    with contextlib.ExitStack() as held:
        lock = run_folder.locked_run_folder(config.run_dir)
        run_dir = Path(distributed.by_first(lambda: str(held.enter_context(lock))))
        profiler = Profiler(run_dir / "profile") if profile and distributed.first() else None
        if distributed.first():
            progress = Progress(run_dir, profiler=profiler)
        else:
            progress = Progress(stream=held.enter_context(_nowhere()))
        check_wandb(config.logging.wandb)
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

        def report() -> str:
            with provenance.explain_os_errors(run_dir / "report.html"):
                return str(write_report(run_dir))

        try:
            for stage in config.stages:
                context.run_stage(stage)
        except BaseException as error:
            if isinstance(error, UserError | KeyboardInterrupt):
                distributed.unwatch()
            if distributed.first():
                with contextlib.suppress(Exception):  # the report of what there is; the first error is what counts
                    report()
            raise
        if profiler:
            progress.log(profiler.summary())
        return distributed.by_first(report)


def _nowhere():
    return open(os.devnull, "w", encoding="utf-8")


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


def _fail(code: int, line: str) -> int:
    """Say why in one line, also to the other processes of the run, and return the exit code."""
    line = " ".join(line.split())
    print(line, file=sys.stderr, flush=True)
    distributed.end_all(code, line)
    return code


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with its complaints in our one line. Returns the command as it was typed."""
    if {"--help", "-help", "--helpshort"} & set(argv[1:]):
        print(f"{__doc__}\n{flags.FLAGS.main_module_help()}")
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        message = re.sub(r"\. Did you mean: (\S+) \?", r"; did you mean --\1?", str(error))
        sys.exit(_fail(2, f"error: {message} (--help lists the flags)"))
    if len(rest) > 1:
        sys.exit(_fail(2, f"error: {rest[1]!r} belongs to no flag; write --config=NAME, --set name=value"))
    return argv


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
