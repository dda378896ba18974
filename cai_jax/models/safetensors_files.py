"""The safetensors files of a model: read leaf by leaf into place, written tensor by tensor.

A leaf of the params is a tensor of the file, or (stacked) one tensor a layer; `families.tensor_names` says which.
"""

import contextlib
import json
import math
import os
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from cai_jax.errors import UserError
from cai_jax.models import families
from cai_jax.models.families import ModelConfig

SHARD_BYTES = 5_000_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_WRAPPERS = ("_orig_mod.", "module.")  # left in tensor names by torch.compile and data-parallel wrappers
_DERIVED = "rotary_emb.inv_freq"  # stored by older files, computed from the config here
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAFETENSORS_DTYPES = {name: code for code, name in _DTYPES.items()}


class Checkpoint:
    """The safetensors files of a folder: which tensor stands where, in which shape."""

    def __init__(self, folder: Path, name: str = SINGLE):
        self.folder = folder
        if name == SINGLE and (folder / INDEX).exists():
            files = _files_of_index(folder / INDEX)
        else:
            files = [name]
        self.paths = [folder / file for file in files]
        self.tensors = {}  # plain name -> (path, stored name, shape, dtype code)
        for path in self.paths:
            with _opened(path) as file:
                for stored in file.keys():
                    part = file.get_slice(stored)
                    self.tensors[_unwrapped(stored)] = (path, stored, tuple(part.get_shape()), part.get_dtype())
        if "embed_tokens.weight" in self.tensors:  # saved from the bare decoder
            self.tensors = {n if n == "score.weight" else f"model.{n}": t for n, t in self.tensors.items()}

    def has_score(self, hf_config: dict) -> bool:
        architectures = hf_config.get("architectures") or ()
        return "score.weight" in self.tensors or any("SequenceClassification" in name for name in architectures)

    def check(self, names: dict, shapes: dict, config: ModelConfig):
        """Every tensor is there, in its shape and in a known dtype, and no other is."""
        expected = {}
        for leaf, tensor in names.items():
            shape = shapes[leaf][1:] if tensor.stacked else shapes[leaf]
            for layer in range(config.n_layers if tensor.stacked else 1):
                expected[tensor.name.format(layer=layer)] = shape[::-1] if tensor.transposed else shape
        for name, shape in expected.items():
            if name not in self.tensors:
                raise UserError(f"{self.folder}: tensor '{name}' of shape {list(shape)} is missing: restore the file")
            path, _, found, dtype = self.tensors[name]
            if found != shape:
                raise UserError(
                    f"{path}: tensor '{name}' has shape {list(found)}, expected {list(shape)}: "
                    "config.json and weights do not belong together"
                )
            if dtype not in _DTYPES:
                raise UserError(f"{path}: tensor '{name}' has dtype {dtype}; supported: {', '.join(_DTYPES)}")
        tied = {"lm_head.weight"} if config.tie_embeddings else set()
        for name in self.tensors.keys() - expected.keys() - tied:
            if not name.endswith(_DERIVED):
                path, _, found, _ = self.tensors[name]
                raise UserError(
                    f"{path}: unexpected tensor '{name}' of shape {list(found)}: "
                    f"no part of a {config.family} model with this config.json"
                )

    def read(self, tensor: families.HfTensor, shape, dtype, sharding) -> jax.Array:
        """One leaf on its devices; only the slices that they hold are read."""

        def read_slices(index):
            starts_stops = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
            out = np.empty([stop - start for start, stop in starts_stops], dtype)
            inner = [slice(*bounds) for bounds in starts_stops[tensor.stacked :]]
            wanted = tuple(inner[::-1] if tensor.transposed else inner)
            layers = range(*starts_stops[0]) if tensor.stacked else [None]
            with contextlib.ExitStack() as stack:  # opened a leaf at a time: closing gives the mapped pages back
                files = {}
                for row, layer in enumerate(layers):
                    path, stored, _, _ = self.tensors[tensor.name.format(layer=layer)]
                    if path not in files:
                        files[path] = stack.enter_context(_opened(path))
                    part = files[path].get_slice(stored)[wanted]
                    out[row if tensor.stacked else ...] = part.T if tensor.transposed else part
            return out

        # Transfers run behind; without a wait the host's copies of several leaves would be held at once.
        return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, read_slices))


def _files_of_index(path: Path) -> list[str]:
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise UserError(f"{path}: 'weight_map' does not name a file for each tensor: restore the file")
    return sorted(set(where.values()))


@contextlib.contextmanager
def _opened(path: Path):
    try:
        with safe_open(path, "np") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: a model folder needs safetensors weights") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not readable as safetensors ({error}): restore the file") from None


def _unwrapped(name: str) -> str:
    for prefix in _WRAPPERS:
        name = name.removeprefix(prefix)
    return name


def write_weights(folder: Path | None, config, params, kind, metadata):
    """The safetensors files; with no folder (a process that does not write) only the gathering is done."""
    leaves, names = families.flatten(params), families.tensor_names(config, kind)
    _check_params(leaves, families.leaf_shapes(config, kind))
    stacked = [leaf for leaf in names if names[leaf].stacked]
    order = [("embed", None), *((leaf, layer) for layer in range(config.n_layers) for leaf in stacked)]
    order += [(leaf, None) for leaf in names if not names[leaf].stacked and leaf != "embed"]
    tensors = [Outgoing(names[leaf], leaves[leaf], layer) for leaf, layer in order]
    shards = _shards(tensors)
    files = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    files = [SINGLE] if len(shards) == 1 else files
    for file, shard in zip(files, shards, strict=True):
        write_file(folder and folder / file, shard, metadata)
    if folder and len(shards) > 1:
        where = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(t.size for t in tensors)}, "weight_map": where})


def _check_params(leaves, shapes):
    for leaf in leaves.keys() ^ shapes.keys():
        raise ValueError(f"leaf '{leaf}' is {'not a part of' if leaf in leaves else 'missing from'} the params")
    for leaf, shape in shapes.items():
        if leaves[leaf].shape != shape:
            raise ValueError(f"leaf '{leaf}' has shape {leaves[leaf].shape}, expected {shape}")


class Outgoing:
    """One tensor on its way to a file: known in name, shape and size before its values come to the host."""

    def __init__(self, tensor: families.HfTensor, leaf, layer: int | None):
        shape = leaf.shape if layer is None else leaf.shape[1:]
        self.name = tensor.name.format(layer=layer)
        self.shape = shape[::-1] if tensor.transposed else shape
        self.dtype = _SAFETENSORS_DTYPES[str(leaf.dtype)]
        self.size = math.prod(shape) * leaf.dtype.itemsize
        self._leaf, self._layer, self._transposed = leaf, layer, tensor.transposed

    def values(self) -> np.ndarray:
        part = self._leaf
        if isinstance(part, jax.Array):
            if self._layer is not None:
                part = jax.lax.dynamic_index_in_dim(part, self._layer, keepdims=False)
            if not part.is_fully_addressable:
                from jax.experimental import multihost_utils

                part = multihost_utils.process_allgather(part, tiled=True)
        elif self._layer is not None:
            part = part[self._layer]
        part = np.asarray(part)
        return np.ascontiguousarray(part.T if self._transposed else part)


def _shards(tensors: list[Outgoing]) -> list[list[Outgoing]]:
    shards, size = [[]], 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size
    return shards


def write_file(path: Path | None, tensors: list[Outgoing], metadata: dict):
    """The safetensors format: header length, JSON header padded with spaces to 8 bytes, then the tensors.

    With no path (a process that does not write) only the gathering is done.
    """
    header, offset = {"__metadata__": dict(sorted({**metadata, "format": "pt"}.items()))}, 0
    for tensor in tensors:
        offsets = [offset, offset + tensor.size]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") if path else contextlib.nullcontext() as file:
        if file:
            file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            values = tensor.values()
            if file:
                file.write(values.reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def new_folder(folder: Path):
    """A folder to fill, which then appears whole or not at all, in place of one that is there.

    Among several processes all must call; the first one gets the folder, the others None.
    """
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    writes = jax.process_index() == 0
    try:
        if writes:
            for leftover in (temporary, old):
                shutil.rmtree(leftover, ignore_errors=True)
            temporary.mkdir(parents=True)
        yield temporary if writes else None
        if writes:
            if folder.exists():
                os.replace(folder, old)
            os.replace(temporary, folder)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: the model cannot be written ({error.strerror or error}): make room or choose "
                        "another run folder") from None  # fmt: skip
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"save {folder}")


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name}: not a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}): restore the file") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object: restore the file")
    return value


def write_json(path: Path, value):
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
