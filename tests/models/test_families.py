"""The decoder against transformers: files in tests/oracles, made by transformers on small random models."""

import functools
import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax.errors import UserError
from cai_jax.models import families
from cai_jax.models.families import RopeKind, config_from_hf, inverse_frequencies, tiny_config, tiny_hf_config
from cai_jax.models.heads import reward
from cai_jax.models.hf_config import Reader
from cai_jax.models.pretrained import load_model
from cai_jax.models.transformer import forward

ORACLES = Path(__file__).parents[1] / "oracles"
POLICIES = sorted(path.parent.name for path in ORACLES.glob("*/grad_norms.json"))
REWARDS = sorted(path.name for path in ORACLES.glob("*_reward"))

load = functools.cache(load_model)
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
compiled_forward = quick_jit(forward, static_argnums=0)
compiled_reward = quick_jit(reward, static_argnums=0)


def arrays(name):
    return np.load(ORACLES / name / "io.npz")


def logits_of(config, params, tokens, mask=None, room=40):
    """Logits of rows that are padded on the right to one length, so that a family compiles once."""
    mask = np.ones_like(tokens) if mask is None else mask
    rest = ((0, 0), (0, room - tokens.shape[1]))
    return np.asarray(compiled_forward(config, params, np.pad(tokens, rest), np.pad(mask, rest)))


def test_every_family_has_an_oracle():
    found = {load(ORACLES / name).config.family for name in POLICIES}
    assert found == set(families.FAMILIES)
    assert {load(ORACLES / name).kind for name in REWARDS} == {"reward"}


@pytest.mark.parametrize("name", POLICIES)
def test_logits(name):
    model, io = load(ORACLES / name), arrays(name)
    length = io["input_ids"].shape[1]
    full = logits_of(model.config, model.params, io["input_ids"])[:, :length]
    np.testing.assert_allclose(full, io["logits"], atol=1e-4, rtol=0)
    for side in ("left", "right"):
        real = io[f"{side}_mask"] == 1
        logits = logits_of(model.config, model.params, io[f"{side}_ids"], io[f"{side}_mask"])
        np.testing.assert_allclose(logits[:, :length][real], io[f"{side}_logits"][real], atol=1e-4, rtol=0)
        assert np.isfinite(logits).all()


def test_without_a_mask_every_token_is_real():
    model, io = load(ORACLES / "gemma3_text"), arrays("gemma3_text")
    logits = compiled_forward(model.config, model.params, io["input_ids"])
    np.testing.assert_allclose(logits, io["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", POLICIES)
def test_greedy_tokens(name):
    model, io = load(ORACLES / name), arrays(name)
    tokens, mask, expected = io["left_ids"], io["left_mask"], io["greedy_left_new"]
    for _ in range(expected.shape[1]):
        logits = logits_of(model.config, model.params, tokens, mask)[:, tokens.shape[1] - 1]
        tokens = np.concatenate([tokens, logits.argmax(axis=-1)[:, None]], axis=1)
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    np.testing.assert_array_equal(tokens[:, -expected.shape[1] :], expected)


@pytest.mark.parametrize("name", POLICIES)
def test_loss_and_gradients(name):
    model, io = load(ORACLES / name), arrays(name)
    tokens, mask = io["right_ids"], io["right_mask"]

    @quick_jit
    @jax.value_and_grad
    def loss_and_gradients(params):
        logits = forward(model.config, params, tokens, mask)
        logprobs = jax.nn.log_softmax(logits[:, :-1])
        chosen = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(chosen * mask[:, 1:]) / mask[:, 1:].sum()

    loss, gradients = loss_and_gradients(model.params)
    np.testing.assert_allclose(loss, io["loss_right"], rtol=1e-5)
    np.testing.assert_allclose(gradients["embed"], io["grad_embed"], atol=1e-4, rtol=0)
    expected = json.loads((ORACLES / name / "grad_norms.json").read_text())
    gradients = families.flatten(gradients)
    for leaf, tensor in families.tensor_names(model.config, "policy").items():
        for layer in range(model.config.n_layers if tensor.stacked else 1):
            gradient = gradients[leaf][layer] if tensor.stacked else gradients[leaf]
            norm = expected.pop(tensor.name.format(layer=layer))
            np.testing.assert_allclose(np.linalg.norm(gradient), norm, rtol=1e-4, atol=1e-6, err_msg=f"{leaf} {layer}")
    assert not expected


@pytest.mark.parametrize("name", REWARDS)
def test_rewards(name):
    model, io = load(ORACLES / name), arrays(name)
    for side in ("left", "right"):
        scores = compiled_reward(model.config, model.params, io[f"{side}_ids"], io[f"{side}_mask"])
        np.testing.assert_allclose(scores, io[f"scores_{side}"][:, 0], atol=1e-4, rtol=0)


BREAKS = {
    "gemma2": [dict(attn_softcap=0.0), dict(logit_softcap=0.0), dict(norm_offset=0.0), dict(query_scale=0.25),
               dict(windows=(0,) * 4), dict(windows=(0, 6, 0, 6)), dict(windows=(7, 0, 7, 0)), dict(embed_scale=1.0),
               dict(activation="silu")],
    "gemma3_text": [dict(rope_of_layer=(0,) * 7), dict(windows=(0,) * 7), dict(qk_norm=False)],
    "gemma3_linear": [dict(rope_kinds=(RopeKind(1e6), RopeKind(1e4)))],
    "qwen3": [dict(qk_norm=False)],
    "mistral_swa": [dict(windows=(0,) * 3), dict(windows=(9,) * 3)],
    "llama_untied_rope3": [dict(rope_kinds=(RopeKind(1e4),))],
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_each_trait_matters(name):
    """The oracles notice every trait of a family: without it the logits are far off."""
    model, io = load(ORACLES / name), arrays(name)
    for change in BREAKS[name]:
        logits = logits_of(replace(model.config, **change), model.params, io["input_ids"])
        assert np.abs(logits[:, : io["logits"].shape[1]] - io["logits"]).max() > 1e-3, change


def test_llama3_frequencies_meet_their_definition():
    kind = RopeKind(5e5, "llama3", 8.0, 1.0, 4.0, 8192)
    plain, scaled = inverse_frequencies(RopeKind(5e5), 128), inverse_frequencies(kind, 128)
    assert scaled.dtype == np.float32
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = ~short & ~long
    assert between.any() and (scaled[between] < plain[between]).all() and (scaled[between] > plain[between] / 8).all()
    assert (np.diff(scaled) < 0).all()


OLD_STYLE = {
    "llama": (
        dict(rope_theta=5e5, rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
             high_freq_factor=4.0, original_max_position_embeddings=64)),
        dict(rope_parameters=dict(rope_theta=5e5, rope_type="llama3", factor=8.0, low_freq_factor=1.0,
             high_freq_factor=4.0, original_max_position_embeddings=64)),
    ),
    "mistral": (dict(rope_theta=1e6), dict(rope_parameters=dict(rope_theta=1e6, rope_type="default"))),
    "qwen2": (
        dict(rope_scaling=dict(type="linear", factor=2.0)),
        dict(rope_parameters=dict(rope_theta=1e4, rope_type="linear", factor=2.0)),
    ),
    "gemma3_text": (
        dict(rope_theta=1e6, rope_local_base_freq=2e4, rope_scaling=dict(rope_type="linear", factor=8.0),
             num_hidden_layers=4, sliding_window_pattern=2),
        dict(rope_parameters=dict(full_attention=dict(rope_theta=1e6, rope_type="linear", factor=8.0),
             sliding_attention=dict(rope_theta=2e4, rope_type="default")), num_hidden_layers=4,
             layer_types=["sliding_attention", "full_attention"] * 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", OLD_STYLE)
def test_old_and_new_keys_mean_the_same(family):
    base = {key: value for key, value in tiny_hf_config(family).items() if "rope" not in key and "pattern" not in key}
    old, new = (config_from_hf(base | keys, "config.json") for keys in OLD_STYLE[family])
    assert old == new
    assert old != config_from_hf(base, "config.json")


@pytest.mark.parametrize("family", families.FAMILIES)
def test_absent_keys_take_the_defaults_of_transformers(family):
    import transformers

    theirs = transformers.CONFIG_MAPPING[family]()
    config = config_from_hf({"model_type": family}, "config.json")
    assert config == config_from_hf(theirs.to_dict(), "config.json")
    assert config.d_model == theirs.hidden_size and config.max_position == theirs.max_position_embeddings
    assert config.eos_ids == Reader({"eos": theirs.eos_token_id}, "theirs").ids("eos")


def test_windows_of_every_family():
    def windows(family, **keys):
        return config_from_hf(tiny_hf_config(family) | dict(num_hidden_layers=4) | keys, "config.json").windows

    assert windows("llama", sliding_window=8) == (0, 0, 0, 0)
    assert windows("mistral", sliding_window=8) == (8, 8, 8, 8)
    assert windows("mistral", sliding_window=None) == (0, 0, 0, 0)
    assert windows("qwen2", sliding_window=8, max_window_layers=1) == (0, 0, 0, 0)
    assert windows("qwen2", sliding_window=8, max_window_layers=1, use_sliding_window=True) == (0, 8, 8, 8)
    listed = ["full_attention", "sliding_attention"] * 2
    assert windows("qwen3", sliding_window=8, use_sliding_window=True, layer_types=listed) == (0, 8, 0, 8)
    assert windows("gemma2", sliding_window=8) == (8, 0, 8, 0)
    assert windows("gemma3", sliding_window=8, sliding_window_pattern=3) == (8, 8, 0, 8)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(model_type="gpt2"), "supported: llama, mistral"),
        (dict(model_type=None), "model_type None"),
        (dict(architectures=["LlamaForTokenClassification"]), "LlamaForCausalLM"),
        (dict(hidden_act="gelu"), "gelu_pytorch_tanh"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "yarn.*default, linear, llama3"),
        (dict(rope_scaling=dict(rope_type="linear")), "'factor'"),
        (dict(hidden_size="64"), "'hidden_size' is '64'"),
        (dict(hidden_size=0), "'hidden_size'"),
        (dict(num_key_value_heads=3), "key/value heads"),
        (dict(quantization_config=dict(bits=4)), "quantised"),
        (dict(rope_scaling=3), "'rope_scaling' is 3, not an object"),
        (dict(rope_parameters=[1]), "'rope_parameters'"),
        (dict(model_type="qwen3", architectures=[], layer_types=3), "'layer_types' is 3, not a list of texts"),
        (dict(model_type="qwen3", architectures=[], layer_types=[["x"], 3]), "'layer_types'"),
        (dict(model_type="gemma3_text", architectures=[], hidden_activation="gelu_pytorch_tanh",
              rope_parameters=dict(full_attention=3)), "'full_attention'"),
        (dict(architectures=3), "'architectures'"),
        (dict(model_type=["llama"]), "model_type"),
        (dict(hidden_act=["silu"]), "'hidden_act'"),
    ],
)
def test_unsupported_configs_end_in_one_line(change, named):
    with pytest.raises(UserError, match=named) as caught:
        config_from_hf(tiny_hf_config("llama") | change, "folder/config.json")
    assert "folder/config.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("family", families.TINY_FAMILIES)
def test_random_params_fill_the_shapes(family):
    config, kind = tiny_config(family), "reward" if family == "mistral" else "policy"
    shapes = families.flatten(families.param_shapes(config, kind))
    draws = [families.flatten(families.random_params(config, kind, seed)) for seed in (3, 3, 4)]
    params, again, other = [{name: np.asarray(leaf) for name, leaf in draw.items()} for draw in draws]
    assert {name: leaf.shape for name, leaf in params.items()} == {name: leaf.shape for name, leaf in shapes.items()}
    for name, leaf in params.items():
        assert leaf.dtype == shapes[name].dtype and leaf.std() > 0.01
        np.testing.assert_array_equal(leaf, again[name])
        assert not np.array_equal(leaf, other[name])
    assert hash(config) == hash(tiny_config(family))
