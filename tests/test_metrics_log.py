import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest
from event_files import event_files, scalars

from cai_jax import config as c
from cai_jax.errors import UserError
from cai_jax.metrics_log import MetricsLog, Speed, check_wandb
from cai_jax.models.families import tiny_config
from cai_jax.models.flops import forward_flops
from cai_jax.progress import Progress
from cai_jax.stages.ppo import flops_per_token
from cai_jax.training import loop

ROOT = Path(__file__).resolve().parents[1]
CPU = jax.devices()[:1]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(folder: Path, done: int, steps: range, wandb=None) -> MetricsLog:
    log = MetricsLog(folder, 1e6, CPU, wandb)
    with log.opened("step", done):
        for step in steps:
            log.append({"step": step, "loss": 1 / step}, 100, 0.5)
    return log


def pairs(steps):
    return [(step, pytest.approx(1 / step)) for step in steps]


# ---------------------------------------------------------------- the files


def test_metrics_hold_no_times_and_timings_hold_them(tmp_path):
    log = write(tmp_path, 0, range(1, 4))
    assert log.read() == lines(tmp_path / "metrics.jsonl") == [{"step": n, "loss": 1 / n} for n in (1, 2, 3)]
    timings = lines(tmp_path / "timings.jsonl")
    assert [timing["step"] for timing in timings] == [1, 2, 3]
    assert timings[0]["seconds"] == 0.5 and timings[0]["tokens_per_second"] == 200
    assert timings[0]["flops_per_second"] == 2e8 and timings[0]["memory_bytes"] > 2**20
    shown = scalars(tmp_path)
    assert shown["metrics/loss"] == pairs([1, 2, 3])
    assert [step for step, _ in shown["speed/tokens_per_second"]] == [1, 2, 3]
    assert "metrics/step" not in shown


def test_a_resumed_run_shows_every_step_once(tmp_path):
    write(tmp_path, 0, range(1, 6))  # killed after step 5; the checkpoint is of step 3
    write(tmp_path, 3, range(4, 8))
    write(tmp_path, 6, range(7, 9))
    everything = list(range(1, 9))
    assert scalars(tmp_path)["metrics/loss"] == pairs(everything)
    assert [line["step"] for line in lines(tmp_path / "timings.jsonl")] == everything
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == everything
    assert len(event_files(tmp_path)) == 3, "a command must not write over the file of another, even in the same second"


_KILLED = """
import os, sys
from pathlib import Path
import jax
from cai_jax.metrics_log import MetricsLog
log = MetricsLog(Path(sys.argv[1]), 1e6, jax.devices()[:1])
with log.opened("step", 0):
    for step in range(1, 5):
        log.append({"step": step, "loss": 1 / step}, 100, 0.5)
        if step == 3:
            log.sync()
    os._exit(9)
"""


def test_what_was_synced_before_a_kill_is_there(tmp_path):
    result = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 9, result.stderr
    write(tmp_path, 3, range(4, 6))
    assert scalars(tmp_path)["metrics/loss"] == pairs([1, 2, 3, 4, 5])


def test_lost_timings_do_not_stop_a_resume(tmp_path):
    write(tmp_path, 0, range(1, 4))
    (tmp_path / "timings.jsonl").unlink()
    write(tmp_path, 3, range(4, 5))
    assert [line["step"] for line in lines(tmp_path / "timings.jsonl")] == [4]


def test_other_processes_write_metrics_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write(tmp_path, 0, range(1, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# ---------------------------------------------------------------- speed


def device(kind: str):
    return types.SimpleNamespace(device_kind=kind)


def test_mfu_is_the_share_of_the_published_peak_of_all_devices(tmp_path):
    log = MetricsLog(tmp_path, 42e9, [device("TPU v4")] * 16)
    with log.opened("step", 0):
        speed = log.append({"step": 1}, 65536, 1.0)
    assert speed.mfu == pytest.approx(42e9 * 65536 / (16 * 275e12))
    assert str(speed).startswith("1 s each, 2.75 PFLOP/s, 62.6% MFU, ")
    assert scalars(tmp_path)["speed/mfu"] == [(1, pytest.approx(speed.mfu))]


def test_an_unknown_device_has_no_mfu(tmp_path):
    log = MetricsLog(tmp_path, 1e6, [device("cpu")])
    with log.opened("step", 0):
        speed = log.append({"step": 1}, 100, 0.5)
    assert speed.mfu is None and "MFU" not in str(speed) and "200 MFLOP/s" in str(speed)
    assert "speed/mfu" not in scalars(tmp_path)
    assert lines(tmp_path / "timings.jsonl")[0]["mfu"] is None


@pytest.mark.parametrize("flops, text", [(0, "0 "), (999, "999 "), (8.12e11, "812 G"), (2.5e15, "2.5 P")])
def test_rates_have_three_digits_and_a_prefix(flops, text):
    assert f"{text}FLOP/s" in str(Speed(1, 1, flops, None, 2**30))


def test_an_update_of_ppo_counts_all_its_passes():
    """Sampling, three scoring passes and the training of two models, by hand."""
    policy = tiny_config("llama")
    frozen = types.SimpleNamespace(
        reference=types.SimpleNamespace(config=policy), value_config=policy, prompts=types.SimpleNamespace(length=64),
        source=types.SimpleNamespace(kind="model", model=types.SimpleNamespace(config=policy)),
    )  # fmt: skip
    settings = c.Ppo(epochs=2, response=c.Sampling(max_new_tokens=32))
    config = c.Config(c.Model("random:llama"), "two passes", ppo=settings)
    with_logits, without = forward_flops(policy, 1, 96), forward_flops(policy, 1, 96, unembedded=0)
    assert flops_per_token(config, frozen) == pytest.approx((1 + 1 + 2 * 3) * with_logits + (2 + 2 * 3) * without)


class NoCheckpoints:
    """Restores after `done` steps, saves every second step."""

    def __init__(self, done: int):
        self.done, self.saved = done, []

    def restore(self, state):
        return state, {"done": self.done}

    def due(self, done, total):
        return done % 2 == 0 and done < total

    def save(self, step, state, data, quality):
        self.saved.append(step)

    def close(self):
        pass


def test_the_loop_logs_what_a_step_computes_and_takes(tmp_path, capsys):
    def advance(state, index):
        return state + 1, {"loss": jax.numpy.float32(index), "accuracy": jax.numpy.float32("nan")}, 64

    log, progress = MetricsLog(tmp_path / "sft", 1e6, CPU), Progress(tmp_path)
    assert loop.run(0, advance, 5, NoCheckpoints(0), log, progress, "sft", "step") == 5
    assert [line["loss"] for line in log.read()] == [0, 1, 2, 3, 4]
    assert log.read()[0]["accuracy"] is None
    last = (tmp_path / "log.txt").read_text().splitlines()[-1]
    assert "loss 4" in last and "s each" in last and "FLOP/s" in last and "GiB" in last
    loop.run(0, advance, 6, NoCheckpoints(4), MetricsLog(tmp_path / "sft", 1e6, CPU), progress, "sft", "step")
    assert scalars(tmp_path / "sft")["metrics/loss"] == [(n + 1, n) for n in range(6)]


def test_a_step_that_fails_leaves_the_earlier_ones_in_the_event_file(tmp_path):
    def advance(state, index):
        if index == 2:
            raise RuntimeError("out of memory")
        return state, {"loss": jax.numpy.float32(index)}, 64

    with pytest.raises(RuntimeError):
        loop.run(0, advance, 5, NoCheckpoints(0), MetricsLog(tmp_path, 1e6, CPU), Progress(), "sft", "step")
    assert scalars(tmp_path)["metrics/loss"] == [(1, 0), (2, 1)]


# ---------------------------------------------------------------- Weights & Biases


class FakeWandb(types.ModuleType):
    """Keeps what real runs keep: lines by id and step, a step at or below the last one dropped."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.begun, self.finished = {}, [], 0
        self.Error = RuntimeError

    def init(self, **arguments):
        self.begun.append(arguments)
        kept = self.runs.setdefault(arguments["id"], {})

        def log(numbers, step):
            if step > max(kept, default=0):
                kept[step] = numbers

        def finish():
            self.finished += 1

        return types.SimpleNamespace(log=log, finish=finish)


def test_wandb_sees_every_step_once_across_a_resume(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    asked = {"project": "p", "group": "tiny", "name": "tiny/sft", "config": {"seed": 0}}
    write(tmp_path, 0, range(1, 6), asked)
    write(tmp_path, 3, range(4, 8), asked)
    assert wandb.begun[0] == wandb.begun[1] and wandb.begun[0].items() >= asked.items()
    assert wandb.begun[0]["resume"] == "allow" and wandb.finished == 2
    [kept] = wandb.runs.values()
    assert {step: numbers["metrics/loss"] for step, numbers in kept.items()} == {n: 1 / n for n in range(1, 8)}
    (tmp_path / "wandb.json").unlink()  # as --fresh does
    write(tmp_path, 7, range(8, 9), asked)
    assert len(wandb.runs) == 2


def test_wandb_asked_for_and_not_installed_is_refused(monkeypatch, tmp_path):
    check_wandb("")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_wandb("")
    with pytest.raises(UserError, match="logging.wandb=p: wandb is not installed; pip install wandb"):
        check_wandb("p")


def test_wandb_without_a_login_is_refused_at_the_door(monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace(origin="wandb/__init__.py"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.login = lambda prompt: prompt
    with pytest.raises(UserError, match="logging.wandb=p: no login; wandb login, or set WANDB_API_KEY"):
        check_wandb("p")

    def unreachable(prompt):
        raise wandb.Error("no network")

    wandb.login = unreachable
    with pytest.raises(UserError, match="logging.wandb=p: no network; WANDB_MODE=offline"):
        check_wandb("p")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb("p")


@pytest.mark.skipif(bool(importlib.util.find_spec("wandb")), reason="wandb is installed here")
def test_the_door_refuses_before_anything_is_computed(tmp_path):
    (tmp_path / "wandb").mkdir()  # a folder that wandb itself leaves behind is not the package
    result = subprocess.run(
        [sys.executable, "-m", "cai_jax.launch", "--config=tiny", "--set=logging.wandb=p"], cwd=tmp_path,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 2 and result.stderr.startswith("error: logging.wandb=p: wandb is not installed")
    assert result.stderr.count("\n") == 1
    assert not [path for path in (tmp_path / "runs" / "tiny").iterdir() if path.is_dir()]


def test_all_that_was_written_is_on_disk_after_a_sync(tmp_path, monkeypatch):
    """A checkpoint follows, and a run that is killed then goes on from it: no thread may have to come first.

    tensorboardX's own writer leaves events to a thread; here that never gets its turn.
    """
    monkeypatch.setattr("tensorboardX.event_file_writer._EventLoggerThread.run", lambda thread: None)
    log = MetricsLog(tmp_path, 1e6, CPU)
    with log.opened("step", 0):
        log.append({"step": 1, "loss": 0.5}, 8, 0.5)
        log.sync()
        assert scalars(tmp_path)["metrics/loss"] == [(1, 0.5)]
