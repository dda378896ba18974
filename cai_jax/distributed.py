"""Several processes as one run: how they start, what the first decides for all, and how they end together.

All processes run the same program on one mesh and share one run folder; the first alone writes to it. With one process
every function here does nothing or just calls what it is given. JAX is imported by the time a function is called, not
before, so that the door can be opened without it.
"""

import ctypes
import glob
import importlib.util
import itertools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from cai_jax.errors import UserError

LOST = 75  # exit code of a process whose peer has gone without a word (EX_TEMPFAIL): run the command again
BEAT = 1.0  # seconds between two signs of life
PATIENCE = 30.0  # seconds without one after which a process counts as gone
_A_DAY = 24 * 3600 * 1000  # milliseconds; who waits for the first is ended by the watch, not by a limit
_ALIVE = "cai_jax/alive/"
_numbers = itertools.count()  # of meetings: every process counts the same ones
_unwatched = threading.Event()
_c_handlers: list = []  # C does not count references


# ---------------------------------------------------------------- start


@dataclass(frozen=True)
class Place:
    """Where this process stands among those of a run; no coordinator: to be found by JAX."""

    coordinator: str = ""  # HOST:PORT of the first process
    processes: int = 1
    process: int = 0


def place(coordinator: str | None, processes: int | None, process: int | None) -> Place | None:
    """The place that flags give, else the environment of plain machines or of a cluster; None: alone.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID stand for flags that are not given. Raises UserError
    where some are given and others are missing.
    """
    environment = os.environ.get
    coordinator = coordinator or environment("JAX_COORDINATOR_ADDRESS")
    processes = _number("JAX_NUM_PROCESSES") if processes is None else processes
    process = _number("JAX_PROCESS_ID") if process is None else process
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [flag for flag, value in given.items() if value in (None, "")]
    if len(missing) == len(given):
        return Place() if _in_cluster() else None
    if missing:
        raise UserError(f"{missing[0]} is missing: several processes need --coordinator=HOST:PORT --processes=N "
                        "--process=I, in each process with another I from 0 to N-1")
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"--coordinator={coordinator}: write it as HOST:PORT, a free port of the first process's host")
    if not 0 <= process < processes:
        raise UserError(f"--process={process} must be from 0 to --processes - 1 ({processes - 1})")
    return Place(coordinator, processes, process) if processes > 1 else None


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text and not text.isdigit():
        raise UserError(f"{variable}={text}: must be a whole number; mend or unset it")
    return int(text) if text else None


def _in_cluster() -> bool:
    """Whether there are signs of a cluster in which JAX finds the processes by itself: SLURM, Open MPI, TPU hosts."""
    environment = os.environ.get
    slurm = "SLURM_PROCID" in os.environ and int(environment("SLURM_NTASKS", "1")) > 1
    mpi = int(environment("OMPI_COMM_WORLD_SIZE", "1")) > 1
    tpu = importlib.util.find_spec("libtpu") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    platforms = environment("JAX_PLATFORMS", "tpu")
    return slurm or mpi or bool(tpu and "tpu" in platforms)


def start(where: Place | None) -> None:
    """Join the other processes of the run; without a place, stay alone. Before anything else is asked of JAX.

    Raises UserError where they cannot be joined.
    """
    if where is None:
        return
    import jax

    logging.getLogger("jax._src.distributed").setLevel(logging.ERROR)  # a warning for every proxy variable
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    known = {"coordinator_address": where.coordinator, "num_processes": where.processes, "process_id": where.process}
    try:
        jax.distributed.initialize(**known if where.coordinator else {})
    except ValueError:
        if where.coordinator:
            raise
        return  # signs of a cluster, but a machine of its own
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"the processes of the run did not come together ({first_line}): start the same command in "
                        "all of them, and see that they reach the coordinator") from None
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # JAX has put a handler of its own there
    if several():
        _explain_aborts()
        threading.Thread(target=_watch, daemon=True, name="watch").start()


def several() -> bool:
    """Whether the run has other processes."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that writes."""
    return not several() or sys.modules["jax"].process_index() == 0


def _client():
    # JAX has no public way to its key-value store; Orbax, too, takes this one.
    from jax._src import distributed

    return distributed.global_state.client


# ---------------------------------------------------------------- agreement


def meet() -> None:
    """Wait until all processes are here. What the first has written before can be read by all after."""
    if several():
        _client().wait_at_barrier(f"cai_jax/meeting/{next(_numbers)}", _A_DAY)


def by_first(work: Callable):
    """What `work` returns (JSON) in the first process, in all of them; only the first runs it, once all are here.

    A UserError of it is raised in all.
    """
    if not several():
        return work()
    meet()
    key = f"cai_jax/said/{next(_numbers)}"
    if first():
        try:
            said = {"value": work()}
        except UserError as error:
            said = {"mistake": str(error)}
        _client().key_value_set(key, json.dumps(said))
    else:
        said = json.loads(_client().blocking_key_value_get(key, _A_DAY))
    if "mistake" in said:
        raise UserError(said["mistake"])
    return said["value"]


def highest(number: int) -> int:
    """The largest of the numbers that the processes bring."""
    if not several():
        return number
    import numpy as np
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(number)).max())


# ---------------------------------------------------------------- the end


def finish() -> None:
    """Wait for the others at the end of the work; from here on nobody counts as gone."""
    meet()
    unwatch()


def unwatch() -> None:
    """End no longer when another process ends: this one is about to, and only has its last words to say."""
    _unwatched.set()


def await_verdict() -> None:
    """After an error that a lost process may have caused: let the watch find that out, and end this process with it."""
    if several():
        time.sleep(PATIENCE + 3 * BEAT)


def end_all(code: int, line: str) -> None:
    """Leave this process with an exit code, and have the others leave with the same one; alone: do nothing.

    `line` is what the others say of it. At once and without the ceremony of an orderly end, which would wait for
    processes that wait for this one.
    """
    if not several():
        return
    unwatch()
    _beat(json.dumps({"code": code, "line": line}))
    if first():  # the store that the others read from goes with this process
        time.sleep(3 * BEAT)
    _exit(code)


def _watch() -> None:
    """Show a sign of life every BEAT seconds, and end this process once another has left or shows none."""
    import jax

    count, own = jax.process_count(), jax.process_index()
    words: dict[int, str] = {}
    changed = {process: time.monotonic() for process in range(count) if process != own}
    for beat in itertools.count():
        if _unwatched.wait(BEAT):
            return
        try:
            _beat(str(beat))
            now = {int(key.rpartition("/")[2]): word for key, word in _client().key_value_dir_get(_ALIVE)}
        except Exception:  # the store is in process 0
            if not _unwatched.is_set():
                _lost(0, count, "it does not answer")
            return
        for process in changed:
            word = now.get(process, "")
            if word.startswith("{"):
                left = json.loads(word)
                _say(f"process {process} of {count} has ended: {left['line']}")
                _exit(left["code"])
            if word != words.get(process):
                words[process], changed[process] = word, time.monotonic()
            elif time.monotonic() - changed[process] > PATIENCE:
                _lost(process, count, f"no sign of life for {PATIENCE:.0f} s")


def _explain_aborts() -> None:
    """Say that process 0 is gone where JAX aborts this one for it, at once and from a thread of C++.

    That thread runs no Python handler, so this one is called by C. If process 0 is there, the abort takes its course.
    """
    import jax
    from jax._src import distributed

    count, (host, _, port) = jax.process_count(), distributed.global_state.coordinator_address.rpartition(":")

    def explain(_):
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            _lost(0, count, "it does not answer")

    _c_handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(explain))
    ctypes.CDLL(None).signal(signal.SIGABRT, _c_handlers[-1])


def _beat(word: str) -> None:
    import jax

    _client().key_value_set(f"{_ALIVE}{jax.process_index()}", word, allow_overwrite=True)


def _lost(process: int, count: int, why: str) -> None:
    _say(f"process {process} of {count} is gone ({why}); run the same command in all processes to go on")
    _exit(LOST)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
