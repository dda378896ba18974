"""The decoder, pure functions over a pytree of weights; every family is the same code with other numbers.

Letters: B rows, T tokens, S keys, L layers, D model, F feed-forward, H query heads, K key/value heads,
G query heads a key/value head, N head size, V vocabulary.

A token has a position; a pad has position -1. Who sees whom follows from positions (and segments, where sequences
are packed) alone (attention.visible), so left padding, right padding, packing and a key/value cache are one rule.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax.mesh import by_layer, by_rows, gather_layer
from cai_jax.models.attention import attend as attend_rows
from cai_jax.models.attention import choose_backend, softcap
from cai_jax.models.families import ModelConfig, inverse_frequencies
from cai_jax.models.kernels import Transposed, cast, dot, kept

# What the backward pass finds of a layer beside its input, by name of a policy; "none" keeps everything.
REMAT = {
    # Nothing: the least memory, for a third more products.
    "full": None,
    # What products make: norms, rotation, activation and scores are done again, which are few FLOPs and much memory.
    "dots": jax.checkpoint_policies.save_only_these_names(
        "input", "q", "k", "v", "mixed", "attention_out", "gate", "up"
    ),
}


def forward(config: ModelConfig, params, tokens_BT, mask_BT=None):
    """Next-token logits `[B, T, V]` in float32. `mask_BT`: 1 for real tokens; left or right padding.

    Positions follow the mask. Logits at pads are finite and mean nothing.
    """
    tokens_BT = jnp.asarray(tokens_BT)
    hidden_BTD = hidden_states(config, params, tokens_BT, positions_from_mask(tokens_BT, mask_BT))
    return unembed(config, params, hidden_BTD)


def positions_from_mask(tokens_BT, mask_BT=None):
    """Position of every token in its row, -1 at pads."""
    if mask_BT is None:
        return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    mask_BT = jnp.asarray(mask_BT).astype(jnp.int32)
    return jnp.where(mask_BT > 0, jnp.cumsum(mask_BT, axis=1) - 1, -1)


def hidden_states(
    config: ModelConfig, params, tokens_BT, positions_BT, segments_BT=None, remat="none", attention="auto",
    prefix_segment=True, dtype=None,
):  # fmt: skip
    """Final-norm hidden states `[B, T, D]`.

    Args:
      segments_BT: keeps packed sequences apart.
      remat: "none", or a policy of REMAT: what a layer does again in the backward pass.
      attention: one of `attention.BACKENDS`; all give the same.
      prefix_segment: whether segment 0 holds tokens that its whole row sees. False promises that it holds pads only,
        which is what a kernel needs.
      dtype: of products' operands and of the activations between them, by default that of the embeddings; norms,
        rotation, softmax and sums are in float32. Each layer's weights are cast when the layer runs, so that there is
        never a second copy of all of them, nor of their gradients.
    """
    x_BTD = by_rows(embed(config, params, tokens_BT).astype(dtype or params["embed"].dtype))
    rope_RBTN = rope_tables(config, positions_BT)
    prefix_segment = prefix_segment and segments_BT is not None
    backend = choose_backend(attention, config, x_BTD.dtype, tokens_BT.shape[1], prefix_segment)

    def layer(x_BTD, scanned):
        weights, window, rope = scanned
        x_BTD = kept(x_BTD, "input")
        x_BTD, weights = by_layer(x_BTD, weights)
        weights = gather_layer(cast(weights, dtype, in_loop=True) if dtype else weights)

        def attend(q_BTHN, k_BTKN, v_BTKN):
            return attend_rows(config, backend, q_BTHN, k_BTKN, v_BTKN, positions_BT, segments_BT, window)

        return by_rows(block(config, weights, x_BTD, rope_RBTN[rope], attend)), None

    if remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=False)  # a scan's body cannot be merged
    windows_L, rope_of_layer_L = layer_data(config)
    with jax.named_scope("layers"):
        x_BTD, _ = jax.lax.scan(layer, x_BTD, (params["layers"], windows_L, rope_of_layer_L))
    return rms_norm(config, x_BTD, params["final_norm"])


def layer_data(config: ModelConfig):
    """What differs from layer to layer, as arrays to scan: windows and rope kinds, `[L]` each."""
    full = np.iinfo(np.int32).max
    windows_L = np.asarray([window or full for window in config.windows], np.int32)
    return jnp.asarray(windows_L), jnp.asarray(config.rope_of_layer, jnp.int32)


def embed(config: ModelConfig, params, tokens_BT):
    """Token embeddings `[B, T, D]`, float32, scaled where the family scales them."""
    return scale_embedded(config, params["embed"][tokens_BT])


def scale_embedded(config: ModelConfig, x_BTD):
    """Rows of the embedding table in float32, scaled where the family scales them."""
    x_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    return x_BTD * config.embed_scale if config.embed_scale != 1.0 else x_BTD


def unembed(config: ModelConfig, params, hidden_BTD):
    """Logits in float32 from final-norm hidden states, soft-capped where the family does."""
    with jax.named_scope("unembed"):
        tied = config.tie_embeddings
        logits = dot(hidden_BTD, Transposed(params["embed"]) if tied else params["lm_head"])
    return softcap(logits, config.logit_softcap)


def block(config: ModelConfig, weights, x_BTD, rope_BTN, attend):
    """One layer: attention and feed-forward, each with its residual. `attend(q, k, v)` owns the keys' memory."""
    with jax.named_scope("attention"):
        h_BTD = rms_norm(config, x_BTD, weights["attn_norm"])
        q_BTHN, k_BTKN, v_BTKN = project_qkv(config, weights, h_BTD, rope_BTN)
        mixed = kept(attend(q_BTHN, k_BTKN, v_BTKN).reshape(*x_BTD.shape[:-1], -1), "mixed")
        out_BTD = kept(linear(weights, "o", mixed), "attention_out")
        if config.post_norms:
            out_BTD = rms_norm(config, out_BTD, weights["attn_post_norm"])
        x_BTD = x_BTD + out_BTD
    with jax.named_scope("feed_forward"):
        h_BTD = rms_norm(config, x_BTD, weights["mlp_norm"])
        out_BTD = feed_forward(config, weights, h_BTD)
        if config.post_norms:
            out_BTD = rms_norm(config, out_BTD, weights["mlp_post_norm"])
        return x_BTD + out_BTD


def project_qkv(config: ModelConfig, weights, h_BTD, rope_BTN):
    """Queries, keys and values by head, normalised and rotated. Takes separate or fused (`qkv`) kernels."""
    sizes = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
    if "qkv" in weights:
        ends = np.cumsum(np.asarray(sizes) * config.head_dim)[:-1]
        flat = jnp.split(linear(weights, "qkv", h_BTD), ends, axis=-1)
    else:
        flat = [linear(weights, name, h_BTD) for name in "qkv"]
    q, k, v = (x.reshape(*x.shape[:-1], heads, config.head_dim) for x, heads in zip(flat, sizes, strict=True))
    if config.qk_norm:
        q, k = rms_norm(config, q, weights["q_norm"]), rms_norm(config, k, weights["k_norm"])
    q, k = rotate(q, rope_BTN), rotate(k, rope_BTN)
    return kept(q, "q"), kept(k, "k"), kept(v, "v")


def feed_forward(config: ModelConfig, weights, h_BTD):
    """Gated feed-forward. Takes separate or fused (`gate_up`) kernels."""
    if "gate_up" in weights:
        gate_BTF, up_BTF = jnp.split(linear(weights, "gate_up", h_BTD), 2, axis=-1)
    else:
        gate_BTF, up_BTF = linear(weights, "gate", h_BTD), linear(weights, "up", h_BTD)
    gate_BTF, up_BTF = kept(gate_BTF, "gate"), kept(up_BTF, "up")
    gate_BTF = gate_BTF.astype(jnp.promote_types(gate_BTF.dtype, jnp.float32))
    if config.activation == "silu":
        gate_BTF = jax.nn.silu(gate_BTF)
    else:
        gate_BTF = jax.nn.gelu(gate_BTF, approximate=True)
    return linear(weights, "down", (gate_BTF * up_BTF).astype(h_BTD.dtype))


def linear(weights, name, x):
    """Product with a named kernel, plus its bias where there is one; in the dtype of `x`."""
    y = dot(x, weights[name])
    bias = weights.get(f"{name}_bias")
    return (y if bias is None else y + bias.astype(y.dtype)).astype(x.dtype)


def rms_norm(config: ModelConfig, x, scale):
    """Root-mean-square norm over the last axis, computed in float32; Gemma's scale counts from one."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normal = wide * jax.lax.rsqrt(variance + config.norm_eps) * (config.norm_offset + scale.astype(wide.dtype))
    return normal.astype(x.dtype)


def rope_tables(config: ModelConfig, positions_BT):
    """Cosines and sines of every rope kind, side by side: `[R, B, T, N]` (first half cos, second half sin)."""
    frequencies_RN = np.stack([inverse_frequencies(kind, config.head_dim) for kind in config.rope_kinds])
    angles = positions_BT[None, :, :, None].astype(jnp.float32) * frequencies_RN[:, None, None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotate(x_BTHN, rope_BTN):
    """Rotary embedding in the split-halves form of Hugging Face."""
    cos, sin = jnp.split(rope_BTN[:, :, None, :], 2, axis=-1)
    first, second = jnp.split(x_BTHN, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHN.dtype)
