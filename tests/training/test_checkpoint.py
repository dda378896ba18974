"""Checkpoints: whole or not there, kept by age and quality, and readable on another mesh with the same bits."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax.config import Mesh
from cai_jax.errors import UserError
from cai_jax.mesh import make_mesh
from cai_jax.training.checkpoint import Checkpoints


def state(value, size=4):
    return {"w": jnp.full((size, 3), value, jnp.float32), "step": jnp.int32(value)}


def steps_of(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_the_last_ones_stay_and_come_back(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=1, keep=2)
    assert checkpoints.restore(state(0))[1] == {}
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"done": step})
    checkpoints.close()
    assert steps_of(tmp_path) == [2, 3]
    found, position = Checkpoints(tmp_path, every=1).restore(state(0))
    assert position == {"done": 3} and int(found["step"]) == 3 and float(found["w"][0, 0]) == 3
    assert int(Checkpoints(tmp_path, every=1).restore(state(0), 2)[0]["step"]) == 2


def test_two_states_are_never_in_memory(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, every=1)
    fresh = state(0)
    assert checkpoints.restore(fresh)[0] is fresh and not fresh["w"].is_deleted()
    checkpoints.save(1, state(1), {})
    loaded = []

    def load(step, **items):
        loaded.append([leaf.is_deleted() for leaf in jax.tree.leaves(fresh)])
        return Checkpoints._load(checkpoints, step, **items)

    monkeypatch.setattr(checkpoints, "_load", load)
    found, _ = checkpoints.restore(fresh)
    assert float(found["w"][0, 0]) == 1 and loaded == [[True, True]]


def test_the_best_stays_beside_the_last_also_after_a_restart(tmp_path):
    qualities = {1: -3.0, 2: -1.0, 3: None, 4: -2.0, 5: -1.0, 6: -4.0}
    for step, quality in qualities.items():
        checkpoints = Checkpoints(tmp_path, every=1, keep=1, best=True)  # opened anew each time
        checkpoints.restore(state(0))
        checkpoints.save(step, state(step), {"done": step}, quality)
        checkpoints.close()
        seen = {s: q for s, q in qualities.items() if s <= step and q is not None}
        best = max(seen, key=lambda s: (seen[s], s))
        assert steps_of(tmp_path) == sorted({step, best})
        assert Checkpoints(tmp_path, every=1, best=True).best() == (best, seen[best])


def test_asynchronous_ones_are_on_disk_once_closed(tmp_path):
    """As on accelerators; the arrays here are not donated, so a CPU can do it."""
    checkpoints = Checkpoints(tmp_path, every=1, keep=2, asynchronous=True)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step, size=200_000), {"done": step})
    checkpoints.close()
    assert steps_of(tmp_path) == [2, 3]
    found, _ = Checkpoints(tmp_path, every=1).restore(state(0, size=200_000))
    assert np.unique(found["w"]).tolist() == [3.0]


def test_without_the_wish_the_best_goes(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=1)
    for step, quality in ((1, 5.0), (2, 1.0)):
        checkpoints.save(step, state(step), {}, quality)
    checkpoints.close()
    assert steps_of(tmp_path) == [2]


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_whole(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=1, keep=2)
    for step in (1, 2):
        checkpoints.save(step, state(step), {"done": step})
    checkpoints.close()
    files = [path for path in (tmp_path / "2" / "state").rglob("*") if path.is_file() and path.stat().st_size > 8]
    refused = 0
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        try:
            found, _ = Checkpoints(tmp_path, every=1).restore(state(0))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(tmp_path / "2") in str(error) and "delete that folder" in str(error)
        else:  # a file that is not needed to read the state
            assert float(found["w"].min()) == 2 and int(found["step"]) == 2, path
        path.write_bytes(whole)
    assert refused >= 2
    for path in sorted((tmp_path / "2").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (tmp_path / "2").rmdir()
    assert int(Checkpoints(tmp_path, every=1).restore(state(0))[0]["step"]) == 1


WRITES = """
import sys
import jax.numpy as jnp
from cai_jax.training.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], every=1)
for step in range(1, 1000):
    checkpoints.save(step, {"w": jnp.full((2048, 4096), step, jnp.float32), "step": jnp.int32(step)}, {"done": step})
"""


def test_one_that_was_killed_while_written_is_never_seen(tmp_path):
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", WRITES, str(tmp_path)], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not (steps_of(tmp_path) and list(tmp_path.glob("*tmp*"))):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read().decode()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        checkpoints = Checkpoints(tmp_path, every=1)
        found, position = checkpoints.restore({"w": jnp.zeros((2048, 4096)), "step": jnp.int32(0)})
        checkpoints.close()
        assert np.unique(found["w"]).tolist() == [position["done"]] == [int(found["step"])]
        assert not list(tmp_path.glob("*tmp*")), "what was left half-written is cleared away"
        for path in tmp_path.iterdir():
            if path.is_dir():
                subprocess.run(["rm", "-r", str(path)], check=True)


ELSEWHERE = """
import json, sys
import jax, numpy as np
from cai_jax import config as configs
from cai_jax import load_model
from cai_jax.mesh import make_mesh, put_rows, shardings
from cai_jax.objectives.model_losses import sft_objective
from cai_jax.training.checkpoint import Checkpoints
from cai_jax.training.step import start_training

def setup(data, fsdp, tensor):
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = make_mesh(configs.Mesh(data, fsdp, tensor), devices)
    model = load_model("random:llama", shardings=lambda shapes: shardings(mesh, shapes))
    optimizer = configs.Optimizer(learning_rate=1e-2, schedule="constant", warmup_fraction=0.0)
    state, step = start_training(sft_objective(model.config), model.params, optimizer, 9, mesh, 1)

    def advance(state, index):
        tokens = np.random.default_rng(index).integers(3, 250, (8, 16)).astype(np.int32)
        batch = {"tokens": tokens, "positions": np.tile(np.arange(16, dtype=np.int32), (8, 1)),
                 "segments": np.ones_like(tokens), "targets": np.ones_like(tokens)}
        state, metrics = step(state, put_rows(mesh, batch))
        return state, float(metrics["loss"])

    return state, advance

def bits(state):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
"""

SAVES = ELSEWHERE + """
folder = sys.argv[1]
state, advance = setup(1, 8, 1)
for index in range(2):
    state, _ = advance(state, index)
checkpoints = Checkpoints(folder, every=1)
checkpoints.save(2, state, {"done": 2})
checkpoints.close()
saved = bits(state)
np.savez(folder + ".npz", **saved)
assert sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state)) > 10
other, advance_there = setup(2, 1, 4)
other, position = Checkpoints(folder, every=1).restore(other)
for name, array in bits(other).items():
    np.testing.assert_array_equal(array, saved[name], err_msg=name)
assert any("tensor" in str(leaf.sharding.spec) for leaf in jax.tree.leaves(other))
losses = []
for index in (2, 3):
    state, here = advance(state, index)
    other, there = advance_there(other, index)
    losses.append([here, there])
print(json.dumps(losses))
"""


def test_a_state_of_eight_devices_goes_on_elsewhere(tmp_path):
    """Saved with fsdp=8; read with data=2 x tensor=4, and on one device: equal to the bit, and the loss goes on."""
    folder = tmp_path / "checkpoints"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-c", SAVES, str(folder)], capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": flags},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    losses = json.loads(result.stdout.splitlines()[-1])
    here = {}
    exec(ELSEWHERE, here)
    state, advance = here["setup"](1, 1, 1)
    state, position = Checkpoints(folder, every=1).restore(state)
    assert position == {"done": 2} and make_mesh(Mesh()).size == jax.device_count()
    with np.load(f"{folder}.npz") as saved:
        for name, array in here["bits"](state).items():
            np.testing.assert_array_equal(array, saved[name], err_msg=name)
    for index, (one, other) in zip((2, 3), losses, strict=True):
        state, loss = advance(state, index)
        np.testing.assert_allclose([one, other], loss, rtol=1e-5)


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, every=1)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand a page more")

    monkeypatch.setattr(checkpoints._open(), "save", full)
    with pytest.raises(UserError, match="cannot be written .*No space left.*make room") as refused:
        checkpoints.save(1, state(1), {})
    assert "\n" not in str(refused.value)
