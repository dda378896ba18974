"""The loop: a signal ends a step and not the work, and the best state does not depend on interruptions."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from run_folders import artifacts

from cai_jax import interrupts
from cai_jax.metrics_log import MetricsLog
from cai_jax.progress import Progress
from cai_jax.training import loop
from cai_jax.training.checkpoint import Checkpoints

LOSSES = [9.0, 8.0, 1.0, 2.0, 5.0, 5.0, 6.0]  # of seven steps; in pairs the second is the best


def train(folder: Path, best=True, stop_at=None, number=signal.SIGTERM, losses=LOSSES, every=2):
    def advance(state, index):
        if index == stop_at:
            os.kill(os.getpid(), number)
        return {"w": state["w"] + 1}, {"loss": losses[index]}, 1

    return loop.run(
        {"w": jnp.zeros(2)}, advance, len(losses), Checkpoints(folder / "checkpoints", every, best=best),
        MetricsLog(folder, 1.0, jax.devices()), Progress(), "sft", "step", loop.mean_of("loss", -1) if best else None,
    )  # fmt: skip


def test_the_last_state_without_and_the_best_with_a_quality(tmp_path):
    assert float(train(tmp_path / "last", best=False)["w"][0]) == 7
    assert float(train(tmp_path / "best")["w"][0]) == 4
    assert float(train(tmp_path / "end", losses=[5.0, 4.0, 3.0])["w"][0]) == 3
    assert float(train(tmp_path / "nan", losses=[5.0, 4.0, float("nan"), 1.0, 6.0, 6.0])["w"][0]) == 2


@pytest.mark.parametrize("stop_at", range(7))
def test_a_signal_saves_at_the_end_of_its_step_and_changes_nothing_in_the_end(tmp_path, stop_at, capsys):
    whole = train(tmp_path / "whole")
    number = (signal.SIGTERM, signal.SIGINT)[stop_at % 2]
    with pytest.raises(interrupts.Stopped) as stopped:
        train(tmp_path / "cut", stop_at=stop_at, number=number)
    assert stopped.value.exit_code == 128 + number
    assert stopped.value.saved == f"step {stop_at + 1} of 7 of sft"
    assert f"saved at step {stop_at + 1}" in str(stopped.value)
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == stop_at + 1
    again = train(tmp_path / "cut")
    assert again["w"].tolist() == whole["w"].tolist()
    files = [tmp_path / name / "metrics.jsonl" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_second_signal_is_obeyed_at_once():
    with pytest.raises(interrupts.Stopped) as stopped, interrupts.noted() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        while not asked():
            time.sleep(0.001)
        assert asked() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert stopped.value.number == signal.SIGTERM and not stopped.value.saved
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def conversations(path: Path) -> Path:
    for n in range(24):
        messages = [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} it is, {n}." * 9}]
        with path.open("a") as file:
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def start(run_dir: Path, rows: Path, *flags: str) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "cai_jax.launch", "--config=tiny", "--stages=sft", f"--run_dir={run_dir}",
        f"--set=sft.mixer={rows}=1", "--set=sft.checkpoint_every=5", "--set=sft.epochs=8", *flags,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_preempted_run_says_so_in_one_line_and_goes_on_with_the_same_bytes(tmp_path):
    rows = conversations(tmp_path / "rows.jsonl")
    undisturbed = start(tmp_path / "whole", rows)
    assert undisturbed.wait() == 0, undisturbed.stderr.read()
    process = start(tmp_path / "cut", rows)
    metrics = tmp_path / "cut" / "sft" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 143 and out == "" and "Traceback" not in err, err
    done = len(metrics.read_text().splitlines())
    line = err.splitlines()[-1]
    assert line.startswith(f"terminated and saved at step {done} of") and line.endswith("run the same command to go on")
    last = start(tmp_path / "cut", rows)
    assert last.wait() == 0, last.stderr.read()
    assert artifacts(tmp_path / "cut") == artifacts(tmp_path / "whole")
    summary = json.loads((tmp_path / "cut" / "sft" / "summary.json").read_text())
    assert summary["examples"] == {str(rows): 24}




@pytest.mark.slow
def test_a_preempted_run_goes_on_with_other_devices(tmp_path, monkeypatch):
    rows = conversations(tmp_path / "rows.jsonl")
    flags = os.environ.get("XLA_FLAGS", "")
    monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_force_host_platform_device_count=2")
    process = start(tmp_path / "run", rows, "--set=mesh.fsdp=2")
    metrics = tmp_path / "run" / "sft" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    done = len(metrics.read_text().splitlines())
    monkeypatch.setenv("XLA_FLAGS", flags)
    last = start(tmp_path / "run", rows)
    assert last.wait() == 0, last.stderr.read()
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)) and len(lines) > done
    assert lines[done]["loss"] < lines[0]["loss"], "it goes on from where it was, not from the start"
