"""What differs by architecture in a GGUF file: its config, the names of its tensors and what llama.cpp did to them.

To add an architecture: a row in LAYOUTS. What llama.cpp writes and reads: its conversion scripts and src/models.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from cai_jax.models.gguf_file import GgufFile
from cai_jax.models.gguf_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer


@dataclass(frozen=True)
class Layout:
    """An architecture. A norm is stored as its weight + `norm_shift`; `rope_pairs`: rows of q and k are reordered."""

    called: str  # in errors
    config: Callable[[GgufFile], dict]  # its config.json
    tokenizer: Callable[[GgufFile], Tokenizer]
    layer_tensors: dict[str, str]  # blk.N.* -> model.layers.N.*
    norm_shift: float
    rope_pairs: bool


@dataclass(frozen=True)
class Source:
    """Where a tensor of the folder comes from. `heads`: rows to be put back in order, 0: none. `shift`: to take off."""

    name: str
    shape: tuple[int, ...]
    heads: int = 0
    shift: float = 0.0

    def read(self, file: GgufFile) -> np.ndarray:
        """The weights as Hugging Face has them, in float32."""
        weights = file.float32(self.name)
        if self.heads:
            return _unpermuted(weights, self.heads)
        return weights - np.float32(self.shift) if self.shift else weights


def layout_of(file: GgufFile) -> Layout:
    """The layout of the file's architecture, or a UserError."""
    architecture = file.get("general.architecture")
    file.supports("architecture", architecture, tuple(LAYOUTS))
    return LAYOUTS[architecture]


def tensor_sources(file: GgufFile, layout: Layout, config: dict) -> dict[str, Source]:
    """Tensor of the folder -> its source, in the order of writing. Every tensor of the file is used once."""
    vocab, width = config["vocab_size"], config["hidden_size"]
    shapes = _layer_shapes(config)
    permuted = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    sources = {"model.embed_tokens.weight": Source("token_embd.weight", (vocab, width))}
    for layer in range(config["num_hidden_layers"]):
        for short, module in layout.layer_tensors.items():
            sources[f"model.layers.{layer}.{module}.weight"] = Source(
                f"blk.{layer}.{short}.weight",
                shapes[short],
                heads=permuted.get(short, 0) if layout.rope_pairs else 0,
                shift=layout.norm_shift if short.endswith("norm") else 0.0,
            )
    sources["model.norm.weight"] = Source("output_norm.weight", (width,), shift=layout.norm_shift)
    if not config["tie_word_embeddings"]:
        sources["lm_head.weight"] = Source("output.weight", (vocab, width))

    for source in sources.values():
        if source.name not in file.tensors:
            file.fail(f"lacks the tensor '{source.name}'; use a complete file")
        shape = tuple(int(size) for size in reversed(file.tensors[source.name].shape))
        if shape != source.shape:
            file.fail(f"tensor '{source.name}' is {shape}, its keys say {source.shape}; use a sound file")
    unknown = sorted(set(file.tensors) - {source.name for source in sources.values()})
    if unknown:
        file.fail(f"tensor '{unknown[0]}' is not of {layout.called}; use the model's Hugging Face folder instead")
    return sources


def token_ids(file: GgufFile) -> dict:
    """The ids of special tokens as config.json and generation_config.json name them."""
    named = file.special_tokens
    return {f"{name}_token_id": named[name] for name in ("bos", "eos", "pad") if name in named}


def _layer_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    width, ffn, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    return {
        "attn_norm": (width,), "attn_q": (queries, width), "attn_k": (keys, width), "attn_v": (keys, width),
        "attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,), "attn_output": (width, queries),
        "post_attention_norm": (width,), "ffn_norm": (width,), "ffn_gate": (ffn, width), "ffn_up": (ffn, width),
        "ffn_down": (width, ffn), "post_ffw_norm": (width,),
    }  # fmt: skip


def _unpermuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows `[heads * N, in]` from llama.cpp's rope order (pairs beside each other) to Hugging Face's (halves)."""
    out_size, in_size = weights.shape
    by_pair = weights.reshape(heads, out_size // heads // 2, 2, in_size)
    return by_pair.swapaxes(1, 2).reshape(out_size, in_size)


# ---- configs, readable by transformers 4 and 5


def _sizes(file: GgufFile, architecture: str) -> dict:
    """The keys of config.json that all architectures have."""
    width, heads = file.size(f"{architecture}.embedding_length"), file.size(f"{architecture}.attention.head_count")
    head_dim = file.size(f"{architecture}.attention.key_length", width // heads)
    file.supports("rope dimension count", file.get(f"{architecture}.rope.dimension_count", head_dim), (head_dim,))
    return {
        "vocab_size": len(file.tokens),
        "hidden_size": width,
        "intermediate_size": file.size(f"{architecture}.feed_forward_length"),
        "num_hidden_layers": file.size(f"{architecture}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.size(f"{architecture}.attention.head_count_kv", heads),
        "head_dim": head_dim,
    }


def _norm_eps(file: GgufFile, architecture: str) -> float:
    # stored in float32: 1e-5 comes back as 9.999999747378752e-06
    return float(str(np.float32(file.get(f"{architecture}.attention.layer_norm_rms_epsilon"))))


def _llama_config(file: GgufFile) -> dict:
    # Llama 3's stretched rope stands in a tensor (rope_freqs), which tensor_sources refuses
    file.supports("rope scaling", file.get("llama.rope.scaling.type", "none"), ("none",))
    theta = file.get("llama.rope.freq_base", 10000.0)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_sizes(file, "llama"),
        "hidden_act": "silu",
        "max_position_embeddings": file.size("llama.context_length"),
        "rms_norm_eps": _norm_eps(file, "llama"),
        "rope_theta": theta,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},  # transformers 5
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "float32",
        **token_ids(file),
    }


def _gemma3_config(file: GgufFile) -> dict:
    sizes = _sizes(file, "gemma3")
    layers, pattern = sizes["num_hidden_layers"], file.size("gemma3.attention.sliding_window_pattern", 6)
    # llama.cpp knows the 27B by its depth: no key tells its queries' scale
    scale_of = sizes["hidden_size"] // sizes["num_attention_heads"] if layers == 62 else sizes["head_dim"]
    file.supports("attention softcapping", file.get("gemma3.attn_logit_softcapping", 0.0), (0.0,))
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **sizes,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": file.size("gemma3.context_length"),
        "rms_norm_eps": _norm_eps(file, "gemma3"),
        "query_pre_attn_scalar": scale_of,
        "sliding_window": file.size("gemma3.attention.sliding_window"),
        "layer_types": [
            "sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)
        ],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": file.get("gemma3.final_logit_softcapping", None),
        **_gemma3_ropes(file),
        "attention_bias": False,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "float32",
        **token_ids(file),
    }


def _gemma3_ropes(file: GgufFile) -> dict:
    """The ropes of full and of sliding attention; only the first may be stretched."""
    full, sliding = file.get("gemma3.rope.freq_base"), file.get("gemma3.rope.freq_base_swa", 10000.0)
    scaling = file.get("gemma3.rope.scaling.type", "none")
    file.supports("rope scaling", scaling, ("none", "linear"))
    linear = scaling == "linear"
    stretch = {"rope_type": "linear", "factor": file.get("gemma3.rope.scaling.factor")} if linear else {}
    return {
        "rope_theta": full,  # these three: transformers 4
        "rope_local_base_freq": sliding,
        "rope_scaling": stretch or None,
        "rope_parameters": {  # transformers 5
            "full_attention": {"rope_type": "default", "rope_theta": full} | stretch,
            "sliding_attention": {"rope_type": "default", "rope_theta": sliding},
        },
    }


_PROJECTIONS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}  # fmt: skip
_FEED_FORWARD = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}

LAYOUTS = {
    "llama": Layout(
        called="a plain Llama",
        config=_llama_config,
        tokenizer=byte_level_tokenizer,
        layer_tensors={
            "attn_norm": "input_layernorm", **_PROJECTIONS, "ffn_norm": "post_attention_layernorm", **_FEED_FORWARD,
        },
        norm_shift=0.0,
        rope_pairs=True,
    ),
    "gemma3": Layout(
        called="the text part of Gemma 3",
        config=_gemma3_config,
        tokenizer=sentencepiece_tokenizer,
        layer_tensors={
            "attn_norm": "input_layernorm", **_PROJECTIONS, "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm", "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm", **_FEED_FORWARD, "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_shift=1.0,
        rope_pairs=False,
    ),
}  # fmt: skip
