"""A tiny Gemma 3, written as llama.cpp stores one, must come back with its logits, and its tokenizer with its ids."""

import json

import numpy as np
import pytest
import sentencepiece
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from gguf_files import refused, write_file
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoConfig, AutoTokenizer

from cai_jax.chat import encode_chat, encode_text, turn_end_id
from cai_jax.errors import UserError
from cai_jax.models import families
from cai_jax.models.gguf import convert_gguf
from cai_jax.models.gguf_file import GgufFile
from cai_jax.models.gguf_layouts import layout_of
from cai_jax.models.pretrained import load_model, save_model
from cai_jax.models.transformer import forward

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
USER_DEFINED = ["\n", "\n\n", "  ", "   ", "<b>", "</b>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Best first. "aaa", "hello" and "▁the" come about in several ways; "<0" and "x41>" could make the name of a byte.
NORMAL = ["▁t", "he", "aa", "▁the", "in", "▁h", "ll", "hell", "hello", "▁hello", "aaa", "lo", "<0", "x4", "1>", "x41>",
          "▁", *"abehilnotx<>/01.4", "é"]  # fmt: skip
TOKENS = CONTROL + USER_DEFINED + BYTES + NORMAL
TYPES = ([TokenType.CONTROL] * len(CONTROL) + [TokenType.USER_DEFINED] * len(USER_DEFINED)
         + [TokenType.BYTE] * len(BYTES) + [TokenType.NORMAL] * len(NORMAL))  # fmt: skip
SCORES = [-1000.0] * (len(CONTROL) + len(USER_DEFINED)) + [0.0] * len(BYTES) + [-float(n) for n in range(len(NORMAL))]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

# Three layers, the last one with full attention.
HF = families.tiny_hf_config("gemma3", len(TOKENS)) | {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
KEYS = {
    "gemma3.block_count": HF["num_hidden_layers"],
    "gemma3.context_length": HF["max_position_embeddings"],
    "gemma3.embedding_length": HF["hidden_size"],
    "gemma3.feed_forward_length": HF["intermediate_size"],
    "gemma3.attention.head_count": HF["num_attention_heads"],
    "gemma3.attention.head_count_kv": HF["num_key_value_heads"],
    "gemma3.attention.key_length": HF["head_dim"],
    "gemma3.attention.layer_norm_rms_epsilon": HF["rms_norm_eps"],
    "gemma3.attention.sliding_window": HF["sliding_window"],
    "gemma3.attention.sliding_window_pattern": HF["sliding_window_pattern"],
    "gemma3.rope.freq_base": HF["rope_theta"],
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.scores": SCORES,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.unknown_token_id": 3,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_space_prefix": False,
}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name):
    """model.layers.2.mlp.up_proj.weight -> blk.2.ffn_up.weight"""
    parts = name.removeprefix("model.").removesuffix(".weight").split(".")
    whole = {"embed_tokens": "token_embd", "norm": "output_norm"}
    short = f"blk.{parts[1]}.{NAMES['.'.join(parts[2:])]}" if parts[0] == "layers" else whole[parts[0]]
    return f"{short}.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A random model as a Hugging Face folder, and what llama.cpp stores of it: norms as weight + 1."""
    folder = tmp_path_factory.mktemp("original") / "model"
    config = families.config_from_hf(HF, "tiny")
    save_model(folder, config, families.random_params(config, "policy", 0), None, HF, "policy")
    stored = [
        (gguf_name(name), weights + 1 if name.endswith("norm.weight") else weights, Kind.F32)
        for name, weights in load_file(folder / "model.safetensors").items()
    ]
    return folder, stored


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    where = tmp_path_factory.mktemp("gemma3")
    return convert_gguf(write_file(where / "tiny.gguf", "gemma3", KEYS, original[1]), where / "folder")


def test_logits_come_back(original, folder):
    """Over more than a window, so that sliding and full attention and their ropes all count."""
    tokens_BT = np.random.default_rng(0).integers(0, len(TOKENS), (1, HF["sliding_window"] + 16))
    expected, found = (
        np.asarray(forward(model.config, model.params, tokens_BT)) for model in map(load_model, (original[0], folder))
    )
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_config_is_the_one_it_was_made_from(original, folder):
    assert load_model(folder).config == load_model(original[0]).config
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.architectures) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    assert (config.sliding_window, config.query_pre_attn_scalar) == (HF["sliding_window"], HF["head_dim"])
    assert {kind: rope["rope_theta"] for kind, rope in config.rope_parameters.items()} == {
        "full_attention": 1e6, "sliding_attention": 1e4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        # llama.cpp's rules: every sixth layer is full, and the model of 62 layers scales by width over heads
        ({"block_count": 7, "attention.sliding_window_pattern": None},
         {"layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]}),
        ({"block_count": 62, "embedding_length": 96}, {"query_pre_attn_scalar": 24, "head_dim": 16}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base_swa": 5000.0},
         {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 5000.0}),
    ],
)  # fmt: skip
def test_config_of_other_sizes(tmp_path, keys, expected):
    file = write_file(tmp_path / "m.gguf", "gemma3", KEYS | {f"gemma3.{key}": value for key, value in keys.items()}, [])
    config = layout_of(GgufFile(file)).config(GgufFile(file))
    assert config.items() >= expected.items()
    families.config_from_hf(config, "m.gguf")
    (tmp_path / "config.json").write_text(json.dumps(config))
    full, sliding = (
        AutoConfig.from_pretrained(tmp_path).rope_parameters[f"{kind}_attention"] for kind in ("full", "sliding")
    )
    assert full.get("factor") == keys.get("rope.scaling.factor") and "factor" not in sliding
    assert sliding["rope_theta"] == keys.get("rope.freq_base_swa", 1e4)


# ---------------------------------------------------------------- the tokenizer


@pytest.fixture(scope="module")
def oracle():
    """SentencePiece itself with the same tokens; it has its own letter where llama.cpp writes spaces."""
    proto = ModelProto()
    for token, score, kind in zip(TOKENS, SCORES, TYPES, strict=True):
        piece = token.replace(" ", "▁") if kind == TokenType.USER_DEFINED else token
        proto.pieces.add(piece=piece, score=score, type=TokenType.UNKNOWN if token == "<unk>" else kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, True, len(TOKENS)
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = range(4)
    trainer.pad_piece, trainer.eos_piece, trainer.bos_piece, trainer.unk_piece = CONTROL[:4]
    normalizer.name, normalizer.escape_whitespaces = "identity", True
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


BITS = [*CONTROL, *USER_DEFINED, *NORMAL, " ", " the", "\t", "\r\n", "<0x41>", "</", "漢", "🤗\u200d", "ü", "\x01", "?"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(BITS), max_size=20))
def test_ids_are_those_of_sentencepiece(tokenizer, oracle, bits):
    text = "".join(bits)
    ids = encode_text(tokenizer, text)  # control tokens are letters to it, as they are to SentencePiece
    assert ids == oracle.encode(text)
    assert tokenizer.decode(ids) == text.replace("▁", " ")
    if not any(token in text for token in CONTROL):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids


def test_special_tokens(tokenizer):
    assert len(tokenizer) == len(TOKENS)
    assert tokenizer("hello")["input_ids"] == [2, TOKENS.index("hello")]
    assert tokenizer("<end_of_turn>", add_special_tokens=False)["input_ids"] == [5]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer.unk_token_id == 3
    ids = tokenizer("<start_of_turn>hello\n", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello\n"


def test_a_chat_template_is_put_in_the_folder(original, tmp_path):
    folder = convert_gguf(write_file(tmp_path / "m.gguf", "gemma3", KEYS, original[1]), tmp_path / "folder")
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(UserError, match="put a chat_template.jinja in its folder"):
        encode_chat(AutoTokenizer.from_pretrained(folder), messages)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_model(folder).tokenizer
    ids = encode_chat(tokenizer, messages)
    assert tokenizer.decode(ids) == "<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n"
    assert ids[:2] == [2, 4] and turn_end_id(tokenizer) == 5


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"gemma3.attention.sliding_window_pattern": 0}, ("sliding_window_pattern is 0", "above 0")),
        ({"gemma3.attention.sliding_window_pattern": [1, 0, 1]}, ("sliding_window_pattern is [1, 0, 1]",)),
        ({"gemma3.attention.sliding_window": None}, ("lacks the key 'gemma3.attention.sliding_window'",)),
        ({"gemma3.rope.freq_base": None}, ("lacks the key 'gemma3.rope.freq_base'",)),
        ({"gemma3.rope.scaling.type": "yarn"}, ("rope scaling 'yarn'", "none, linear")),
        ({"gemma3.attn_logit_softcapping": 50.0}, ("attention softcapping '50.0'",)),
        ({"tokenizer.ggml.model": "gpt2"}, ("tokenizer 'gpt2'", "supported: llama")),
        ({"tokenizer.ggml.add_space_prefix": None}, ("add_space_prefix 'True'",)),
        ({"tokenizer.ggml.add_eos_token": True}, ("add_eos_token 'True'",)),
        ({"tokenizer.ggml.scores": SCORES[:-1]}, (f"{len(TOKENS)} tokens and {len(TOKENS) - 1} scores",)),
        ({"tokenizer.ggml.token_type": [*TYPES[:-1], 5]}, ("token 'é' is unused", "(5)")),
        ({"tokenizer.ggml.tokens": ["<0x0>" if token == "<0x00>" else token for token in TOKENS]}, ("<0x00>",)),
        ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "▁▁"]}, ("tokens repeat",)),
    ],
)
def test_what_cannot_be_converted_is_refused(original, tmp_path, keys, words):
    refused(write_file(tmp_path / "m.gguf", "gemma3", KEYS | keys, original[1]), *words)


def test_tensors_of_another_model_are_refused(original, tmp_path):
    bias = ("blk.0.attn_q.bias", np.zeros(4, np.float32), Kind.F32)
    refused(write_file(tmp_path / "m.gguf", "gemma3", KEYS, [*original[1], bias]), "attn_q.bias", "Gemma 3")
    lacking = [tensor for tensor in original[1] if tensor[0] != "blk.1.post_ffw_norm.weight"]
    refused(write_file(tmp_path / "n.gguf", "gemma3", KEYS, lacking), "lacks the tensor 'blk.1.post_ffw_norm.weight'")
