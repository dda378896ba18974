"""Adapters in peft's format: adapter_config.json and adapter_model.safetensors.

peft names a tensor after the module of the base model that it belongs to, and keeps `a` as [R, in] and `b` as [out, R];
a score head that trains beside them is kept whole.
"""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import jax

from cai_jax.config import PROJECTIONS
from cai_jax.models import families
from cai_jax.models.families import HfTensor, ModelConfig
from cai_jax.models.hf_config import Reader
from cai_jax.models.kernels import Lora
from cai_jax.models.lora import adapters
from cai_jax.models.pretrained import Model
from cai_jax.models.safetensors_files import Checkpoint, Outgoing, new_folder, read_json, write_file, write_json
from cai_jax.provenance import file_hash

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TASKS = {"policy": "CAUSAL_LM", "reward": "SEQ_CLS"}
# Settings of peft that change what an adapter computes, with the only value that is supported: their default.
_PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "rank_pattern": {},
          "alpha_pattern": {}, "lora_bias": False, "trainable_token_indices": None}  # fmt: skip


def save_adapter(folder, config: ModelConfig, params, kind: str, base: str, metadata=None) -> None:
    """Write the adapters of `params`, and its score head, as a folder that peft loads onto the model named `base`.

    The folder appears whole or not at all, with the same bytes every time. Among several processes all must call.
    """
    kernels, names = adapters(params), _tensor_names(config, kind)
    first = next(iter(kernels.values()))
    rank = first.a_IR.shape[-1]
    settings = {
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": round(first.scale * rank, 6),
        "lora_dropout": 0.0,
        "modules_to_save": ["score"] if kind == "reward" else None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(names[f"layers/{name}/a_IR"].name.split(".")[-3] for name in kernels),
        "task_type": _TASKS[kind],
    }
    leaves = {f"layers/{name}/{part}": getattr(kernels[name], part) for name in kernels for part in ("a_IR", "b_RO")}
    tensors = [Outgoing(names[leaf], leaves[leaf], layer) for layer in range(config.n_layers) for leaf in leaves]
    if kind == "reward":
        tensors.append(Outgoing(names["score"], params["score"], None))
    with new_folder(Path(folder)) as place:
        if place:
            write_json(place / CONFIG, settings)
        write_file(place and place / WEIGHTS, tensors, metadata or {})


def load_adapter(folder, model: Model, shardings=None) -> Model:
    """The model with an adapter of peft's on it: Lora kernels over the params of `model`, which are not copied.

    `shardings` is a function from shapes to shardings, as in `load_model`; None: everything on the first device.
    Raises UserError naming the file and what is wrong or not supported in it.
    """
    folder, config, kind = Path(folder), model.config, model.kind
    settings = Reader(read_json(folder / CONFIG), str(folder / CONFIG))
    rank, scale = _rank_and_scale(settings)
    checkpoint, names, shapes = Checkpoint(folder, WEIGHTS), _tensor_names(config, kind), _shapes(config, kind, rank)
    held = {_target(leaf) for leaf, tensor in names.items() if tensor.name.format(layer=0) in checkpoint.tensors}
    names = {leaf: tensor for leaf, tensor in names.items() if _target(leaf) in held}
    checkpoint.check(names, shapes, config)
    place = _places(names, shapes, shardings)
    leaves = {leaf: checkpoint.read(tensor, shapes[leaf], "float32", place(leaf)) for leaf, tensor in names.items()}
    layers = dict(model.params["layers"])
    for name in PROJECTIONS:
        if f"layers/{name}" in held:
            layers[name] = Lora(layers[name], leaves[f"layers/{name}/a_IR"], leaves[f"layers/{name}/b_RO"], scale)
    head = {"score": leaves["score"]} if "score" in leaves else {}
    digest = hashlib.sha256(f"{model.hash} {file_hash(folder / CONFIG)} {file_hash(folder / WEIGHTS)}".encode())
    return replace(model, params={**model.params, **head, "layers": layers}, hash=digest.hexdigest())


def _rank_and_scale(settings: Reader) -> tuple[int, float]:
    for key, value in _PLAIN.items():
        if (found := settings.get(key)) not in (value, None):
            settings.fail(f"'{key}' is {found!r}; supported: {value!r}")
    rank, alpha = settings.size("r"), settings.number("lora_alpha")
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _target(leaf: str) -> str:
    """What a leaf of an adapter belongs to: `layers/q`, `score`."""
    return leaf.removesuffix("/a_IR").removesuffix("/b_RO")


def _tensor_names(config: ModelConfig, kind: str) -> dict[str, HfTensor]:
    """Leaf name (`layers/q/a_IR`) -> tensor of an adapter."""
    base, named = families.tensor_names(config, kind), {}
    for name in PROJECTIONS:
        module = base[f"layers/{name}"].name.removesuffix(".weight")
        for part, theirs in (("a_IR", "lora_A"), ("b_RO", "lora_B")):
            named[f"layers/{name}/{part}"] = HfTensor(f"base_model.model.{module}.{theirs}.weight", True, True)
    if kind == "reward":
        named["score"] = HfTensor("base_model.model.score.weight", True, False)
    return named


def _shapes(config: ModelConfig, kind: str, rank: int) -> dict[str, tuple[int, ...]]:
    base, shapes = families.leaf_shapes(config, kind), {}
    for name in PROJECTIONS:
        layers, inputs, outputs = base[f"layers/{name}"]
        shapes |= {f"layers/{name}/a_IR": (layers, inputs, rank), f"layers/{name}/b_RO": (layers, rank, outputs)}
    return shapes | ({"score": base["score"]} if kind == "reward" else {})


def _places(names, shapes, shardings):
    """Leaf name -> sharding, as a function."""
    if shardings is None:
        return lambda leaf: jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return shardings({leaf: jax.ShapeDtypeStruct(shapes[leaf], "float32") for leaf in names}).__getitem__
