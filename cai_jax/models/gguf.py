"""A GGUF file becomes a Hugging Face folder: float32 weights, config, tokenizer with its chat template.

    python -m cai_jax.models.gguf FILE.gguf FOLDER

Plain Llama decoders with the byte-level BPE tokenizer of SmolLM are read; anything else is refused. The layout
of the file and the meaning of its keys: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.constants import TokenType
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from cai_jax.errors import UserError

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_REQUIRED = object()


def convert_gguf(path: str | Path, folder: str | Path) -> Path:
    """Write the model in the GGUF file `path` as a Hugging Face folder, and return the folder.

    The folder appears whole or not at all, with the same bytes every time; one tensor at a time is in memory.
    Raises UserError for a file that is not GGUF, is cut off, lacks a tensor or holds another architecture,
    and for a folder that is already there.
    """
    path, folder = Path(path), Path(folder)
    if _is_taken(folder):
        raise UserError(f"{folder}: is already there; remove it or name another folder")
    file = _File(path)
    config = _hf_config(file)
    sources = _tensor_sources(file, config)
    tokenizer = _tokenizer(file)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as work:
            whole = Path(work) / "model"
            whole.mkdir()
            _write_safetensors(whole / "model.safetensors", sources, file)
            _write_json(whole / "config.json", config)
            _write_json(whole / "generation_config.json", _token_ids(file))
            _write_json(whole / "tokenizer_config.json", _tokenizer_config(file, config))
            tokenizer.save(str(whole / "tokenizer.json"))
            _move(whole, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
    return folder


def _is_taken(folder: Path) -> bool:
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def _move(whole: Path, folder: Path) -> None:
    try:
        os.rename(whole, folder)
    except OSError:
        # Another process that converts into the same cache came first; its folder is whole, as this one is.
        if not (folder / "model.safetensors").exists():
            raise


class _File:
    """A GGUF file as keys and tensors; what is wrong with it is a UserError that names it."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as stream:
                magic = stream.read(4)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        if magic != b"GGUF":
            self.fail("is not a GGUF file; name a file that starts with the letters GGUF")
        try:
            reader = GGUFReader(path)
        # The reader slices a memory map: past the end it finds arrays that are too short, in many ways.
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            reason = " ".join(str(error).split())
            self.fail(f"is cut off or damaged ({reason}); download it again")
        if reader.byte_order != "I":
            self.fail("is big-endian; convert it to little-endian with llama.cpp's gguf_convert_endian.py")
        self.fields = reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def fail(self, message: str):
        raise UserError(f"{self.path}: {message}")

    def get(self, key: str, default=_REQUIRED):
        field = self.fields.get(key)
        if field is None and default is _REQUIRED:
            self.fail(f"lacks the key '{key}'; use a complete file")
        try:
            return default if field is None else field.contents()
        except UnicodeDecodeError:
            self.fail(f"the key '{key}' is not UTF-8; download the file again")

    def supports(self, what: str, value, supported: tuple) -> None:
        if value not in supported:
            self.fail(f"{what} '{value}' is not supported; supported: {', '.join(map(str, supported))}")

    def float32(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        try:
            return dequantize(tensor.data, tensor.tensor_type).astype("<f4", copy=False)
        except NotImplementedError:
            self.fail(
                f"tensor '{name}' is of type {tensor.tensor_type.name}, which is not supported; "
                "use a file of type F32, F16, BF16, Q8_0 or Q4_1"
            )


def _hf_config(file: _File) -> dict:
    """The config.json of a Llama, readable by transformers 4 and 5."""
    file.supports("architecture", file.get("general.architecture"), ("llama",))
    # Llama 3's stretched rope stands in a tensor (rope_freqs), which _tensor_sources refuses
    file.supports("rope scaling", file.get("llama.rope.scaling.type", "none"), ("none",))
    width, heads = file.get("llama.embedding_length"), file.get("llama.attention.head_count")
    if not isinstance(heads, int) or heads < 1:
        file.fail(f"llama.attention.head_count is {heads}; use a model with the same heads in every layer")
    head_dim = file.get("llama.attention.key_length", width // heads)
    file.supports("rope dimension count", file.get("llama.rope.dimension_count", head_dim), (head_dim,))
    theta = file.get("llama.rope.freq_base", 10000.0)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(file.get("tokenizer.ggml.tokens")),
        "hidden_size": width,
        "intermediate_size": file.get("llama.feed_forward_length"),
        "num_hidden_layers": file.get("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": file.get("llama.context_length"),
        # stored in float32: 1e-5 comes back as 9.999999747378752e-06
        "rms_norm_eps": float(str(np.float32(file.get("llama.attention.layer_norm_rms_epsilon")))),
        "rope_theta": theta,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},  # transformers 5
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "float32",
        **_token_ids(file),
    }


def _token_ids(file: _File) -> dict:
    named = _special_tokens(file)
    return {f"{name}_token_id": named[name] for name in ("bos", "eos", "pad") if name in named}


def _special_tokens(file: _File) -> dict[str, int]:
    """Ids of bos, eos, pad and unk, as far as the file names them."""
    vocab, named = len(file.get("tokenizer.ggml.tokens")), {}
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        number = file.get(f"tokenizer.ggml.{key}_token_id", None)
        if number is not None:
            if not 0 <= number < vocab:
                file.fail(f"its {key} token {number} is not one of its {vocab} tokens; use a sound file")
            named[name] = number
    return named


@dataclass(frozen=True)
class _Source:
    """Where a tensor of the folder comes from. `heads`: rows to be put back in order, 0: none."""

    name: str
    shape: tuple[int, ...]
    heads: int = 0


def _tensor_sources(file: _File, config: dict) -> dict[str, _Source]:
    """Tensor of the folder -> its source, in the order of writing. Every tensor of the file is used once."""
    width, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    queries, keys = heads * config["head_dim"], kv_heads * config["head_dim"]
    shapes = {
        "attn_norm": (width,), "attn_q": (queries, width), "attn_k": (keys, width), "attn_v": (keys, width),
        "attn_output": (width, queries), "ffn_norm": (width,), "ffn_gate": (ffn, width), "ffn_up": (ffn, width),
        "ffn_down": (width, ffn),
    }  # fmt: skip
    permuted = {"attn_q": heads, "attn_k": kv_heads}
    sources = {"model.embed_tokens.weight": _Source("token_embd.weight", (vocab, width))}
    for layer in range(config["num_hidden_layers"]):
        for short, module in _LAYER_TENSORS.items():
            source = _Source(f"blk.{layer}.{short}.weight", shapes[short], permuted.get(short, 0))
            sources[f"model.layers.{layer}.{module}.weight"] = source
    sources["model.norm.weight"] = _Source("output_norm.weight", (width,))
    if not config["tie_word_embeddings"]:
        sources["lm_head.weight"] = _Source("output.weight", (vocab, width))

    for source in sources.values():
        if source.name not in file.tensors:
            file.fail(f"lacks the tensor '{source.name}'; use a complete file")
        shape = tuple(int(size) for size in reversed(file.tensors[source.name].shape))
        if shape != source.shape:
            file.fail(f"tensor '{source.name}' is {shape}, its keys say {source.shape}; use a sound file")
    unknown = sorted(set(file.tensors) - {source.name for source in sources.values()})
    if unknown:
        file.fail(f"tensor '{unknown[0]}' is not of a plain Llama; use the model's Hugging Face folder instead")
    return sources


def _write_safetensors(path: Path, sources: dict[str, _Source], file: _File) -> None:
    """Tensor by tensor in the safetensors format: length of the header, header as JSON, raw bytes."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, source in sources.items():
        end = offset + 4 * int(np.prod(source.shape))
        header[name] = {"dtype": "F32", "shape": list(source.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        for source in sources.values():
            weights = file.float32(source.name)
            stream.write(np.ascontiguousarray(_unpermuted(weights, source.heads) if source.heads else weights))


def _unpermuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows `[heads * N, in]` from llama.cpp's rope order (pairs beside each other) to Hugging Face's (halves)."""
    out_size, in_size = weights.shape
    by_pair = weights.reshape(heads, out_size // heads // 2, 2, in_size)
    return by_pair.swapaxes(1, 2).reshape(out_size, in_size)


def _tokenizer(file: _File) -> Tokenizer:
    """Byte-level BPE with digits one by one, from the file's tokens and merges."""
    file.supports("tokenizer", file.get("tokenizer.ggml.model"), ("gpt2",))
    file.supports("pre-tokenizer", file.get("tokenizer.ggml.pre"), ("smollm",))
    tokens, kinds = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type")
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges")]
    if not len(vocab) == len(tokens) == len(kinds):
        file.fail("its tokens repeat, or some lack a type; use a sound file")
    try:
        tokenizer = Tokenizer(BPE(vocab, merges))
    except Exception as error:  # the library raises plain Exception for a merge of unknown tokens
        file.fail(f"its tokens and merges do not fit ({error}); use a sound file")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    tokenizer.add_tokens([
        AddedToken(token, special=added[kind], normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in added
    ])
    if file.get("tokenizer.ggml.add_bos_token", False):
        number = file.get("tokenizer.ggml.bos_token_id")
        tokenizer.post_processor = TemplateProcessing(
            single=f"{tokens[number]} $A", special_tokens=[(tokens[number], number)]
        )
    return tokenizer


def _tokenizer_config(file: _File, config: dict) -> dict:
    tokens = file.get("tokenizer.ggml.tokens")
    template = file.get("tokenizer.chat_template", None)
    return {
        # the class that takes tokenizer.json as it is; a model's own class would put its pre-tokenizer back
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        **{f"{name}_token": tokens[number] for name, number in _special_tokens(file).items()},
        **({"chat_template": template} if template is not None else {}),
    }


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    """The command: 0 done, 2 a mistake that the user can mend, said in one line on stderr."""
    try:
        if len(arguments) != 2:
            raise UserError("write python -m cai_jax.models.gguf FILE.gguf FOLDER")
        print(convert_gguf(*arguments))
        return 0
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
