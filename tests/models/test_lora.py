"""Adapters: they agree with peft's, start as nothing, and refuse what they cannot compute."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cai_jax import forward, reward
from cai_jax.config import PROJECTIONS, Lora, Mesh
from cai_jax.errors import UserError
from cai_jax.mesh import make_mesh, shardings
from cai_jax.models import kernels, lora
from cai_jax.models.adapters import load_adapter, save_adapter
from cai_jax.models.families import flatten
from cai_jax.models.pretrained import load_model

ORACLES = Path(__file__).parents[1] / "oracles"
ADAPTER = ORACLES / "llama_tied_lora"


@pytest.fixture(scope="module")
def base():
    return load_model(ORACLES / "llama_tied")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(Mesh(), jax.devices()[:1])


@pytest.fixture(scope="module")
def adapted(base):
    return load_adapter(ADAPTER, base)


def on(mesh):
    return lambda shapes: shardings(mesh, shapes)


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_of_peft_gives_the_logits_of_peft(base, adapted, merged):
    io = np.load(ADAPTER / "io.npz")
    params = lora.merge(adapted.params) if merged else adapted.params
    assert not merged or jax.tree.structure(params) == jax.tree.structure(base.params)
    logits = jax.jit(forward, static_argnums=0)(adapted.config, params, io["input_ids"])
    np.testing.assert_allclose(logits, io["logits"], atol=1e-4)
    plain = jax.jit(forward, static_argnums=0)(base.config, base.params, io["input_ids"])
    assert np.abs(plain - io["logits"]).max() > 0.05, "the adapter matters"


def test_an_adapter_of_a_reward_model_brings_its_head():
    folder, base = ORACLES / "llama_tied_reward_lora", load_model(ORACLES / "llama_tied_reward")
    adapted, io = load_adapter(folder, base), np.load(folder / "io.npz")
    for side in ("right", "left"):
        scores = reward(adapted.config, adapted.params, io[f"{side}_ids"], io[f"{side}_mask"])
        np.testing.assert_allclose(scores, io[f"{side}_scores"], atol=1e-4)
    assert np.abs(adapted.params["score"] - base.params["score"]).max() > 0.1


@pytest.mark.parametrize("name, kind", [("llama_tied", "policy"), ("llama_tied_reward", "reward")])
def test_what_is_written_is_what_peft_wrote(tmp_path, name, kind):
    folder = ORACLES / f"{name}_lora"
    adapted = load_adapter(folder, load_model(ORACLES / name))
    save_adapter(tmp_path / "adapter", adapted.config, adapted.params, kind, name)
    theirs, ours = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "adapter"))
    assert theirs.keys() == ours.keys()
    for tensor in theirs:
        np.testing.assert_array_equal(theirs[tensor], ours[tensor])
    theirs, ours = (json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path / "adapter"))
    theirs["target_modules"] = sorted(theirs["target_modules"])
    theirs["modules_to_save"] = theirs["modules_to_save"] and ["score"]  # theirs: "classifier", too
    assert ours == {key: theirs[key] for key in ours}
    again = load_adapter(tmp_path / "adapter", adapted)
    assert again.hash != adapted.hash, "another base, another model"


@pytest.mark.parametrize(
    "setting, told",
    [
        ({"peft_type": "IA3"}, "'peft_type' is 'IA3'; supported: 'LORA'"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"r": 8}, "expected"),
        ({"r": "4"}, "not a number"),
        ({"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_settings_that_are_not_supported_are_refused(base, tmp_path, setting, told):
    folder = Path(shutil.copytree(ADAPTER, tmp_path / "adapter"))
    path = folder / "adapter_config.json"
    path.chmod(0o644)
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(UserError, match=told) as refused:
        load_adapter(folder, base)
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


def test_rank_stabilised_scaling(base, adapted, tmp_path):
    folder = Path(shutil.copytree(ADAPTER, tmp_path / "adapter"))
    (folder / "adapter_config.json").chmod(0o644)
    settings = json.loads((folder / "adapter_config.json").read_text()) | {"use_rslora": True}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert load_adapter(folder, base).params["layers"]["q"].scale == 8 / 2
    assert adapted.params["layers"]["q"].scale == 8 / 4


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_an_adapter_of_another_model_is_refused(base, tmp_path, change):
    folder = Path(shutil.copytree(ADAPTER, tmp_path / "adapter"))
    path = folder / "adapter_model.safetensors"
    path.chmod(0o644)
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    tensor = tensors.pop(name)
    if change == "unknown":
        tensors |= {name: tensor, name.replace("q_proj", "router"): tensor}
    save_file(tensors, path)
    with pytest.raises(UserError, match="q_proj.lora_B.*missing" if change == "missing" else "unexpected.*router"):
        load_adapter(folder, base)


def test_fresh_adapters_change_nothing_and_copy_nothing(base, mesh):
    params = lora.add(base.params, Lora(rank=4), 0, mesh)
    tokens = np.arange(3, 19).reshape(2, 8)
    np.testing.assert_array_equal(
        forward(base.config, params, tokens), forward(base.config, base.params, tokens)
    )
    for name, kernel in lora.adapters(params).items():
        assert kernel.base is base.params["layers"][name]
        inputs = kernel.base.shape[1]
        assert 0.9 < float(jnp.abs(kernel.a_IR).max()) * inputs**0.5 <= 1 and not kernel.b_RO.any()
    assert params["embed"] is base.params["embed"]
    assert lora.add(base.params, Lora(), 0, mesh) is base.params, "rank 0 is off"


def test_the_draw_of_a_target_depends_on_its_seed_alone(base, mesh):
    whole, some, other = (
        lora.add(base.params, Lora(rank=4, targets=targets), seed, mesh)["layers"]
        for targets, seed in ((PROJECTIONS, 0), (("v",), 0), (("v",), 1))
    )
    np.testing.assert_array_equal(whole["v"].a_IR, some["v"].a_IR)
    assert np.abs(some["v"].a_IR - other["v"].a_IR).max() > 0.1
    assert np.abs(whole["k"].a_IR - whole["v"].a_IR).max() > 0.1
    assert some["q"] is base.params["layers"]["q"]


def test_what_trains(base, mesh):
    head = load_model("random:llama", kind="reward").params
    both = {"policy": lora.add(base.params, Lora(rank=4, targets=("q",)), 0, mesh),
            "value": lora.add(head, Lora(rank=4), 0, mesh)}  # fmt: skip
    trains = lora.trainable(both)
    assert jax.tree.structure(trains) == jax.tree.structure(both)
    assert sum(jax.tree.leaves(trains["policy"])) == 2 and sum(jax.tree.leaves(trains["value"])) == 15
    assert trains["value"]["score"] and not trains["value"]["embed"]
    assert all(jax.tree.leaves(lora.trainable({"policy": base.params, "value": head})))


@pytest.mark.parametrize("store", ["float32", "bfloat16", "int8"])
def test_a_lora_kernel_multiplies_like_the_plain_one_on_every_base(store):
    keys = jax.random.split(jax.random.key(0), 4)
    base_LIO, x = jax.random.normal(keys[0], (2, 64, 48)), jax.random.normal(keys[1], (5, 64))
    base = kernels.quantize(base_LIO) if store == "int8" else base_LIO.astype(store)
    a_LIR, b_LRO = jax.random.normal(keys[2], (2, 64, 4)), jax.random.normal(keys[3], (2, 4, 48))
    kernel = jax.tree.map(lambda leaf: leaf[1], kernels.Lora(base, a_LIR, b_LRO, 0.5))
    merged = kernels.plain(kernel)
    assert merged.dtype == ("bfloat16" if store == "bfloat16" else "float32")
    exact = x @ (base_LIO[1] + 0.5 * a_LIR[1] @ b_LRO[1])
    tolerance = {"float32": 1e-5, "bfloat16": 0.01, "int8": 0.02}[store] * np.abs(exact).max()
    np.testing.assert_allclose(kernels.dot(x, kernel), exact, atol=tolerance)
    np.testing.assert_allclose(x @ merged.astype("float32"), exact, atol=tolerance)


def test_a_cast_chooses_the_operands_and_spares_the_scales():
    kernel = kernels.quantize(jax.random.normal(jax.random.key(0), (64, 48)))
    x = jax.random.normal(jax.random.key(1), (5, 64))
    assert kernel.dtype == "float32"
    half = kernels.cast({"q": kernel, "norm": jnp.ones(3)}, "bfloat16")
    assert half["norm"].dtype == "bfloat16" and half["q"].scale_O.dtype == "float32"
    text = jax.jit(kernels.dot).lower(x, half["q"]).as_text()
    assert "(tensor<5x64xbf16>, tensor<64x48xbf16>) -> tensor<5x48xf32>" in text


@pytest.mark.parametrize("source", ["random:llama", "oracle"])
def test_a_model_loads_straight_into_int8(source, mesh):
    source = ORACLES / "llama_tied_reward" if source == "oracle" else source
    exact = load_model(source, kind="reward")
    small = load_model(source, "int8", "reward", shardings=on(mesh))
    assert small.hash == exact.hash
    for name, leaf in flatten(small.params).items():
        if name.removeprefix("layers/") in PROJECTIONS:
            want = kernels.quantize(flatten(exact.params)[name])
            np.testing.assert_array_equal(leaf.kernel, want.kernel)
            np.testing.assert_allclose(leaf.scale_O, want.scale_O, rtol=1e-6)
        else:
            assert leaf.dtype == "bfloat16"
    tokens = np.random.default_rng(0).integers(3, 128, (4, 24))
    scores = [np.asarray(reward(m.config, kernels.cast(m.params, "float32"), tokens)) for m in (exact, small)]
    assert 0 < np.abs(scores[0] - scores[1]).max() < 0.1 * np.abs(scores[0]).max()
