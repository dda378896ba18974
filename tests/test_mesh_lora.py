"""Adapters over a mesh: the same numbers on one device and on eight, and rollout weights without a detour."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from cai_jax.config import Lora
from cai_jax.mesh import shardings
from cai_jax.models import lora
from cai_jax.models.families import param_shapes, tiny_config
from cai_jax.models.kernels import quantize

ON_DEVICES = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from cai_jax import Sampler, Sampling, load_model
from cai_jax import config as configs
from cai_jax.mesh import make_mesh, put_rows, shardings
from cai_jax.models import lora
from cai_jax.objectives.model_losses import ppo_objective, sft_objective
from cai_jax.sampler.weights import preparation
from cai_jax.training.step import join, split, start_training
from dataclasses import replace

data, fsdp, tensor = json.loads(sys.argv[1])
mesh = make_mesh(configs.Mesh(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])
place = lambda shapes: shardings(mesh, shapes)
settings = configs.Lora(rank=4, alpha=8)
optimizer = configs.Optimizer(learning_rate=1e-2, schedule="constant", warmup_fraction=0.0)
rng = np.random.default_rng(0)
tokens = rng.integers(3, 250, (8, 32)).astype(np.int32)
batch = {"tokens": tokens, "positions": np.tile(np.arange(32, dtype=np.int32), (8, 1)),
         "segments": np.ones_like(tokens), "targets": np.ones_like(tokens)}
rollouts = {name: batch[name] for name in ("tokens", "positions")} | {
    "mask": np.ones((8, 8), np.int32), **{name: rng.normal(size=(8, 8)).astype(np.float32)
    for name in ("old_logprobs", "old_values", "advantages", "returns")}}

def steps(params, objective, batch):
    trained, frozen = split(params, lora.trainable(params))
    state, step = start_training(objective, trained, optimizer, 3, mesh, 1, frozen)
    numbers = []
    for _ in range(3):
        state, metrics = step(state, put_rows(mesh, batch))
        numbers.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    split_moments = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.opt_state))
    return join(state.params, frozen), numbers, split_moments

out = {"losses": {}}
model = load_model("random:llama", shardings=place)
value = load_model("random:llama", kind="reward", seed=1, shardings=place)
policy, out["losses"]["sft"], out["split_moments"] = steps(
    lora.add(model.params, settings, 0, mesh), sft_objective(model.config), batch)
both = {"policy": lora.add(model.params, settings, 1, mesh), "value": lora.add(value.params, settings, 2, mesh)}
objective = ppo_objective(model.config, value.config, temperature=1.0, clip=0.2, value_clip=0.2, value_coef=0.1)
_, out["losses"]["ppo"], _ = steps(both, objective, rollouts)
small = load_model("random:llama", "int8", shardings=place)
_, out["losses"]["int8"], _ = steps(lora.add(small.params, settings, 0, mesh), sft_objective(small.config), batch)

chats = [[{"role": "user", "content": f"Count to {i}."}] for i in range(8)]
greedy = Sampling(temperature=0.0, max_new_tokens=12)
def sampled(params):
    sampler = Sampler(replace(model, params=params), max_length=256, rows=8, mesh=mesh)
    return [sample.tokens for sample in sampler.generate(chats, greedy)]
out["tokens"], out["merged"], out["base"] = sampled(policy), sampled(lora.merge(policy)), sampled(model.params)

text = preparation(model.config, "bfloat16", mesh, False).lower(policy).compile().as_text()
out["gathers"] = sorted(set(re.findall(r"= \\(?(\\w+)\\[[^=]*all-gather", text)))
with jax.transfer_guard("disallow"):
    preparation(model.config, "bfloat16", mesh, False)(policy)
print(json.dumps(out))
"""


def on_devices(*shape) -> dict:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-c", ON_DEVICES, json.dumps(shape)], capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": flags},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_adapters_train_and_sample_the_same_on_eight_devices():
    alone = on_devices(1, 1, 1)
    assert alone["tokens"] == alone["merged"] != alone["base"]
    for shape in ((1, 8, 1), (2, 2, 2)):
        split = on_devices(*shape)
        for name, losses in alone["losses"].items():
            np.testing.assert_allclose(split["losses"][name], losses, rtol=1e-5, err_msg=name)
        assert split["tokens"] == split["merged"] == alone["tokens"]
        assert split["split_moments"] > 0
        assert split["gathers"], "weights were split, and rollouts need them whole"


@pytest.mark.parametrize("base", ["float32", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_table_splits_adapters_like_their_base(base, family):
    mesh = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    shapes = param_shapes(tiny_config(family), "reward")
    if base == "int8":
        shapes["layers"] |= {name: jax.eval_shape(quantize, shapes["layers"][name]) for name in Lora().targets}

    def adapted(params):
        starts = {name: lora._start(leaf, jax.random.key(0), Lora(rank=4)) for name, leaf in params["layers"].items()
                  if name in Lora().targets}  # fmt: skip
        kernels = {name: start.replace(base=params["layers"][name]) for name, start in starts.items()}
        return {**params, "layers": params["layers"] | kernels}

    placed = shardings(mesh, jax.eval_shape(adapted, shapes))
    for kernel in lora.adapters(placed).values():
        of_base = jax.tree.leaves(kernel.base)[0].spec
        assert kernel.a_IR.spec == (None, of_base[1], None) and kernel.b_RO.spec == (None, None, of_base[2])
        assert base == "float32" or kernel.base.scale_O.spec == (None, of_base[2])
