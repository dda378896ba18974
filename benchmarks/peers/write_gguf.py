"""A Hugging Face folder of a Llama with the tokenizer of SmolLM as a GGUF file in float32 or bfloat16, for llama.cpp.

The layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp turns neighbours of a head in its rope where
Hugging Face turns the two halves, so the rows of the query and key weights change places. Norms stay in float32, as in
llama.cpp's own files.
"""

import json
import os
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"embed_tokens": "token_embd", "norm": "output_norm"}


def write_gguf(folder: Path, path: Path, precision: str) -> Path:
    """Write the model in `folder` to `path`, in "float32" or "bfloat16"; it appears whole or not at all."""
    config = json.loads((folder / "config.json").read_text())
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, "llama")
    _add_shape(writer, config)
    _add_tokenizer(writer, folder)
    bfloat16 = precision == "bfloat16"
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if bfloat16 else gguf.LlamaFileType.ALL_F32)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    with safe_open(folder / "model.safetensors", "numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            weights, named = tensors.get_tensor(name).astype(np.float32), gguf_name(name)
            if short := next((short for short in heads if f".{short}." in named), None):
                weights = permuted(weights, heads[short])
            if bfloat16 and weights.ndim == 2:
                kind = gguf.GGMLQuantizationType.BF16
                writer.add_tensor(named, gguf.quants.quantize(weights, kind), raw_dtype=kind)
            else:
                writer.add_tensor(named, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(unfinished, path)
    return path


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    parts = name.removeprefix("model.").removesuffix(".weight").split(".")
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{LAYER['.'.join(parts[2:])]}.weight"
    return "output.weight" if parts == ["lm_head"] else f"{WHOLE[parts[0]]}.weight"


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * N, in] from halves of a head to neighbours."""
    by_half = weights.reshape(heads, 2, -1, weights.shape[1])
    return np.ascontiguousarray(by_half.swapaxes(1, 2)).reshape(weights.shape)


def _add_shape(writer, config: dict) -> None:
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_tokenizer(writer, folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    tokens = sorted(ids, key=ids.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_add_bos_token(False)
    for name, add in (
        ("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id), ("unk", writer.add_unk_token_id),
    ):  # fmt: skip
        if (token := settings.get(f"{name}_token")) is not None:
            add(ids[token])
    if template := settings.get("chat_template"):
        writer.add_chat_template(template)
