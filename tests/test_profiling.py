import types

import jax
import jax.numpy as jnp
import pytest

from cai_jax.profiling import Profiler
from cai_jax.progress import Progress


@pytest.fixture
def traces(monkeypatch):
    """Starts and stops of traces, in their order."""
    asked = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda to, profiler_options: asked.append(f"start {to.name}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: asked.append("stop"))
    return asked


def work(profiler, name, unit, total, done=0, fail_at=None):
    steps = []
    progress = Progress(stream=types.SimpleNamespace(isatty=lambda: False, write=lambda text: None, flush=lambda: None),
                        profiler=profiler)  # fmt: skip
    with progress.task(name, total, unit, done) as task:
        for step in range(done, total):
            if step == fail_at:
                raise ZeroDivisionError
            task.advance(1)
            steps.append(step)


def test_three_steps_after_the_first_are_traced(tmp_path, traces):
    profiler = Profiler(tmp_path)
    progress = Progress(tmp_path, profiler=profiler)
    with progress.task("sft", 10, "steps") as task:
        for step in range(10):
            traces.append(step)
            task.advance(1)
    assert traces == [0, "start sft", 1, 2, 3, "stop", 4, 5, 6, 7, 8, 9]
    assert profiler.summary() == f"profile: traces of sft under {tmp_path}; see them with: xprof {tmp_path / 'sft'}"


def test_an_update_of_ppo_is_traced_alone_and_a_stage_once(tmp_path, traces):
    profiler = Profiler(tmp_path)
    work(profiler, "ppo", "updates", 4)
    work(profiler, "ppo", "updates", 4)
    assert traces == ["start ppo", "stop"]


def test_ten_passes_of_the_sampler_are_traced(tmp_path, traces):
    profiler = Profiler(tmp_path)
    with Progress(tmp_path, profiler=profiler).task("sft: helpful samples", 5, "samples") as task:
        for call in range(30):
            traces.append(call)
            task.advance(0)
    assert traces[10] == "start sft_helpful_samples" and traces[21] == "stop" and len(traces) == 32


def test_a_short_stage_ends_its_trace(tmp_path, traces):
    work(Profiler(tmp_path), "sft", "steps", 2)
    assert traces == ["start sft", "stop"]


def test_a_stage_of_one_step_is_not_traced(tmp_path, traces):
    profiler = Profiler(tmp_path)
    work(profiler, "export", "models", 1)
    work(profiler, "sft", "steps", 7, done=6)
    assert traces == [] and "nothing was traced" in profiler.summary()


def test_a_failing_stage_ends_its_trace(tmp_path, traces):
    with pytest.raises(ZeroDivisionError):
        work(Profiler(tmp_path), "sft", "steps", 9, fail_at=2)
    assert traces == ["start sft", "stop"]


def test_a_real_trace_is_a_file_that_xprof_reads(tmp_path):
    profiler = Profiler(tmp_path)
    with Progress(tmp_path, profiler=profiler).task("sft", 3, "steps") as task:
        for step in range(3):
            with jax.profiler.StepTraceAnnotation("sft", step_num=step):
                jnp.ones((64, 64)).sum().block_until_ready()
            task.advance(1)
    [trace] = (tmp_path / "sft").glob("plugins/profile/*/*.xplane.pb")
    assert b"sft" in trace.read_bytes()  # the name of the steps
