"""FLOPs of the decoder by arithmetic: products only, a multiplication and an addition are two.

Norms, rotations, softmax and losses are left out: they are below 1% at 7B, and the roofline of a chip is that of its
products. XLA's own count (`cost_analysis`) takes the body of a loop once, whatever its length; this one takes all.
"""

from math import prod

from cai_jax.models.families import ModelConfig, leaf_shapes


def parameters(config: ModelConfig, kind: str = "policy") -> int:
    """Number of parameters of a policy or a reward model (which has no unembedding)."""
    return sum(prod(shape) for shape in leaf_shapes(config, kind).values())


def mean_context(length: int, past: int = 0, window: int = 0) -> float:
    """Keys that a token sees, on average over `length` tokens that follow `past` others; `window` 0 sees all."""
    first, last = past + 1, past + length
    if not window or last <= window:
        return (first + last) / 2
    growing = max(window - past, 0)  # tokens that see everything before them
    return (growing * (first + window) / 2 + (length - growing) * window) / length


def forward_flops(
    config: ModelConfig, tokens: float, length: int = 1, past: int = 0, unembedded: float | None = None
) -> float:
    """FLOPs of one pass over `tokens` tokens, which stand in pieces of `length` after `past` cached ones each.

    Attention is counted for the keys that a token may see (half of a dense causal product). `unembedded`: tokens that
    get logits; all where it is None. A reward or value model takes 0: its head is negligible.
    """
    query, key = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer = config.d_model * (2 * query + 2 * key + 3 * config.d_ff)  # q, o; k, v; gate, up, down
    logits = tokens if unembedded is None else unembedded
    products = tokens * 2 * config.n_layers * layer + logits * 2 * config.d_model * config.vocab_size
    return products + attention_flops(config, tokens, length, past)


def attention_flops(config: ModelConfig, tokens: float, length: int = 1, past: int = 0) -> float:
    """FLOPs of scores and mix alone, which `forward_flops` includes."""
    seen = sum(mean_context(length, past, window) for window in config.windows)
    return tokens * 4 * config.n_heads * config.head_dim * seen


def training_flops(
    config: ModelConfig,
    tokens: float,
    length: int,
    unembedded: float | None = None,
    remat: str = "none",
    frozen: bool = False,
) -> float:
    """FLOPs of a train step over `tokens` tokens in sequences of `length`.

    A forward pass, gradients of activations and of weights: three times `forward_flops`. `remat` (`model.remat`) adds
    what the backward pass runs again, of "full" a forward pass, of "dots" attention: leave it out for MFU, which counts
    useful work. `frozen` leaves out the gradients of weights (LoRA; its own kernels are negligible).
    """
    forward = forward_flops(config, tokens, length, unembedded=unembedded)
    again = {"none": 0.0, "dots": attention_flops(config, tokens, length), "full": forward}[remat]
    return (3 - frozen) * forward + again
