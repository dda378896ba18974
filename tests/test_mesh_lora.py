"""Adapters over a mesh: the same numbers on one device and on eight, and rollout weights without a detour."""

import json
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cai_jax.config import Lora
from cai_jax.mesh import decoding_shardings, shardings
from cai_jax.models import lora
from cai_jax.models.families import param_shapes, tiny_config
from cai_jax.sampler.weights import decoding_form

ON_DEVICES = """
import json, re, sys
from dataclasses import replace
import jax, numpy as np
from cai_jax import Sampler, Sampling, load_model
from cai_jax import config as configs
from cai_jax.mesh import make_mesh, put_rows, shardings
from cai_jax.models import lora
from cai_jax.objectives.model_losses import ppo_objective, sft_objective
from cai_jax.sampler.weights import preparation
from cai_jax.training.step import join, split, start_training

settings = configs.Lora(rank=4, alpha=8)
optimizer = configs.Optimizer(learning_rate=1e-2, schedule="constant", warmup_fraction=0.0)
rng = np.random.default_rng(0)
tokens = rng.integers(3, 250, (8, 32)).astype(np.int32)
batch = {"tokens": tokens, "positions": np.tile(np.arange(32, dtype=np.int32), (8, 1)),
         "segments": np.ones_like(tokens), "targets": np.ones_like(tokens)}
rollouts = {name: batch[name] for name in ("tokens", "positions")} | {
    "mask": np.ones((8, 8), np.int32), **{name: rng.normal(size=(8, 8)).astype(np.float32)
    for name in ("old_logprobs", "old_values", "advantages", "returns")}}
chats = [[{"role": "user", "content": f"Count to {i}."}] for i in range(8)]

def steps(mesh, params, objective, batch):
    trained, frozen = split(params, lora.trainable(params))
    state, step = start_training(objective, trained, optimizer, 3, mesh, 1, frozen)
    numbers = []
    for _ in range(3):
        state, metrics = step(state, put_rows(mesh, batch))
        numbers.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    moments = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.opt_state))
    return join(state.params, frozen), numbers, moments

def on(shape):
    mesh = make_mesh(configs.Mesh(*shape), jax.devices()[: np.prod(shape)])
    place = lambda shapes: shardings(mesh, shapes)
    model = load_model("random:llama", shardings=place)
    value = load_model("random:llama", kind="reward", seed=1, shardings=place)
    small = load_model("random:llama", "int8", shardings=place)
    both = {"policy": lora.add(model.params, settings, 1, mesh), "value": lora.add(value.params, settings, 2, mesh)}
    objective = ppo_objective(model.config, value.config, temperature=1.0, clip=0.2, value_clip=0.2, value_coef=0.1)
    trained, ppo, moments = steps(mesh, both, objective, rollouts)
    _, sft, _ = steps(mesh, lora.add(small.params, settings, 0, mesh), sft_objective(small.config), batch)

    def sampled(params):
        sampler = Sampler(replace(model, params=params), max_length=256, rows=8, mesh=mesh)
        return [sample.tokens for sample in sampler.generate(chats, Sampling(temperature=0.0, max_new_tokens=12))]

    prepare = preparation(model.config, "bfloat16", mesh, False)
    with jax.transfer_guard("disallow"):
        prepare(trained["policy"])
    gathered = [
        sorted(re.findall(r"= (\\w+\\[[0-9,]*\\])[^=]* all-gather", prepare.lower(params).compile().as_text()))
        for params in (trained["policy"], model.params)
    ]
    return {"ppo": ppo, "sft": sft, "split_moments": moments, "gathered": gathered,
            "tokens": sampled(trained["policy"]), "merged": sampled(lora.merge(trained["policy"])),
            "base": sampled(model.params)}

print(json.dumps([on(shape) for shape in json.loads(sys.argv[1])]))
"""


def on_meshes(*shapes) -> list[dict]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    # Each virtual device may wait in several collectives at once, and each wait holds a thread; NPROC is their number.
    result = subprocess.run(
        [sys.executable, "-c", ON_DEVICES, json.dumps(shapes)], capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": flags, "NPROC": "64"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_adapters_train_and_sample_the_same_on_eight_devices():
    alone, *others = on_meshes((1, 1, 1), (1, 8, 1), (2, 2, 2))
    assert alone["tokens"] == alone["merged"] != alone["base"]
    for split in others:
        for name in ("ppo", "sft"):
            np.testing.assert_allclose(split[name], alone[name], rtol=1e-5, err_msg=name)
        assert split["tokens"] == split["merged"] == alone["tokens"]
        assert split["split_moments"] > 0
        with_adapters, without = split["gathered"]
        assert with_adapters == without != [], "adapters are merged where they lie, before the weights are gathered"
        assert all(shape.count(",") == 1 for shape in without), "a layer at a time"


@pytest.mark.parametrize("base", ["float32", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_table_splits_adapters_like_their_base(base, family):
    mesh = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    adapted = partial(lora.add, config=Lora(rank=4), seed=0, mesh=mesh)
    placed = shardings(mesh, jax.eval_shape(adapted, param_shapes(tiny_config(family), "reward", base)))
    assert len(lora.adapters(placed)) == 7
    for kernel in lora.adapters(placed).values():
        of_base = jax.tree.leaves(kernel.base)[0].spec
        assert kernel.a_IR.spec == P(None, of_base[1], None) and kernel.b_RO.spec == P(None, None, of_base[2])
        assert base == "float32" or kernel.base.scale_O.spec == P(None, of_base[2])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_int8_rollout_weights_stay_split_along_the_tensor_axis(platform):
    config, mesh = tiny_config("llama"), SimpleNamespace(
        shape={"data": 1, "fsdp": 1, "tensor": 2}, devices=np.asarray([SimpleNamespace(platform=platform)])
    )
    form = partial(decoding_form, config, "float32", mesh, platform, True)
    weights = jax.eval_shape(form, param_shapes(config, "policy"))
    placed = decoding_shardings(jax.sharding.AbstractMesh((1, 1, 2), ("data", "fsdp", "tensor")), weights)
    for name, (inputs, outputs) in {"q": (None, "tensor"), "down": ("tensor", None)}.items():
        kernel = placed["layers"][1][name]
        of_kernel = jax.tree.leaves(kernel.kernel)[0].spec
        assert of_kernel == (P(outputs, inputs) if platform == "cpu" else P(inputs, outputs))
        assert kernel.scale_O.spec == P(outputs)
