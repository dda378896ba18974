"""GGUF files written here, with the row order of llama.cpp, must come back as the weights they were made from."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from gguf.quants import dequantize, quantize
from gguf_files import refused, write_file
from safetensors.numpy import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoTokenizer

from cai_jax.config import cache_folder
from cai_jax.errors import UserError
from cai_jax.models.gguf import convert_gguf, main
from cai_jax.models.gguf_file import TYPES

LAYERS, WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM = 2, 32, 64, 4, 2, 8
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
TOKENS = SPECIAL + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
KEYS = {
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": FFN,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in TOKENS],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.chat_template": TEMPLATE,
}
LAYER_WEIGHTS = {  # name in the file: name in Hugging Face's, shape [out, in], type
    "attn_norm": ("input_layernorm", (WIDTH,), Kind.F32),
    "attn_q": ("self_attn.q_proj", (HEADS * HEAD_DIM, WIDTH), Kind.Q4_1),
    "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, WIDTH), Kind.Q4_1),
    "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, WIDTH), Kind.Q8_0),
    "attn_output": ("self_attn.o_proj", (WIDTH, HEADS * HEAD_DIM), Kind.F16),
    "ffn_norm": ("post_attention_layernorm", (WIDTH,), Kind.F32),
    "ffn_gate": ("mlp.gate_proj", (FFN, WIDTH), Kind.Q4_1),
    "ffn_up": ("mlp.up_proj", (FFN, WIDTH), Kind.Q4_1),
    "ffn_down": ("mlp.down_proj", (WIDTH, FFN), Kind.Q4_1),
}


def permuted(weights, heads):
    """The row order in which llama.cpp's converter stores q and k."""
    return weights.reshape(heads, 2, len(weights) // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)


def draw_weights(tied=True):
    """(name in the file, name in Hugging Face's, original weights, type, heads) of a tiny Llama."""
    rng = np.random.default_rng(0)
    named = [("token_embd", "model.embed_tokens", (len(TOKENS), WIDTH), Kind.Q8_0)]
    for layer in range(LAYERS):
        for short, (module, shape, kind) in LAYER_WEIGHTS.items():
            named.append((f"blk.{layer}.{short}", f"model.layers.{layer}.{module}", shape, kind))
    named.append(("output_norm", "model.norm", (WIDTH,), Kind.F32))
    if not tied:
        named.append(("output", "lm_head", (len(TOKENS), WIDTH), Kind.Q8_0))
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}
    return [
        (f"{name}.weight", f"{module}.weight", rng.standard_normal(shape, np.float32), kind,
         heads.get(name.split(".")[-1], 0))
        for name, module, shape, kind in named
    ]  # fmt: skip


def write_gguf(path, weights=None, architecture="llama", keys=(), merges=MERGES):
    """A GGUF file of a tiny Llama; `keys` replaces keys or, where None, leaves them out."""
    tensors = [
        (name, values if kind == Kind.F64 else quantize(permuted(values, heads) if heads else values, kind), kind)
        for name, _, values, kind, heads in (draw_weights() if weights is None else weights)
    ]
    return write_file(path, architecture, KEYS | {"tokenizer.ggml.merges": merges} | dict(keys), tensors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("tiny")
    return convert_gguf(write_gguf(where / "tiny.gguf"), where / "folder")


@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_exactly(tmp_path, tied):
    weights = draw_weights(tied)
    folder = convert_gguf(write_gguf(tmp_path / "m.gguf", weights), tmp_path / "folder")
    loaded = load_file(folder / "model.safetensors")
    assert set(loaded) == {module for _, module, *_ in weights}
    for _, module, values, kind, _ in weights:
        assert loaded[module].dtype == np.float32
        np.testing.assert_array_equal(loaded[module], dequantize(quantize(values, kind), kind), err_msg=module)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied


def test_the_same_file_gives_the_same_bytes(folder, tmp_path):
    again = convert_gguf(write_gguf(tmp_path / "tiny.gguf"), tmp_path / "deep" / "folder")
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name


def test_config_reads_in_transformers(folder):
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (len(TOKENS), WIDTH, FFN)
    assert (config.num_hidden_layers, config.max_position_embeddings) == (LAYERS, 128)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert (config.rms_norm_eps, config.tie_word_embeddings) == (1e-5, True)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    written = json.loads((folder / "config.json").read_text())
    assert written["rope_theta"] == 100000.0  # where transformers 4 looks


def test_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == len(TOKENS)
    # "1 2" is a merge: only the split into digits keeps it from being used
    assert tokenizer.tokenize("hello 12") == ["hello", "Ġ", "1", "2"]
    assert tokenizer("<|im_start|>hello<|im_end|>")["input_ids"] == [1, TOKENS.index("hello"), 2]
    for text in (" two  spaces\n\ttab ", "don't 2024", "héllo 你好 🤗\u200d", "<|im_end|> a"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode([1, TOKENS.index("hello"), 2], skip_special_tokens=True) == "hello"
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token_id == 0


def test_bos_is_added_where_the_file_says_so(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", keys={"tokenizer.ggml.add_bos_token": 1})
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(path, tmp_path / "folder"))
    assert tokenizer("hello")["input_ids"] == [1, TOKENS.index("hello")]
    assert tokenizer("hello", add_special_tokens=False)["input_ids"] == [TOKENS.index("hello")]


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    for length in (*np.linspace(4, len(whole) - 1, 40).astype(int), 8, 16, 24, 30):
        (tmp_path / "m.gguf").write_bytes(whole[:length])
        refused(tmp_path / "m.gguf", "cut off or damaged")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip", b"{}"])
def test_what_is_not_gguf_is_refused(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    refused(tmp_path / "m.gguf", "not a GGUF file")


def test_a_missing_file_is_refused(tmp_path):
    refused(tmp_path / "none.gguf", "No such file")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "qwen2"}, ("qwen2", "supported: llama, gemma3")),
        ({"keys": {"llama.embedding_length": None}}, ("llama.embedding_length",)),
        ({"keys": {"llama.attention.head_count": [4, 2]}}, ("llama.attention.head_count is [4, 2]", "by layer")),
        ({"keys": {"llama.feed_forward_length": 96}}, ("blk.0.ffn_gate.weight", "(64, 32)", "(96, 32)")),
        ({"keys": {"llama.block_count": 3}}, ("lacks the tensor 'blk.2.attn_norm.weight'",)),
        ({"keys": {"llama.block_count": 1}}, ("blk.1.attn_k.weight", "not of a plain Llama")),
        ({"keys": {"llama.rope.scaling.type": "yarn"}}, ("rope scaling 'yarn'",)),
        ({"keys": {"llama.rope.dimension_count": 4}}, ("rope dimension count '4'",)),
        ({"keys": {"tokenizer.ggml.pre": "llama-bpe"}}, ("pre-tokenizer 'llama-bpe'", "smollm")),
        ({"keys": {"tokenizer.ggml.eos_token_id": 999}}, ("eos token 999",)),
        ({"merges": ["h e", "q zz"]}, ("merges",)),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path, change, words):
    refused(write_gguf(tmp_path / "m.gguf", **change), *words)


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    weights = draw_weights()
    weights[-1] = ("output_norm.weight", "", np.ones(WIDTH, np.float64), Kind.F64, 0)
    refused(write_gguf(tmp_path / "m.gguf", weights), "output_norm.weight", "F64")


@pytest.mark.parametrize("name", TYPES)
def test_the_types_that_the_message_names_are_read(name):
    block_size, type_size = gguf.GGML_QUANT_SIZES[Kind[name]]
    assert dequantize(np.zeros(type_size, np.uint8), Kind[name]).tolist() == [0] * block_size


def test_a_folder_that_is_there_is_kept(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="already there"):
        convert_gguf(path, tmp_path / "folder")
    assert (tmp_path / "folder" / "mine.txt").read_text() == "kept"


def test_command(tmp_path, capsys):
    path = write_gguf(tmp_path / "m.gguf")
    assert main([str(path), str(tmp_path / "folder")]) == 0
    assert (tmp_path / "folder" / "model.safetensors").exists()
    capsys.readouterr()
    for arguments in ([], [str(tmp_path / "none.gguf"), str(tmp_path / "other")]):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_smollm2_agrees_with_transformers():
    """Logits of the dequantised SmolLM2-135M-Instruct, made by transformers in float32."""
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if not folder.exists():
        pytest.skip("the model is not in the cache (make model)")
    from cai_jax.models.pretrained import load_model
    from cai_jax.models.transformer import forward

    oracle = np.load(Path(__file__).parents[1] / "oracles" / "smollm2_135m.npz")
    model = load_model(folder)
    logits_BTV = np.asarray(forward(model.config, model.params, oracle["input_ids"]))
    top_logits = np.take_along_axis(logits_BTV, oracle["top32_ids"].astype(int), axis=-1)
    np.testing.assert_allclose(top_logits, oracle["top32_logits"], atol=2e-3, rtol=0)
    logsumexp_BT = np.logaddexp.reduce(logits_BTV.astype(np.float64), axis=-1)
    np.testing.assert_allclose(logsumexp_BT, oracle["logsumexp"], atol=2e-3, rtol=0)
    ids = model.tokenizer(model.tokenizer.decode(oracle["input_ids"][0]))["input_ids"]
    assert ids == oracle["input_ids"][0].tolist()
