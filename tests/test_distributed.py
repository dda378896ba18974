"""Several processes as one run: where they stand, what they share, the same numbers as one process, and their end."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_folders import artifacts

from cai_jax import distributed
from cai_jax.distributed import Place, place
from cai_jax.errors import UserError

# ---------------------------------------------------------------- where a process stands

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_PROCID", "SLURM_NTASKS",
             "OMPI_COMM_WORLD_SIZE")


@pytest.fixture
def alone(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return monkeypatch


def test_one_machine_is_alone_unless_told(alone):
    assert place(None, None, None) is None
    assert place("host:1234", 4, 3) == Place("host:1234", 4, 3)
    assert place("host:1234", 1, 0) is None


def test_the_environment_stands_for_flags(alone):
    alone.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    alone.setenv("JAX_NUM_PROCESSES", "2")
    alone.setenv("JAX_PROCESS_ID", "1")
    assert place(None, None, None) == Place("host:1", 2, 1)
    assert place("other:2", None, 0) == Place("other:2", 2, 0)
    alone.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES=two"):
        place(None, None, None)


def test_a_cluster_is_left_to_jax(alone):
    alone.setenv("SLURM_NTASKS", "1")
    alone.setenv("SLURM_PROCID", "0")
    assert place(None, None, None) is None
    alone.setenv("SLURM_NTASKS", "2")
    assert place(None, None, None) == Place()


@pytest.mark.parametrize("given, told", [
    (("host:1", None, None), "--processes is missing"), ((None, 2, 0), "--coordinator is missing"),
    (("host:1", 2, None), "--process is missing"), (("host", 2, 0), "write it as HOST:PORT"),
    (("host:99999", 2, 0), "HOST:PORT"), (("host:1", 2, 2), "--process=2 must be from 0 to --processes - 1 .1."),
    (("host:1", 2, -1), "--process=-1"),
])  # fmt: skip
def test_half_a_place_is_one_line(alone, given, told):
    with pytest.raises(UserError, match=told) as refused:
        place(*given)
    assert "\n" not in str(refused.value)


def test_alone_everything_is_done_here():
    assert distributed.first() and not distributed.several()
    assert distributed.by_first(lambda: 7) == 7 and distributed.highest(3) == 3
    distributed.meet()
    distributed.end_all(9, "goes on")


# ---------------------------------------------------------------- together


def together(count: int, devices: int, *arguments: str, **environment) -> list[subprocess.Popen]:
    """`count` processes of one run, each with so many devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    places = [{"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(n)}
              if count > 1 else {} for n in range(count)]
    return [
        subprocess.Popen(
            [sys.executable, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **environment, **place},
        )
        for place in places
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen], timeout: float = 400) -> list[tuple[int, str, str]]:
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            results.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return results


PIECES = """
import json, random, sys, time
from pathlib import Path
from cai_jax import distributed
distributed.start(distributed.place(None, None, None))
import jax, numpy as np
from cai_jax import Sampler, Sampling, load_model
from cai_jax.config import Mesh
from cai_jax.errors import UserError
from cai_jax.mesh import make_mesh, on_host, place_rows, shardings
from cai_jax.run_folder import MetricsFile, StageFolder
from cai_jax.sampler import Generate, Outside
from cai_jax.training.checkpoint import Checkpoints

run_dir, me = Path(sys.argv[1]), jax.process_index()
said = distributed.by_first(lambda: {"me": me, "text": "\u00e9"})
assert said == {"me": 0, "text": "\u00e9"} and distributed.highest(10 * me + 1) == 10 * jax.process_count() - 9
try:
    distributed.by_first(lambda: (_ for _ in ()).throw(UserError("mend it")))
except UserError as error:
    assert str(error) == "mend it"

stage = StageFolder(run_dir, "sft")
assert stage.begin({"seed": 1}) == "new" and stage.begin({"seed": 1}) == "resume"
stage.write_shard(0, 1, [{"id": str(me)}])
assert stage.finished_shards() == {0} and stage.read_shards() == [{"id": "0"}]
metrics = MetricsFile(stage.path / "metrics.jsonl")
metrics.append({"step": 1})
assert metrics.read() == [{"step": 1}]

mesh = make_mesh(Mesh())
asked = []
def take(rows):
    asked.extend(rows.tolist())
    return {"tokens": np.stack([rows, rows * 10], axis=1)}
placed = place_rows(mesh, np.array([5, 6, 7, 8]), take)["tokens"]
assert len(asked) == 4 // jax.process_count(), asked
assert on_host(placed).tolist() == [[5, 50], [6, 60], [7, 70], [8, 80]]

model = load_model("random:llama", shardings=lambda shapes: shardings(mesh, shapes))
sampler = Sampler(model, max_length=256, rows=4, mesh=mesh)
chats = [[{"role": "user", "content": f"Count to {i}."}] for i in range(7)]
samples = sampler.generate(chats, Sampling(max_new_tokens=9), seed=3)
scores = sampler.score(chats, ["Yes", "No way"])
counts = dict(vars(sampler.counts))

called = []
def call(i, text):
    called.append(i)
    time.sleep(random.random() / 20)
    return {"told": f"{i}: {len(text)}"}
def asks(i):
    draft = yield Generate(chats[i], Sampling(max_new_tokens=5), i)
    answer = yield Outside(lambda: call(i, draft.text))
    return (yield Generate([{"role": "user", "content": answer["told"]}], Sampling(max_new_tokens=5), i)).text
told = sampler.run(asks(i) for i in range(7))
assert sorted(called) == (list(range(7)) if me == 0 else [])  # the first calls for all
def fails():
    yield Outside(lambda: (_ for _ in ()).throw(UserError("no budget")))
try:
    sampler.run([fails(), asks(0)])
    raise AssertionError("went on")
except UserError as error:
    assert str(error) == "no budget"

state = {"w": jax.device_put(np.arange(8.0).reshape(4, 2), jax.sharding.NamedSharding(mesh, jax.P("data")))}
checkpoints = Checkpoints(stage.path / "checkpoints", every=1)
checkpoints.save(1, state, {"done": 1})
back, position = checkpoints.restore(jax.tree.map(lambda x: x * 0, state))
assert position == {"done": 1} and on_host(back["w"]).tolist() == np.arange(8.0).reshape(4, 2).tolist()
checkpoints.close()
digest = stage.finish({"seconds": 1.0})
assert stage.done()["hash"] == digest and not (stage.path / "checkpoints").exists()
distributed.finish()
print(json.dumps([[s.text for s in samples], [s.logprobs for s in samples], scores, counts, told, digest]))
"""


def test_two_processes_share_a_folder_and_make_the_same_schedule_and_texts(tmp_path):
    [(code, alone, err)] = ended(together(1, 2, "-c", PIECES, str(tmp_path / "one")))
    assert code == 0, err
    results = ended(together(2, 1, "-c", PIECES, str(tmp_path / "two")))
    assert [code for code, _, _ in results] == [0, 0], [err for _, _, err in results]
    for _, out, _ in results:
        assert json.loads(out.splitlines()[-1]) == json.loads(alone.splitlines()[-1])


# ---------------------------------------------------------------- whole runs



def launch(count: int, devices: int, run_dir: Path, *flags: str, **environment) -> list[subprocess.Popen]:
    arguments = ("-m", "cai_jax.launch", "--config=tiny", f"--run_dir={run_dir}", *flags)
    return together(count, devices, *arguments, **environment)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w") as file:
        for n in range(24):
            messages = [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} it is." * 12}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def sft_flags(rows: Path) -> list[str]:
    return ["--stages=sft", f"--set=sft.mixer={rows}=1", "--set=sft.checkpoint_every=3", "--set=sft.epochs=6"]


def test_two_processes_train_to_the_bytes_of_one(tmp_path, conversations):
    flags = sft_flags(conversations)
    [(code, out, err)] = ended(launch(1, 2, tmp_path / "one", *flags))
    assert code == 0, err
    results = ended(launch(2, 1, tmp_path / "two", *flags))
    assert [code for code, _, _ in results] == [0, 0], [err for _, _, err in results]
    spoken = [[line for line in out.splitlines() if "[Gloo]" not in line] for _, out, _ in results]
    assert spoken == [[f"report: {tmp_path / 'two' / 'report.html'}"], []], "one process speaks"
    assert "sft: done" in results[0][2] and results[1][2] == ""
    assert artifacts(tmp_path / "two") == artifacts(tmp_path / "one")
    assert (tmp_path / "two" / "report.html").exists()


def test_a_mistake_ends_all_processes_with_its_line(tmp_path):
    results = ended(launch(2, 1, tmp_path / "run", "--stages=ppo"))
    assert [code for code, _, _ in results] == [2, 2]
    for _, out, err in results:
        assert "needs the artifacts of stage sft" in err and "Traceback" not in err and "report" not in out


def test_a_signal_to_one_process_stops_all_at_one_step(tmp_path, conversations):
    flags = [*sft_flags(conversations), "--set=sft.epochs=400"]
    processes = launch(2, 1, tmp_path / "run", *flags)
    metrics = tmp_path / "run" / "sft" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    results = ended(processes)
    assert [code for code, _, _ in results] == [143, 143], results
    done = metrics.read_text().count("\n")
    for _, _, err in results:
        assert f"terminated and saved at step {done} of" in err.splitlines()[-1]


def wait_for(happened, processes, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_with_a_message_and_the_run_goes_on(tmp_path, conversations, victim):
    flags = sft_flags(conversations)
    assert ended(launch(2, 1, tmp_path / "whole", *flags))[0][0] == 0
    processes = launch(2, 1, tmp_path / "run", *flags)
    wait_for(lambda: list((tmp_path / "run" / "sft" / "checkpoints").glob("[0-9]*")), processes)
    processes[victim].kill()
    killed = time.monotonic()
    out, err = processes[1 - victim].communicate(timeout=120)
    assert time.monotonic() - killed < 60
    assert processes[1 - victim].returncode == distributed.LOST, err
    assert f"process {victim} of 2 is gone" in err.splitlines()[-1] and "run the same command" in err.splitlines()[-1]
    processes[victim].communicate()
    results = ended(launch(2, 1, tmp_path / "run", *flags))
    assert [code for code, _, _ in results] == [0, 0], [err for _, _, err in results]
    assert "going on where it stopped" in results[0][2]
    assert artifacts(tmp_path / "run") == artifacts(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_run_every_stage_to_the_bytes_of_one(tmp_path, conversations):
    """With sets mixed by fraction, and the best state exported."""
    mixer = f"revisions=0.5,helpful=0.5,{conversations}=0.25"
    flags = [f"--set=sft.mixer={mixer}", "--set=checkpoints.export=best", "--set=checkpoints.keep=2"]
    [(code, _, err)] = ended(launch(1, 2, tmp_path / "one", *flags))
    assert code == 0, err
    results = ended(launch(2, 1, tmp_path / "two", *flags))
    assert [code for code, _, _ in results] == [0, 0], [err for _, _, err in results]
    expected, got = artifacts(tmp_path / "one"), artifacts(tmp_path / "two")
    assert sorted(got) == sorted(expected)
    assert [name for name in expected if got[name] != expected[name]] == []
    assert json.loads(got["sft/summary.json"])["examples"] == {"revisions": 4, "helpful": 2, str(conversations): 6}
    # Another attempt finds all stages done, in all processes; one that is missing is done by one process alone.
    results = ended(launch(2, 1, tmp_path / "two", *flags))
    assert [code for code, _, _ in results] == [0, 0] and results[0][2].count("skipped") == 6
    shutil.rmtree(tmp_path / "two" / "evaluate")
    [(code, _, err)] = ended(launch(1, 2, tmp_path / "two", *flags))
    assert code == 0 and artifacts(tmp_path / "two") == expected, err


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [("--set=mesh.fsdp=2",), ("--set=mesh.fsdp=2", "--set=mesh.tensor=2")])
def test_four_processes_go_through_sft_and_an_update_of_ppo(tmp_path, conversations, mesh):
    """Sums over four devices are made in another order between processes: equal numbers, not equal bits."""
    flags = [
        *sft_flags(conversations), "--stages=sft,ppo", "--set=sft.batch_size=4", "--set=ppo.reward_model=random:llama",
        "--set=ppo.updates=1", "--set=ppo.rollouts=8", *mesh,
    ]  # fmt: skip
    [(code, _, err)] = ended(launch(1, 4, tmp_path / "one", *flags))
    assert code == 0, err
    results = ended(launch(4, 1, tmp_path / "four", *flags))
    assert [code for code, _, _ in results] == [0] * 4, [err for _, _, err in results]
    for stage in ("sft", "ppo"):
        lines = [[json.loads(line) for line in (tmp_path / run / stage / "metrics.jsonl").read_text().splitlines()]
                 for run in ("one", "four")]  # fmt: skip
        assert len(lines[0]) == len(lines[1]) > 0
        for one, four in zip(*lines, strict=True):
            assert four == pytest.approx(one, rel=1e-4, abs=1e-6)
