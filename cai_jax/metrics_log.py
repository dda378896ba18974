"""The numbers of a training stage, for people and for programs.

    metrics.jsonl             what a step computed; the same bytes whether or not the run was killed in between
    timings.jsonl             what a step took
    events.out.tfevents.*     both, for TensorBoard
    Weights & Biases          both, where `logging.wandb` names a project
"""

import contextlib
import importlib.util
import json
import math
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cai_jax.accelerators import by_device_kind
from cai_jax.errors import UserError
from cai_jax.memory import device_memory
from cai_jax.provenance import read_json, write_json
from cai_jax.run_folder import MetricsFile


def check_wandb(project: str) -> None:
    """Raise UserError where Weights & Biases is asked for and not installed, or knows no login."""
    if not project:
        return
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # without origin it is some folder of that name
        raise UserError(f"logging.wandb={project}: wandb is not installed; pip install wandb, or --set logging.wandb=")
    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    import wandb

    try:
        known = wandb.login(prompt=False)
    except wandb.Error as error:
        raise UserError(f"logging.wandb={project}: {error}; WANDB_MODE=offline writes to the run folder") from None
    if not known:
        raise UserError(f"logging.wandb={project}: no login; wandb login, or set WANDB_API_KEY or WANDB_MODE=offline")


@dataclass(frozen=True)
class Speed:
    """What one step took. FLOPs are analytic, of all devices; `mfu` is their share of the published bf16 peak."""

    seconds: float
    tokens_per_second: float
    flops_per_second: float
    mfu: float | None  # None: a device without a published peak, such as a CPU
    memory_bytes: int  # peak: of the fullest device, on a CPU of this process

    def __str__(self) -> str:
        parts = [f"{self.seconds:.3g} s each", f"{_si(self.flops_per_second)}FLOP/s"]
        if self.mfu is not None:
            parts.append(f"{self.mfu:.1%} MFU")
        return ", ".join([*parts, f"{self.memory_bytes / 2**30:.1f} GiB"])


class MetricsLog:
    """Writes the numbers of one training stage to its folder.

    `flops_per_token`: analytic FLOPs of a step for each of its tokens. `devices`: those that share the work. `wandb`:
    arguments of `wandb.init`, None without it. Process 0 alone writes what is not metrics.jsonl.
    """

    def __init__(self, folder: Path, flops_per_token: float, devices, wandb: dict | None = None):
        self._folder, self._flops_per_token, self._wandb = Path(folder), flops_per_token, wandb
        chip = by_device_kind(devices[0].device_kind)
        self._peak = chip.flops * len(devices) if chip else None
        self._metrics = MetricsFile(self._folder / "metrics.jsonl")
        self._timings = MetricsFile(self._folder / "timings.jsonl")
        self._sinks: list = []
        self._unit = ""

    @contextlib.contextmanager
    def opened(self, unit: str, done: int) -> Iterator["MetricsLog"]:
        """Ready for the step after `done`: what was written of later steps is dropped. `unit`: the key of a step."""
        import jax

        self._unit = unit
        self._metrics.truncate_to(unit, done)
        with contextlib.ExitStack() as stack:
            if jax.process_index() == 0:
                _drop_after(self._timings.path, unit, done)
                self._sinks = [_EventFile(self._folder, done)]
                if self._wandb:
                    self._sinks.append(_Wandb(self._folder, self._wandb))
                for sink in self._sinks:
                    stack.callback(sink.close)
            yield self
        self._sinks = []

    def append(self, record: dict, tokens: int, seconds: float) -> Speed:
        """The metrics of one step, with the step itself under the unit's key, and what the step took."""
        flops = self._flops_per_token * tokens / seconds
        mfu = flops / self._peak if self._peak else None
        speed = Speed(seconds, tokens / seconds, flops, mfu, device_memory())
        step = record[self._unit]
        self._metrics.append(record)
        if self._sinks:
            self._timings.append({self._unit: step} | asdict(speed))
        metrics = {f"metrics/{name}": x for name, x in record.items() if name != self._unit}
        speeds = {f"speed/{name}": x for name, x in asdict(speed).items() if x is not None}
        for sink in self._sinks:
            sink.write(step, metrics | speeds)
        return speed

    def sync(self) -> None:
        """Flush to disk; before a checkpoint, so that the lines are never behind it."""
        self._metrics.sync()
        if self._sinks:
            self._timings.sync()
        for sink in self._sinks:
            sink.flush()

    def read(self) -> list[dict]:
        """The metrics of all steps."""
        return self._metrics.read()


def _drop_after(path: Path, unit: str, done: int) -> None:
    """Keep the lines up to step `done`; not as strict as with metrics, whose bytes are an artifact."""
    if path.exists():
        lines = path.read_bytes().split(b"\n")[:-1]
        path.write_bytes(b"".join(line + b"\n" for line in lines if json.loads(line)[unit] <= done))


class _EventFile:
    """A TensorBoard event file. Its first event says from which step on earlier files are out of date.

    Events are written where they stand: the `flush` of tensorboardX's own SummaryWriter leaves what waits in its queue.
    """

    def __init__(self, folder: Path, done: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        # The suffix keeps two commands of one second apart.
        self._writer = EventsWriter(str(folder / "events"), f".from-{done + 1:08d}")
        self._add(done + 1, session_log=SessionLog(status=SessionLog.START))

    def _add(self, step: int, **content) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        from tensorboardX.summary import scalar

        for tag, number in numbers.items():
            self._add(step, summary=scalar(tag, number))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases. Steps that it has seen before a resume are left out by it: they are the same again."""

    def __init__(self, folder: Path, arguments: dict):
        import wandb

        path = folder / "wandb.json"  # thrown away with the stage's work: --fresh is another run
        if not path.exists():
            write_json(path, {"id": uuid.uuid4().hex})
        self._run = wandb.init(id=read_json(path)["id"], resume="allow", dir=str(folder.parent), **arguments)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def flush(self) -> None:
        pass  # it uploads by itself

    def close(self) -> None:
        self._run.finish()


def _si(number: float) -> str:
    """812 G, 1.3 T: three digits and a prefix."""
    power = min(max(int(math.log10(number) // 3), 0), 5) if number > 0 else 0
    return f"{number / 1000**power:.3g} {' kMGTP'[power].strip()}"
