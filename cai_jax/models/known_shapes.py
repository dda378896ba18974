"""Shapes of models on the Hugging Face hub, so that a run can be planned without a network.

Only what decides shapes and FLOPs stands here. A model that is loaded is read from its own config.json.
"""

import re
from pathlib import Path

from cai_jax.errors import UserError
from cai_jax.models.byte_tokenizer import VOCAB_SIZE
from cai_jax.models.families import ModelConfig, config_from_hf, tiny_config
from cai_jax.models.safetensors_files import read_json

# Name without its owner and without -Instruct, -it, -chat: (family, vocabulary, D, F, L, H, K, N, tied, window)
_SHAPES = {
    "mistral-7b-v0.1": ("mistral", 32000, 4096, 14336, 32, 32, 8, 128, False, 4096),
    "mistral-7b-v0.2": ("mistral", 32000, 4096, 14336, 32, 32, 8, 128, False, None),
    "mistral-7b-v0.3": ("mistral", 32768, 4096, 14336, 32, 32, 8, 128, False, None),
    "llama-2-7b": ("llama", 32000, 4096, 11008, 32, 32, 32, 128, False, None),
    "llama-3.1-8b": ("llama", 128256, 4096, 14336, 32, 32, 8, 128, False, None),
    "llama-3.2-1b": ("llama", 128256, 2048, 8192, 16, 32, 8, 64, True, None),
    "llama-3.2-3b": ("llama", 128256, 3072, 8192, 28, 24, 8, 128, True, None),
    "qwen2.5-0.5b": ("qwen2", 151936, 896, 4864, 24, 14, 2, 64, True, None),
    "qwen2.5-1.5b": ("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, True, None),
    "qwen2.5-3b": ("qwen2", 151936, 2048, 11008, 36, 16, 2, 128, True, None),
    "qwen2.5-7b": ("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False, None),
    "qwen2.5-14b": ("qwen2", 152064, 5120, 13824, 48, 40, 8, 128, False, None),
    "qwen3-0.6b": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True, None),
    "qwen3-1.7b": ("qwen3", 151936, 2048, 6144, 28, 16, 8, 128, True, None),
    "qwen3-4b": ("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True, None),
    "qwen3-8b": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False, None),
    "gemma-2-2b": ("gemma2", 256000, 2304, 9216, 26, 8, 4, 256, True, 4096),
    "gemma-2-9b": ("gemma2", 256000, 3584, 14336, 42, 16, 8, 256, True, 4096),
    "smollm2-135m": ("llama", 49152, 576, 1536, 30, 9, 3, 64, True, None),
    "smollm2-360m": ("llama", 49152, 960, 2560, 32, 15, 5, 64, True, None),
    "smollm2-1.7b": ("llama", 49152, 2048, 8192, 24, 32, 32, 64, True, None),
}
_LONGEST = {"llama-2-7b": 4096, "llama-3.1-8b": 131072, "llama-3.2-1b": 131072, "llama-3.2-3b": 131072,
            "qwen3-0.6b": 40960, "qwen3-1.7b": 40960, "qwen3-4b": 40960, "qwen3-8b": 40960,
            "gemma-2-2b": 8192, "gemma-2-9b": 8192,
            "smollm2-135m": 8192, "smollm2-360m": 8192, "smollm2-1.7b": 8192}  # fmt: skip


def known_shape(name: str) -> ModelConfig | None:
    """The shape of a hub id (or of a folder that carries a model's name), None for one that is not listed."""
    base = re.sub(r"-(instruct|it|chat|hf|base)(?=-|$)", "", name.rstrip("/").split("/")[-1].lower())
    base = re.sub(r"^meta-", "", base)
    if base not in _SHAPES:
        return None
    family, vocabulary, d_model, d_ff, layers, heads, kv_heads, size, tied, window = _SHAPES[base]
    hf = dict(
        model_type=family, vocab_size=vocabulary, hidden_size=d_model, intermediate_size=d_ff, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=size, tie_word_embeddings=tied,
        sliding_window=window, max_position_embeddings=_LONGEST.get(base, 32768),
    )  # fmt: skip
    return config_from_hf(hf, name)


def shape_of(source: str, otherwise: ModelConfig | None = None) -> tuple[ModelConfig, str]:
    """The shape of a model source, and in words where it is from; nothing is fetched and no weights are read.

    `otherwise` stands for a folder that is still to be made by another run. Raises UserError where nothing is known.
    """
    if source.startswith("random:"):
        return tiny_config(source.removeprefix("random:"), VOCAB_SIZE), "a random model"
    path = Path(source).expanduser()
    if (path / "config.json").is_file():
        return config_from_hf(read_json(path / "config.json"), str(path / "config.json")), "its config.json"
    if config := known_shape(source):
        return config, "the list of known shapes"
    if cached := _cached_config(source):
        return config_from_hf(read_json(cached), str(cached)), "the hub's cache"
    if otherwise is not None and not path.exists():
        return otherwise, "taken to be that of model.source: the folder is not there yet"
    raise UserError(
        f"{source}: its shape is not known here; name a folder with its config.json, or one of these models: "
        f"{', '.join(_SHAPES)}"
    )


def _cached_config(source: str) -> Path | None:
    """config.json of a hub id that was fetched before."""
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "config.json")
    return Path(found) if isinstance(found, str) else None
