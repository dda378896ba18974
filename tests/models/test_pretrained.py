"""Model folders: what is written reads back bit for bit, and a wrong folder ends in one line that names it."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cai_jax.errors import UserError
from cai_jax.models import families, safetensors_files
from cai_jax.models.pretrained import load_model, model_hash, reward_pad_id, save_model

ORACLES = Path(__file__).parents[1] / "oracles"
FOLDERS = sorted(path.parent.name for path in ORACLES.glob("*/model.safetensors"))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def save(folder, model, **changes):
    fields = dict(config=model.config, params=model.params, tokenizer=model.tokenizer, hf_config=model.hf_config)
    return save_model(folder, kind=model.kind, **(fields | changes))


def assert_same_params(a, b):
    a, b = families.flatten(a), families.flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


@pytest.fixture
def folder(tmp_path):
    """A copy of an oracle that a test may break."""
    return shutil.copytree(ORACLES / "qwen2", tmp_path / "model")


@pytest.mark.parametrize("name", FOLDERS)
def test_round_trip_is_bit_exact(name, tmp_path):
    model = load_model(ORACLES / name)
    written = save(tmp_path / "out", model)
    theirs, ours = load_file(ORACLES / name / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for tensor in theirs:
        np.testing.assert_array_equal(theirs[tensor], ours[tensor])
    again = load_model(tmp_path / "out")
    assert (again.config, again.kind, again.hash) == (model.config, model.kind, written)
    assert_same_params(again.params, model.params)
    before = json.loads((ORACLES / name / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == before


def test_same_content_has_the_same_bytes_and_hash(tmp_path):
    model = load_model("random:gemma3")
    first = save(tmp_path / "a", model, metadata={"stage": "sft", "from": "x"})
    loaded = load_model(tmp_path / "a")
    loaded.tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=3)  # leaves traces in it
    second = save(tmp_path / "b" / "c", loaded, metadata={"from": "x", "stage": "sft"})
    assert contents(tmp_path / "a") == contents(tmp_path / "b" / "c")
    assert first == second == loaded.hash
    with safe_open(tmp_path / "a" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt", "stage": "sft", "from": "x"}
    changed = jax.tree.map(np.array, model.params)
    changed["final_norm"][3] += 1e-3
    assert save(tmp_path / "d", model, params=changed) != first


def test_bfloat16(tmp_path):
    model = load_model(ORACLES / "gemma2", dtype="bfloat16")
    exact = load_model(ORACLES / "gemma2").params["layers"]["q"]
    assert model.params["layers"]["q"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(model.params["layers"]["q"], np.asarray(exact).astype(ml_dtypes.bfloat16))
    save(tmp_path / "out", model)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same_params(load_model(tmp_path / "out", dtype="bfloat16").params, model.params)
    widened = load_model(tmp_path / "out").params["layers"]["q"]
    np.testing.assert_array_equal(widened, np.asarray(model.params["layers"]["q"], np.float32))


def test_sharded_files(tmp_path, monkeypatch):
    model = load_model("random:qwen3")
    save(tmp_path / "one", model)
    monkeypatch.setattr(safetensors_files, "SHARD_BYTES", 100_000)
    save(tmp_path / "many", model)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "many" / file).stat().st_size < 130_000 for file in files)
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert_same_params(load_model(tmp_path / "many").params, model.params)
    (tmp_path / "many" / files[1]).unlink()
    with pytest.raises(UserError, match=files[1]):
        load_model(tmp_path / "many")


def test_saving_replaces_a_folder_whole(tmp_path):
    model = load_model("random:llama")
    target = tmp_path / "out"
    save(target, model)
    (target / "stale.txt").write_text("old")
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "half.safetensors").write_text("from a killed run")
    save(target, model)
    assert not {"stale.txt", "half.safetensors"} & contents(target).keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unwritable_target(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/out.*cannot be written"):
        save(tmp_path / "file" / "out", load_model("random:llama"))


DEVICES = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from cai_jax.models.families import flatten
from cai_jax.models.pretrained import load_model, save_model
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("fsdp", "tensor"))
specs = {1: P(), 2: P("tensor", "fsdp"), 3: P(None, "fsdp", "tensor")}
def shard(shapes):
    def spec(path, leaf):
        return P() if "norm" in str(path) or "bias" in str(path) or leaf.shape[-1] == 1 else specs[len(leaf.shape)]
    return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, spec(path, leaf)), shapes)
model = load_model(sys.argv[1], shardings=shard)
plain = load_model(sys.argv[1])
q = model.params["layers"]["q"]
assert q.addressable_shards[0].data.shape == (q.shape[0], q.shape[1] // 2, q.shape[2] // 2)
for name, leaf in flatten(plain.params).items():
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(flatten(model.params)[name]))
saved = [save_model(sys.argv[2], m.config, m.params, None, m.hf_config, m.kind) for m in (plain, model)]
assert saved[0] == saved[1]
"""


def test_loading_into_shardings(tmp_path):
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", DEVICES, str(ORACLES / "mistral_swa_reward"), str(tmp_path / "out")]
    subprocess.run(command, env=env, check=True, cwd=Path(__file__).parents[2])


def test_only_the_wanted_slice_is_read(monkeypatch):
    """A device that holds layer 1, the first half of the inputs and the last third of the outputs."""
    reads, checkpoint = [], safetensors_files.Checkpoint(ORACLES / "qwen3")
    wanted = (slice(1, 2), slice(0, 24), slice(64, 96))

    class Watched:
        def __init__(self, path, framework):
            self.file = safe_open(path, framework)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.__exit__(None, None, None)

        def get_slice(self, name):
            part = self.file.__enter__().get_slice(name)
            return type("Part", (), {"__getitem__": lambda _, index: reads.append((name, index)) or part[index]})()

    monkeypatch.setattr(safetensors_files, "safe_open", Watched)
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, sharding, callback: callback(wanted))
    tensor = families.HfTensor("model.layers.{layer}.mlp.up_proj.weight", transposed=True, stacked=True)
    part = checkpoint.read(tensor, (3, 48, 96), "float32", None)
    assert reads == [("model.layers.1.mlp.up_proj.weight", (slice(64, 96), slice(0, 24)))]
    stored = load_file(ORACLES / "qwen3" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(part, stored[64:96, 0:24].T[None])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_the_model_and_a_leaf(tmp_path):
    """Far below twice the model. Its leaves are large enough that what the program itself needs does not count."""
    config = families.tiny_hf_config("llama") | dict(
        hidden_size=1024, intermediate_size=2048, num_hidden_layers=6, vocab_size=4096, head_dim=128
    )
    rng, tensors = np.random.default_rng(0), {}
    parsed = families.config_from_hf(config, "config.json")
    shapes = families.leaf_shapes(parsed, "policy")
    for leaf, tensor in families.tensor_names(parsed, "policy").items():
        shape = shapes[leaf][1:] if tensor.stacked else shapes[leaf]
        for layer in range(parsed.n_layers if tensor.stacked else 1):
            tensors[tensor.name.format(layer=layer)] = rng.random(shape[::-1] if tensor.transposed else shape, "f4")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    size = (tmp_path / "model.safetensors").stat().st_size
    code = """
import re, sys, jax
from cai_jax.models.pretrained import load_model
def peak():
    return int(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
load_model(sys.argv[1]); warm = peak()
model = load_model(sys.argv[2]); jax.block_until_ready(model.params)
print(peak() - warm)
"""
    command = [sys.executable, "-c", code, str(ORACLES / "llama_tied"), str(tmp_path)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    grown, largest = int(out.stdout), 6 * 1024 * 2048 * 4
    assert size * 0.8 < grown < size + 2.5 * largest, (grown, size, largest)


def test_older_files(folder):
    """Bare decoder names, wrapper prefixes, stored frequencies, a tied head stored again: all the same model."""
    expected = load_model(folder)
    tensors = load_file(folder / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, "f4")}
    extra["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors | extra, folder / "model.safetensors")
    assert_same_params(load_model(folder).params, expected.params)
    save_file({f"module.{name}": value for name, value in tensors.items()}, folder / "model.safetensors")
    assert_same_params(load_model(folder).params, expected.params)
    save_file({name.removeprefix("model."): value for name, value in tensors.items()}, folder / "model.safetensors")
    assert_same_params(load_model(folder).params, expected.params)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(UserError, match="model.safetensors: no such file"):
        load_model(folder)


def broken(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


def test_missing_tensor(folder):
    message = broken(folder, lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"))
    assert "'model.layers.1.self_attn.k_proj.bias' of shape [32] is missing" in message


def test_misshaped_tensor(folder):
    message = broken(folder, lambda t: t.update({"model.norm.weight": np.ones(63, "f4")}))
    assert "model.safetensors" in message
    assert "'model.norm.weight' has shape [63], expected [64]" in message


def test_transposed_tensor(folder):
    name = "model.layers.0.mlp.down_proj.weight"
    message = broken(folder, lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))
    assert f"'{name}' has shape [160, 64], expected [64, 160]" in message


def test_unexpected_tensor(folder):
    message = broken(folder, lambda t: t.update({"model.layers.3.mlp.up_proj.weight": np.ones((160, 64), "f4")}))
    assert "unexpected tensor 'model.layers.3.mlp.up_proj.weight' of shape [160, 64]" in message


def test_unknown_dtype(folder):
    message = broken(folder, lambda t: t.update({"model.norm.weight": np.ones(64, "i4")}))
    assert "dtype I32; supported: F64, F32, F16, BF16" in message


def test_truncated_weights_and_configs(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="model.safetensors: not readable as safetensors"):
        load_model(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2",')
    with pytest.raises(UserError, match="config.json: not readable as JSON"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json"):
        load_model(folder)


def test_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="its tokenizer does not load"):
        load_model(folder)


@pytest.mark.parametrize(
    "source", ["./nowhere", "/no/such/folder", "nowhere", "some/model.gguf", __file__, "random:gpt2"]
)
def test_sources_that_are_none(source):
    with pytest.raises(UserError, match="no such|not a model|unknown family"):
        load_model(source)


def test_hub_without_a_network(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("cannot reach the hub\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="owner/name: no such folder, and the Hugging Face hub") as caught:
        load_model("owner/name")
    assert "\n" not in str(caught.value)


def test_kinds_and_heads(tmp_path):
    assert load_model(ORACLES / "qwen2_reward").kind == "reward"
    with pytest.raises(UserError, match="holds a reward model"):
        load_model(ORACLES / "qwen2_reward", kind="policy")
    with pytest.raises(UserError, match="no score head"):
        load_model(ORACLES / "mistral_swa", kind="reward")
    base = load_model(ORACLES / "mistral_swa")
    model, again, other = (load_model(ORACLES / "mistral_swa", kind="reward", new_head=True, seed=n) for n in (0, 0, 1))
    assert "lm_head" in base.params and "lm_head" not in model.params
    head = np.asarray(model.params["score"])
    assert head.shape == (64, 1) and 0.5 < head.std() * np.sqrt(65) < 1.5
    assert model.hash == again.hash != other.hash != base.hash
    np.testing.assert_array_equal(head, again.params["score"])
    save(tmp_path / "out", model)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["architectures"] == ["MistralForSequenceClassification"]
    assert saved["id2label"] == {"0": "LABEL_0"} and saved["pad_token_id"] == 0
    np.testing.assert_array_equal(load_model(tmp_path / "out").params["score"], head)
    # a head that is there stays, whatever new_head says
    kept = load_model(tmp_path / "out", kind="reward", new_head=True, seed=5)
    np.testing.assert_array_equal(kept.params["score"], head)


def test_the_pad_of_a_reward_model_is_not_the_end_of_text(tmp_path):
    model = load_model("random:llama", kind="reward")
    tokenizer = model.tokenizer
    config = families.tiny_config("llama")
    assert reward_pad_id(config, tokenizer) == 0
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.unk_token = "<|pad|>"
    clash = replace(config, pad_id=config.eos_ids[0])
    assert reward_pad_id(clash, tokenizer) == 0
    assert reward_pad_id(clash, None) == config.eos_ids[0]  # nothing else is known
    save(tmp_path / "out", model, config=clash)
    loaded = load_model(tmp_path / "out")
    assert loaded.config.pad_id == loaded.tokenizer.pad_token_id == 0
    assert tokenizer.pad_token_id == config.eos_ids[0]  # the caller's own is left alone


def test_ends_of_text_come_from_both_configs(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2, 9]}')
    model = load_model(folder)
    assert model.config.eos_ids == (2, 7, 9)
    save(folder.parent / "out", model)
    assert json.loads((folder.parent / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 7, 9]
    assert load_model(folder.parent / "out").config == model.config


@pytest.mark.parametrize("file, key, value", [
    ("config.json", "eos_token_id", "x"), ("config.json", "eos_token_id", [2, "x"]),
    ("config.json", "eos_token_id", -1), ("config.json", "bos_token_id", [1]), ("config.json", "pad_token_id", True),
    ("generation_config.json", "eos_token_id", "x"), ("generation_config.json", "eos_token_id", [2, 1.5]),
])  # fmt: skip
def test_what_is_no_token_id_is_refused(folder, file, key, value):
    written = json.loads((folder / file).read_text()) | {key: value}
    (folder / file).write_text(json.dumps(written))
    with pytest.raises(UserError, match=f"/{file}: '{key}' is .*not a token id") as refused:
        load_model(folder)
    assert "\n" not in str(refused.value)


def test_random_models():
    a, b, other = load_model("random:llama"), load_model("random:llama"), load_model("random:mistral")
    assert a.hash == b.hash != other.hash
    assert_same_params(a.params, b.params)
    assert a.config.max_position == 1024 and len(a.tokenizer) == a.config.vocab_size
    for text in ("Hello, the other thing.", "ünïcødé 漢字 \U0001f600\n\t  two  spaces", "\x00\x7f", ""):
        assert a.tokenizer.decode(a.tokenizer(text)["input_ids"]) == text
    assert len(a.tokenizer("the other")["input_ids"]) < len("the other")
    assert a.tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    assert (a.config.pad_id, a.config.bos_id, a.config.eos_ids) == (0, 1, (2,))


@pytest.mark.parametrize("index", [{"weight_map": 5}, {"weight_map": {"a": 5}}, {}, {"weight_map": None}])
def test_an_index_that_names_no_files(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="index.json: 'weight_map' does not name a file"):
        load_model(folder)


def test_a_model_that_is_not_in_the_cache_yet_says_how_to_fetch_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CAI_JAX_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="SmolLM2-135M-Instruct: .*make model.*launch/fetch_smollm2.sh"):
        load_model(tmp_path / "SmolLM2-135M-Instruct")


def test_hashes_without_loading(tmp_path):
    assert model_hash("random:llama") == load_model("random:llama").hash
    written = save(tmp_path / "out", load_model("random:llama"))
    assert model_hash(tmp_path / "out") == written == load_model(tmp_path / "out").hash
