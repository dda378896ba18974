"""Hugging Face folders: reading one into params tensor by tensor, writing params back so that transformers loads them.

A checkpoint is read leaf by leaf, and of a leaf only what each device holds, in the target dtype; the whole model
is never twice in host memory. A folder is written beside its place and renamed, with the same bytes every time.
"""

import copy
import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cai_jax.config import cache_folder
from cai_jax.errors import UserError
from cai_jax.models import families, kernels
from cai_jax.models.byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from cai_jax.models.families import FAMILIES, ModelConfig, config_from_hf
from cai_jax.models.hf_config import Reader
from cai_jax.models.safetensors_files import Checkpoint, new_folder, read_json, write_json, write_weights

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_ENSEMBLE = "regression"  # transformers' problem_type of a head whose outputs are numbers, not classes


@dataclass(frozen=True, eq=False)
class Model:
    """A model at hand. `hash` names its content: the bytes of weights, config and tokenizer files."""

    config: ModelConfig
    params: dict
    tokenizer: Any  # of transformers, or None where the folder has none
    hf_config: dict
    kind: str  # policy | reward
    hash: str


@dataclass(frozen=True, eq=False)
class ModelInfo:
    """What is known of a model without its weights."""

    source: str
    folder: Path | None  # None: a random model
    config: ModelConfig
    tokenizer: Any
    hf_config: dict
    kind: str  # what it is loaded as: policy | reward


def load_model(source, dtype="float32", kind=None, shardings=None, new_head=False, seed=0, heads=1) -> Model:
    """Load a model.

    Args:
        source: a Hugging Face folder, a hub id, a .gguf file, or `random:<family>` (a tiny random model).
        dtype: of the params, whatever the file holds; int8 (for models that do not train): the projections of the
            layers as `kernels.Int8`, all else bfloat16.
        kind: policy or reward; None: what the folder says.
        shardings: a pytree of shardings like the params, or a function from `families.param_shapes` to one; None:
            everything on the first device.
        new_head: with kind reward, start a score head (normal, deviation 1/sqrt(D+1): Stiennon et al. 2020,
            arXiv 2009.01325) drawn from `seed` where the folder has none.
        heads: how many score heads a new head is, each drawn apart; a folder that has its own must have as many.

    Raises UserError naming what is wrong: folder, file, tensor, architecture.
    """
    info = check_model(source, kind, new_head, heads)
    if info.folder is None:
        return _random_model(info, dtype, shardings, seed)
    checkpoint = Checkpoint(info.folder)
    stored = _stored_kind(checkpoint, info.hf_config)
    names, shapes = families.tensor_names(info.config, stored), families.leaf_shapes(info.config, stored)
    digest = _hash_folder(info.folder, checkpoint.paths)
    targets = _targets(info.config, info.kind, dtype, shardings)
    leaves = {}
    for leaf, target in targets.items():
        if leaf in names:
            leaves[leaf] = _in_place(partial(checkpoint.read, names[leaf], shapes[leaf]), dtype, target)
    if info.kind != stored:
        leaves["score"] = _in_place(partial(_put, fresh_head(info.config, seed)), dtype, targets["score"])
        digest = hashlib.sha256(f"{digest} score head {seed}{f' of {heads}' * (heads > 1)}".encode()).hexdigest()
    return Model(info.config, families.nest(leaves), info.tokenizer, info.hf_config, info.kind, digest)


def check_model(source, kind=None, new_head=False, heads=1) -> ModelInfo:
    """Config, tokenizer and kind of a model, with every check that `load_model` makes and no weights loaded.

    Arguments and errors are those of `load_model`.
    """
    source = str(source)
    if source.startswith("random:"):
        hf_config = families.tiny_hf_config(source.removeprefix("random:"), VOCAB_SIZE)
        config = replace(config_from_hf(hf_config, source), score_heads=heads)
        return ModelInfo(source, None, config, byte_tokenizer(), hf_config, kind or "policy")
    folder = _resolve(source)
    hf_config = read_json(folder / "config.json")
    config = _config_of(folder, hf_config)
    checkpoint = Checkpoint(folder)
    stored = _stored_kind(checkpoint, hf_config)
    kind = kind or stored
    if (stored, kind) == ("reward", "policy"):
        raise UserError(f"{folder}: holds a reward model, not a policy: name a language model here")
    if (stored, kind) == ("policy", "reward") and not new_head:
        raise UserError(f"{folder}: holds no score head: name a reward model here, or train one from it first")
    config = replace(config, score_heads=_score_heads(folder, checkpoint, hf_config) if stored == "reward" else 1)
    if new_head and stored == "reward" and config.score_heads != heads:
        raise UserError(f"{folder}: a reward model with {config.score_heads} score head(s), not the {heads} asked for: "
                        "ask for as many, or start from a language model")
    checkpoint.check(families.tensor_names(config, stored), families.leaf_shapes(config, stored), config)
    tokenizer = _load_tokenizer(folder)
    if tokenizer is not None:
        _check_ids(folder, tokenizer, config.vocab_size)
    config = config if kind == stored else replace(config, score_heads=heads)
    return ModelInfo(source, folder, config, tokenizer, hf_config, kind)


def model_hash(source) -> str:
    """The `hash` that a source has when it is loaded with no `kind`; the weights of a folder are not loaded for it."""
    source = str(source)
    if source.startswith("random:"):
        return load_model(source).hash
    folder = _resolve(source)
    return _hash_folder(folder, Checkpoint(folder).paths)


def written_ids(tokenizer) -> dict[str, int]:
    """The tokens that texts and the chat template can write, with their ids.

    Special tokens that the template does not hold stand in no conversation: places for images, a pad that was added
    for training.
    """
    template = str(tokenizer.chat_template)
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    spare = {
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in template and number not in named
    }
    return {token: number for token, number in tokenizer.get_vocab().items() if number not in spare}


def _check_ids(folder: Path, tokenizer, vocab_size: int):
    """Every token that can be written has an embedding; a gather would take another one's without a word."""
    beyond = [(token, number) for token, number in written_ids(tokenizer).items() if number >= vocab_size]
    if beyond:
        token, number = min(beyond, key=lambda item: item[1])
        raise UserError(
            f"{folder}: its tokenizer has the token {token!r} with id {number}, but the model has only {vocab_size} "
            "embeddings: tokenizer and weights do not belong together"
        )


def _stored_kind(checkpoint: Checkpoint, hf_config: dict) -> str:
    return "reward" if checkpoint.has_score(hf_config) else "policy"


def _score_heads(folder: Path, checkpoint: Checkpoint, hf_config: dict) -> int:
    """Heads of a stored reward model. Several are an ensemble of scores where the config says so, else classes."""
    heads = checkpoint.tensors["score.weight"][2][0] if "score.weight" in checkpoint.tensors else 1
    if heads > 1 and hf_config.get("problem_type") != _ENSEMBLE:
        raise UserError(f"{folder}: its head has {heads} outputs, and config.json does not call them scores of an "
                        f"ensemble ('problem_type': '{_ENSEMBLE}'): name a reward model, not a classifier")
    return heads


def _random_model(info: ModelInfo, dtype, shardings, seed: int) -> Model:
    config, kind, hf_config = info.config, info.kind, info.hf_config
    targets = _targets(config, kind, dtype, shardings)
    digest = hashlib.sha256(json.dumps([kind, hf_config], sort_keys=True).encode())
    leaves = {}
    for leaf, value in families.flatten(families.random_params(config, kind, seed)).items():
        digest.update(np.asarray(value).tobytes())
        leaves[leaf] = _in_place(partial(_put, value), dtype, targets[leaf])
    return Model(config, families.nest(leaves), info.tokenizer, hf_config, kind, digest.hexdigest())


def fresh_head(config: ModelConfig, seed: int) -> np.ndarray:
    """Score heads to start from, `[D, K]` float32: normal with deviation 1/sqrt(D+1) (Stiennon et al. 2020)."""
    keys = [[seed, config.d_model], *([seed, config.d_model, head] for head in range(1, config.score_heads))]
    columns = [np.random.default_rng(key).standard_normal((config.d_model, 1), np.float32) for key in keys]
    return np.concatenate(columns, axis=1) / math.sqrt(config.d_model + 1)


def _in_place(read, dtype, target):
    """A leaf in its place. `read(dtype, place)` brings an array there; what becomes Int8 comes in float32 first."""
    if isinstance(target, kernels.Int8):
        return jax.block_until_ready(jax.jit(kernels.quantize, out_shardings=target)(read("float32", target.kernel)))
    return read("bfloat16" if dtype == "int8" else dtype, target)


def _put(value, dtype, place):
    return jax.device_put(value.astype(dtype), place)


def _targets(config: ModelConfig, kind: str, dtype, shardings) -> dict:
    """Leaf name -> sharding, or an Int8 of shardings."""
    shapes = families.param_shapes(config, kind, dtype)
    if shardings is None:
        shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), shapes)
    elif callable(shardings):
        shardings = shardings(shapes)
    return families.flatten(shardings)


# ---- finding and reading a folder


def _resolve(source: str) -> Path:
    """The folder of a source; a GGUF file is converted once, a hub id is fetched."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        return _converted(path)
    if path.exists():
        raise UserError(f"{source}: not a model: name a Hugging Face folder, a hub id or a .gguf file")
    if path.is_relative_to(cache_folder()):
        raise UserError(
            f"{source}: no such folder in the cache of models: `make model` (launch/fetch_smollm2.sh) fetches SmolLM2 "
            "into it; or name a Hugging Face folder, a hub id or a .gguf file"
        )
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise UserError(f"{source}: no such folder: name a Hugging Face folder, a hub id or a .gguf file")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:  # many kinds: no network, no such repository, no permission
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"{source}: no such folder, and the Hugging Face hub did not give it ({type(error).__name__}: {reason}): "
            "check the name and the network, or name a local folder"
        ) from None


def _converted(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: no such file: name a Hugging Face folder, a hub id or a .gguf file")
    digest = hashlib.sha256()
    _hash_file(path, digest)
    folder = cache_folder() / f"{path.stem}-{digest.hexdigest()[:16]}"
    if not (folder / "config.json").exists():
        from cai_jax.models.gguf import convert_gguf

        convert_gguf(path, folder)
    return folder


def _config_of(folder: Path, hf_config: dict) -> ModelConfig:
    """The config, with the ends of text that generation_config.json adds (chat models list several there)."""
    config = config_from_hf(hf_config, str(folder / "config.json"))
    if (folder / "generation_config.json").exists():
        path = folder / "generation_config.json"
        more = Reader(read_json(path), str(path)).ids("eos_token_id")
        config = replace(config, eos_ids=tuple(dict.fromkeys((*config.eos_ids, *more))))
    return config


def _load_tokenizer(folder: Path):
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare exceptions
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{folder}: its tokenizer does not load ({reason}): restore the files") from None


def _hash_folder(folder: Path, weights: list[Path]) -> str:
    """One sha256 over names and bytes of all files that make the model what it is."""
    others = ("config.json", "generation_config.json", *_TOKENIZER_FILES)
    digest = hashlib.sha256()
    for path in sorted([*weights, *(folder / name for name in others)]):
        if path.exists():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            _hash_file(path, digest)
    return digest.hexdigest()


def _hash_file(path: Path, digest):
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)


# ---- writing a folder


def save_model(folder, config: ModelConfig, params, tokenizer, hf_config: dict, kind: str, metadata=None) -> str:
    """Write a folder that transformers loads, in the dtype of the params; returns its content hash.

    `params` are plain arrays (numpy or jax, sharded or not); one tensor at a time comes to the host. `metadata`
    (strings) goes into the safetensors header. The folder appears whole or not at all, and replaces one that is
    there. Among several processes all must call, and the first writes.
    """
    folder = Path(folder)
    with new_folder(folder) as place:
        if place:
            _write_configs(place, config, params, tokenizer, hf_config, kind)
        write_weights(place, config, params, kind, metadata or {})
    return _hash_folder(folder, sorted(folder.glob("*.safetensors")))


def _write_configs(folder: Path, config, params, tokenizer, hf_config, kind):
    family = FAMILIES[config.family]
    drop = ("torch_dtype", "num_labels", "id2label", "label2id", "problem_type")
    written = {key: value for key, value in hf_config.items() if key not in drop}
    written["dtype"] = str(params["embed"].dtype)
    if kind == "reward":
        pad_id = reward_pad_id(config, tokenizer)
        written |= {"architectures": [family.reward_class], "pad_token_id": pad_id}
        labels = [f"LABEL_{head}" for head in range(config.score_heads)]
        written |= {"id2label": {str(n): label for n, label in enumerate(labels)},
                    "label2id": {label: n for n, label in enumerate(labels)}}  # fmt: skip
        if config.score_heads > 1:
            written["problem_type"] = _ENSEMBLE
        if tokenizer is not None and pad_id is not None:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    else:
        written["architectures"] = [family.policy_class]
        eos = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None
        ids = {"bos_token_id": config.bos_id, "eos_token_id": eos, "pad_token_id": config.pad_id}
        write_json(folder / "generation_config.json", {key: value for key, value in ids.items() if value is not None})
    write_json(folder / "config.json", written)
    if tokenizer is not None:
        _write_tokenizer(folder, tokenizer)


def reward_pad_id(config: ModelConfig, tokenizer) -> int | None:
    """The pad token of a reward model: never the end of text.

    transformers reads the score at the last token that is not the pad token. Where they are one token it would miss
    the end of text, which is where the score is trained; then another control token becomes the pad.
    """
    ends = set(config.eos_ids[:1])
    candidates = [config.pad_id]
    if tokenizer is not None:
        ends.add(tokenizer.eos_token_id)
        candidates += [tokenizer.pad_token_id, tokenizer.unk_token_id]
        candidates += [token for token in tokenizer.all_special_ids if token != tokenizer.bos_token_id]
    usable = [token for token in candidates if token is not None]
    return next((token for token in usable if token not in ends), usable[0] if usable else next(iter(ends), None))


def _write_tokenizer(folder: Path, tokenizer):
    """The tokenizer without what its use has left in it (padding, truncation, where it was loaded from)."""
    tokenizer = copy.deepcopy(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()
    for key in ("is_local", "local_files_only", "name_or_path", "max_length", "stride", "truncation_strategy",
                "pad_to_multiple_of", "pad_token_type_id"):  # fmt: skip
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)
