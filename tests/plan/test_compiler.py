"""The TPU compiler, where it is installed: a tiny run planned for chips that are not there."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'cai-jax[plan]'"
)


def plan(tmp_path, *flags):
    """A plan of the tiny config in a process of its own, as the door starts it."""
    written = tmp_path / "plan.json"
    command = [
        sys.executable, "-m", "cai_jax.launch", "--config=tiny", f"--plan_json={written}", "--set", "sampler.rows=8",
        "--set", "mesh.data=1", "--set", "mesh.fsdp=-1", *flags,
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done, json.loads(written.read_text()) if written.exists() else None


def test_ppo_compiles_for_a_v4(tmp_path):
    sizes = ["--set", "sft.batch_size=4", "--set", "ppo.rollouts=8"]
    done, written = plan(tmp_path, "--plan=v4-8", "--stages=sft,ppo", *sizes)
    assert done.returncode == 0, done.stderr
    assert "the TPU compiler's" in done.stdout
    assert written["fits"] and written["slice"] == {
        "name": "v4-8", "chips": 4, "mesh": {"data": 1, "fsdp": 4, "tensor": 1},
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
    from cai_jax.accelerators import parse_slice
    from cai_jax.config import Mesh
    from cai_jax.named_runs import load_config
    from cai_jax.plan.measure import Measurer
    from cai_jax.plan.plan import make_plan

    _, written = plan(tmp_path, "--plan=v5e-4", "--stages=sft", "--set", "sft.batch_size=4")
    config = load_config("tiny")[1]
    config = dataclasses.replace(
        config, stages=("sft",), mesh=Mesh(1, -1), sft=dataclasses.replace(config.sft, batch_size=4)
    )
    ours = make_plan(config, parse_slice("h100x4"), Measurer(compiles=False))
    for program, line in zip(written["programs"], ours.lines, strict=True):
        # A TPU pads small arrays to its tiles, so what is tiny takes more.
        assert program["arguments_bytes"] >= line.memory.arguments


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
    done = subprocess.run([sys.executable, "-c", NO_SECOND_COPY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (layers, inputs, outputs) = re.search(r"layers \((\d+), (\d+), (\d+)\)", done.stdout).groups()
    assert f"f32[{layers},{int(inputs) // 4},{outputs}]" in done.stdout
    assert f"bf16[{layers},{int(inputs) // 4},{outputs}]" not in done.stdout
