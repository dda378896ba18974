"""What a program must do at the least, by arithmetic: FLOPs, bytes of memory, bytes over links; and its time at peak.

Bytes are those that no implementation avoids: weights once a pass, the filled part of the cache, the optimizer's state
once in and once out, residuals of each layer. The temporaries here are a model of what XLA holds; they rank changes,
and stand in for the compiler where there is none (GPUs).
"""

from dataclasses import dataclass

import jax.numpy as jnp

from cai_jax.accelerators import Slice
from cai_jax.models.attention import PIECE
from cai_jax.models.families import ModelConfig
from cai_jax.models.flops import forward_flops, parameters, training_flops
from cai_jax.objectives.logprobs import token_logprobs
from cai_jax.sampler.abstract import SamplerShape, strips_of_shard
from cai_jax.sampler.cache import BLOCK, STRIP, blocks_of, cache_bytes

SLAB = token_logprobs.__kwdefaults__["chunk"]  # tokens whose logits exist at once


@dataclass(frozen=True)
class Work:
    """One call of a program: FLOPs of all chips together; bytes of memory and of links a chip."""

    flops: float = 0.0
    memory: float = 0.0
    link: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.memory + other.memory, self.link + other.link)

    def times(self, piece: Slice) -> dict[str, float]:
        """Seconds at the published peaks, by what takes them."""
        return {
            "compute": self.flops / (piece.chips * piece.chip.flops),
            "memory": self.memory / piece.chip.bandwidth,
            "links": self.link / piece.link if piece.chips > 1 else 0.0,
        }


@dataclass(frozen=True)
class Batch:
    """Sequences of a pass: `unembedded` are the tokens of a sequence that get logits, None: a scalar head instead."""

    rows: int
    length: int
    unembedded: int | None


def forward_work(config: ModelConfig, mesh, batch: Batch, itemsize: int) -> Work:
    """One pass over a batch with weights that are gathered from the fsdp axis, `itemsize` bytes a parameter."""
    tokens, own = batch.rows * batch.length, _tokens_of_shard(mesh, batch)
    flops = forward_flops(config, tokens, batch.length, unembedded=batch.rows * (batch.unembedded or 0))
    weights = parameters(config) * itemsize / mesh.shape["tensor"]
    memory = weights + own * _layer_bytes(config, mesh)
    return Work(flops, memory, _gathered(mesh, weights) + _exchanged(config, mesh, own, passes=1))


def training_work(
    config: ModelConfig, mesh, batch: Batch, microbatches: int, remat: str, itemsize: int, trained: int
) -> Work:
    """One optimizer step of a model of which `trained` parameters train: forward, backward, gradients summed over the
    mesh, Adam in float32."""
    tokens, own, again = batch.rows * batch.length, _tokens_of_shard(mesh, batch), remat == "full"
    unembedded, frozen = batch.rows * (batch.unembedded or 0), trained < parameters(config) // 2
    flops = training_flops(config, tokens, batch.length, unembedded, remat, frozen)
    weights = parameters(config) * itemsize / mesh.shape["tensor"]
    passes = 3 - frozen
    memory = 32 * trained / mesh.size + microbatches * (passes + again) * weights
    memory += own * (passes + (remat != "none")) * _layer_bytes(config, mesh)
    gradients = _gathered(mesh, 4 * trained / mesh.shape["tensor"]) + _summed_over_data(mesh, 4 * trained / mesh.size)
    link = microbatches * (2 * _gathered(mesh, weights) + gradients)
    return Work(flops, memory, link + _exchanged(config, mesh, own, passes=2 + again))


def prepare_work(shape: SamplerShape, mesh, stored: int) -> Work:
    """The cast and reshard: parameters of `stored` bytes each in, decoding weights out."""
    count = parameters(shape.config)
    weights = count * jnp.dtype(shape.dtype).itemsize / mesh.shape["tensor"]
    return Work(0.0, count * stored / mesh.size + 2 * weights, _gathered(mesh, weights))


def decode_work(shape: SamplerShape, mesh, context: float) -> Work:
    """One decoding step of all rows, which stand on `context` entries each."""
    flops = forward_flops(shape.config, shape.rows, length=1, past=max(0, round(context) - 1))
    own = shape.rows / _ways(mesh)
    memory = _decoding_bytes(shape, mesh) + own * _entry_bytes(shape, mesh) * context
    logits = own * shape.config.vocab_size * 4 * (1 - 1 / mesh.shape["tensor"])
    return Work(flops, memory, _exchanged(shape.config, mesh, own, passes=1) + logits)


def prefill_work(shape: SamplerShape, mesh, context: float) -> Work:
    """One call of prefill, full of strips that stand on `context` entries each."""
    strips = strips_of_shard(shape.prefill_tokens, mesh)
    own = strips * STRIP
    flops = forward_flops(shape.config, own * _ways(mesh), length=STRIP, past=round(context), unembedded=0)
    memory = _decoding_bytes(shape, mesh) + strips * _entry_bytes(shape, mesh) * context
    return Work(flops, memory, _exchanged(shape.config, mesh, own, passes=1))


def share_work(shape: SamplerShape, mesh) -> Work:
    """The copies of all prefixes: read and written once."""
    return Work(memory=2 * sum(shape.prefixes) * _entry_bytes(shape, mesh))


def pass_temporaries(config: ModelConfig, mesh, batch: Batch, itemsize: int) -> float:
    """What a forward pass holds a chip: cast weights, one layer gathered and run, a slab of logits."""
    own = _tokens_of_shard(mesh, batch)
    weights = parameters(config) * itemsize / mesh.size + 2 * _layer_weights(config, mesh, itemsize)
    return weights + _layer_peak(config, mesh, batch, own) + _slab(config, mesh)


def training_temporaries(
    config: ModelConfig, mesh, batch: Batch, microbatches: int, remat: str, itemsize: int, trained: int
) -> float:
    """What a train step holds a chip: cast weights, gradients in float32, kept residuals, one layer, a slab."""
    own = _tokens_of_shard(mesh, batch) / microbatches
    kept = own * _kept_bytes(config, mesh, remat, itemsize)
    cast_weights = itemsize * parameters(config) / mesh.size
    gradients = 4 * trained / mesh.size * (2 if microbatches > 1 else 1)
    layer = 3 * _layer_weights(config, mesh, itemsize) + 2 * _layer_peak(config, mesh, batch, own)
    return cast_weights + gradients + kept + layer + 2 * _slab(config, mesh)


def sampler_temporaries(shape: SamplerShape, mesh, tokens: int) -> float:
    """What a sampler program holds a chip beside weights and cache, for so many tokens of a shard at once."""
    config = shape.config
    widest = 6 * config.d_model + 3 * config.d_ff / mesh.shape["tensor"]
    strips = max(1, tokens // STRIP)
    blocks = 2 * strips * BLOCK * config.n_kv_heads * config.head_dim * 4 / mesh.shape["tensor"]
    logits = min(tokens, shape.rows / _ways(mesh)) * config.vocab_size * 4 * 3
    return tokens * widest * 4 + blocks + logits


def prepare_temporaries(shape: SamplerShape, mesh) -> float:
    """The cast weights before they are gathered, and the largest gathered stack."""
    itemsize = jnp.dtype(shape.dtype).itemsize
    stack = shape.config.n_layers * 2 * shape.config.d_model * shape.config.d_ff * itemsize / mesh.shape["tensor"]
    return parameters(shape.config) * itemsize / mesh.size + stack


def _ways(mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def _tokens_of_shard(mesh, batch: Batch) -> float:
    return batch.rows * batch.length / _ways(mesh)


def _gathered(mesh, full: float, axis: str = "fsdp") -> float:
    """Bytes that reach a chip when an array of `full` bytes is gathered along an axis (or scattered and summed)."""
    return full * (1 - 1 / mesh.shape[axis])


def _summed_over_data(mesh, split: float) -> float:
    """Bytes a chip sends to sum gradients of `split` bytes on all chips together over the data axis."""
    return 2 * (mesh.shape["data"] - 1) * split


def _exchanged(config: ModelConfig, mesh, tokens: float, passes: int) -> float:
    """Bytes a chip sends to sum activations over the tensor axis: two sums a layer and pass, float32."""
    tensor = mesh.shape["tensor"]
    return passes * config.n_layers * 2 * 2 * (1 - 1 / tensor) * tokens * config.d_model * 4


def _layer_bytes(config: ModelConfig, mesh) -> float:
    """Bytes a token that all layers write: the residual twice, what attention and feed-forward hand on, in float32."""
    heads = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    return config.n_layers * 4 * (6 * config.d_model + (2 * heads + 3 * config.d_ff) / mesh.shape["tensor"])


def _kept_bytes(config: ModelConfig, mesh, remat: str, itemsize: int) -> float:
    """Bytes a token that all layers keep for the backward pass: their inputs, and what `transformer.REMAT` names."""
    if remat == "none":
        return _layer_bytes(config, mesh)
    heads = (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim  # q, mixed; k, v
    named = config.d_model + (heads + 2 * config.d_ff) / mesh.shape["tensor"] if remat == "dots" else 0
    return itemsize * config.n_layers * (config.d_model + named)


def _layer_weights(config: ModelConfig, mesh, itemsize: int) -> float:
    heads = 2 * (config.n_heads + config.n_kv_heads) * config.head_dim
    return config.d_model * (heads + 3 * config.d_ff) * itemsize / mesh.shape["tensor"]


def _layer_peak(config: ModelConfig, mesh, batch: Batch, tokens: float) -> float:
    """One layer's activations, with the attention scores of a piece of the queries."""
    scores = 2 * tokens * min(batch.length, PIECE) * config.n_heads / mesh.shape["tensor"] * 4
    return scores + tokens * _layer_bytes(config, mesh) / config.n_layers


def _slab(config: ModelConfig, mesh) -> float:
    """Logits of one slab, a few copies, and the unembedding gathered."""
    logits = 3 * SLAB * config.vocab_size * 4
    return (logits + config.vocab_size * config.d_model * 4) / mesh.shape["tensor"]


def _decoding_bytes(shape: SamplerShape, mesh) -> float:
    """Weights that a pass of the sampler reads: all, but of an untied embedding only rows."""
    config = shape.config
    count = parameters(config) - (0 if config.tie_embeddings else config.vocab_size * config.d_model)
    itemsize = 1 if shape.int8_weights else jnp.dtype(shape.dtype).itemsize
    return count * itemsize / mesh.shape["tensor"]


def _entry_bytes(shape: SamplerShape, mesh) -> float:
    """Keys and values of one token on one chip."""
    dtype = "int8" if shape.int8_cache else shape.dtype
    whole = cache_bytes(shape.config, 1, shape.length, 0, dtype) / (blocks_of(shape.length) * BLOCK)
    split = mesh.shape["tensor"] if shape.config.n_kv_heads % mesh.shape["tensor"] == 0 else 1
    return whole / split
