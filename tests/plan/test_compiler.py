"""The TPU compiler, where it is installed: a tiny run planned for chips that are not there."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

from cai_jax.accelerators import by_device_kind, parse_slice
from cai_jax.config import Mesh
from cai_jax.named_runs import load_config
from cai_jax.plan.measure import Measurer
from cai_jax.plan.plan import make_plan
from cai_jax.plan.topology import has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no TPU compiler for this machine: make env takes libtpu")


def plain_environment():
    """Without this suite's flags of XLA's CPU compiler."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


def plan(tmp_path, *flags):
    """A plan of the tiny config in a process of its own, as the door starts it."""
    written = tmp_path / "plan.json"
    command = [
        sys.executable, "-m", "cai_jax.launch", "--config=tiny", f"--plan_json={written}", "--set", "sampler.rows=8",
        "--set", "mesh.data=1", "--set", "mesh.fsdp=-1", *flags,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=plain_environment())
    return done, json.loads(written.read_text()) if written.exists() else None


def test_ppo_compiles_for_a_v4(tmp_path):
    sizes = ["--set", "sft.batch_size=4", "--set", "ppo.rollouts=8"]
    done, written = plan(tmp_path, "--plan=v4-8", "--stages=sft,ppo", *sizes)
    assert done.returncode == 0, done.stderr
    assert "the TPU compiler's" in done.stdout
    assert written["fits"] and written["slice"] == {
        "name": "v4-8", "chips": 4, "machines": 1, "mesh": {"data": 1, "fsdp": 4, "tensor": 1},
    }  # fmt: skip
    programs = {(p["stage"], p["name"]): p for p in written["programs"]}
    assert {p["bytes_source"] for p in programs.values()} == {"compiler"}
    assert {name for stage, name in programs if stage == "ppo"} == {
        "prepare weights", "share prefix", "prefill", "decode, a step", "score rollouts", "train step",
    }  # fmt: skip
    # The tiny SFT step needs nothing beside its arguments: it stays in the chip's own memory.
    assert programs["ppo", "train step"]["temporaries_bytes"] > programs["sft", "train step"]["temporaries_bytes"]


def test_the_compilers_arguments_are_ours(tmp_path):
    """Arithmetic and compiler agree on what is passed: sizes, dtypes and places."""
    _, written = plan(tmp_path, "--plan=v5e-4", "--stages=sft", "--set", "sft.batch_size=4")
    config = load_config("tiny")[1]
    config = dataclasses.replace(
        config, stages=("sft",), mesh=Mesh(1, -1), sft=dataclasses.replace(config.sft, batch_size=4)
    )
    ours = make_plan(config, parse_slice("h100x4"), Measurer(compiles=False))
    for program, line in zip(written["programs"], ours.lines, strict=True):
        # A TPU pads small arrays to its tiles, so what is tiny takes more.
        assert program["arguments_bytes"] >= line.memory.arguments


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4-512", "v5p-32", "v5e-16", "v6e-8", "v6e-16"])
def test_every_generation_compiles(tmp_path, name):
    rows = parse_slice(name).chips
    sizes = f"sampler.rows={rows}", f"sft.batch_size={rows}", f"ppo.rollouts={2 * rows}"
    flags = [flag for size in ("mesh.data=-1", "mesh.fsdp=1", *sizes) for flag in ("--set", size)]
    done, written = plan(tmp_path, f"--plan={name}", "--stages=sft,ppo", *flags)
    assert done.returncode == 0, done.stderr
    assert written["slice"]["chips"] == rows and {p["bytes_source"] for p in written["programs"]} == {"compiler"}


TOPOLOGIES = """
import json
from cai_jax.plan.topology import set_environment
set_environment()
from cai_jax.accelerators import ACCELERATORS, slices_of
from cai_jax.config import Mesh
from cai_jax.plan.topology import planned_mesh
found = {}
for chip in ACCELERATORS.values():
    for piece in slices_of(chip) if chip.platform == "tpu" else ():
        devices = planned_mesh(Mesh(), piece).devices.flat
        found[piece.name] = [len(devices), len({device.process_index for device in devices}), devices[0].device_kind]
print(json.dumps(found))
"""


def test_the_compiler_knows_every_slice_as_we_do():
    done = subprocess.run([sys.executable, "-c", TOPOLOGIES], capture_output=True, text=True, env=plain_environment())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) > 30
    for name, (chips, machines, kind) in found.items():
        piece = parse_slice(name)
        assert (chips, machines) == (piece.chips, piece.machines), name
        assert by_device_kind(kind) == piece.chip


LOWERED = """
import json
from cai_jax.plan.topology import set_environment
set_environment()
from cai_jax.accelerators import parse_slice
from cai_jax.overrides import apply_overrides
from cai_jax.named_runs import load_config
from cai_jax.plan.plan import planned_run
from cai_jax.plan.stages import programs_of
settings = ["mesh.data=1", "mesh.fsdp=-1", "sft.batch_size=4", "reward_model.batch_size=4", "ppo.rollouts=8"]
run, _ = planned_run(apply_overrides(load_config("tiny")[1], settings), parse_slice("v4-8"))
print(json.dumps({f"{p.stage}: {p.name}": "tpu_custom_call" in p.lower().as_text() for p in programs_of(run)
                  if p.name in ("train step", "score rollouts", "score texts")}))
"""


def test_scoring_and_training_run_the_kernel_on_several_chips():
    done = subprocess.run([sys.executable, "-c", LOWERED], capture_output=True, text=True, env=plain_environment())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "sft: train step": True, "reward_model: train step": False,  # a row holds a pair with a prompt that both see
        "reward_model: score texts": True, "ppo: score rollouts": True, "ppo: train step": True,
        "evaluate: score texts": True,
    }  # fmt: skip


NO_SECOND_COPY = """
from cai_jax.plan import topology
topology.set_environment()
import jax
from cai_jax import config as configs
from cai_jax.accelerators import parse_slice
from cai_jax.mesh import placed, shardings
from cai_jax.models.families import param_shapes, tiny_config
from cai_jax.models.transformer import hidden_states

mesh = topology.planned_mesh(configs.Mesh(1, -1), parse_slice("v4-8"))
model = tiny_config("llama")
params = param_shapes(model, "policy")
tokens = jax.ShapeDtypeStruct((8, 128), "int32")

def loss(params, tokens):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        hidden = hidden_states(model, params, tokens, tokens, remat="full", attention="xla", dtype="bfloat16")
        return hidden.astype("float32").sum()

compiled = jax.jit(jax.grad(loss)).lower(placed(params, shardings(mesh, params)), tokens).compile()
print("layers", params["layers"]["gate"].shape)
print(compiled.as_text())
"""


def test_no_copy_of_all_weights_in_the_dtype_of_products():
    command = [sys.executable, "-c", NO_SECOND_COPY]
    done = subprocess.run(command, capture_output=True, text=True, env=plain_environment())
    assert done.returncode == 0, done.stderr
    (layers, inputs, outputs) = re.search(r"layers \((\d+), (\d+), (\d+)\)", done.stdout).groups()
    assert f"f32[{layers},{int(inputs) // 4},{outputs}]" in done.stdout
    assert f"bf16[{layers},{int(inputs) // 4},{outputs}]" not in done.stdout
