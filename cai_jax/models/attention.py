"""Attention of whole rows, the same numbers by each backend.

Who sees whom is one rule, `visible`: positions and segments decide. The backends:

    xla      any case, on any device; long rows a piece of their queries at a time
    splash   TPU, a Pallas kernel (`jax.experimental.pallas.ops.tpu.splash_attention`); on a CPU interpreted, for tests
    cudnn    NVIDIA GPUs, the fused kernel behind `jax.nn.dot_product_attention`

In a row, what a token sees is itself or stands before it, and the tokens of a segment (but for the prefix, segment 0)
stand side by side. Packing, pairs and padding on either side are such rows.

Letters: B rows, T tokens, S keys, H query heads, K key/value heads, G query heads a key/value head, N head size.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from cai_jax.mesh import ROW_AXES, platform_in_use
from cai_jax.models.families import ModelConfig
from cai_jax.models.kernels import product

BACKENDS = ("auto", "xla", "splash", "cudnn")
NEGATIVE = -1e30  # finite: a row that sees nothing must not become NaN
PIECE = 128  # queries of a row whose scores exist at once in plain XLA
GROUPS = 4  # of queries by how far they look back: five eighths of the scores are computed
SPLASH_BLOCK = 512  # queries and keys of a block, less for shorter rows
LANES = 128  # of a TPU


def choose_backend(wanted: str, config: ModelConfig, dtype, length: int, prefix_segment: bool) -> str:
    """The backend that runs: the wanted one, "auto" by the devices of the mesh in use, and XLA where that one cannot.

    Splash compares segments for equality only, so it has no prefix segment (see `visible`), and it cannot be split by
    the compiler: without a mesh in use (train steps and scoring set their own) it needs a single device. cuDNN has
    no soft cap, no float32, and sizes that it does not take.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if wanted == "auto":
        wanted = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform_in_use(), "xla")
    if wanted == "splash":
        splittable = jax.device_count() == 1 if mesh.empty else config.n_kv_heads % mesh.shape["tensor"] == 0
        fits = splittable and not prefix_segment
    elif wanted == "cudnn":
        sizes = config.head_dim <= 128 and config.head_dim % 8 == 0 and length % 2 == 0
        fits = sizes and not config.attn_softcap and dtype in (jnp.bfloat16, jnp.float16)
    else:
        fits = True
    return wanted if fits else "xla"


def attend(config: ModelConfig, backend: str, q_BTHN, k_BTKN, v_BTKN, positions_BT, segments_BT, window):
    """Attention of rows to themselves `[B, T, H, N]`, by a backend of `choose_backend`. `window` may be traced."""
    run = {"xla": _in_pieces, "splash": _splash, "cudnn": _cudnn}[backend]
    return run(config, q_BTHN, k_BTKN, v_BTKN, positions_BT, segments_BT, window)


def visible(query_positions_BT, key_positions_BS, window, query_segments_BT=None, key_segments_BS=None):
    """Which keys a query may see `[B, T, S]`: real, not later, in the window, of its own segment or of segment 0."""
    distance = query_positions_BT[:, :, None] - key_positions_BS[:, None, :]
    seen = (distance >= 0) & (distance < window) & (key_positions_BS >= 0)[:, None, :]
    if query_segments_BT is not None:
        own = query_segments_BT[:, :, None] == key_segments_BS[:, None, :]
        seen &= own | (key_segments_BS == 0)[:, None, :]
    return seen


def attention(config: ModelConfig, q_BTHN, k_BSKN, v_BSKN, visible_BTS):
    """Grouped-query attention in plain XLA; scores and softmax in float32. Returns `[B, T, H, N]`."""
    rows, length, heads, size = q_BTHN.shape
    # Heads first: then the scores, the largest arrays, are in no product transposed.
    q_BKGTN = jnp.moveaxis(q_BTHN.reshape(rows, length, config.n_kv_heads, -1, size), 1, 3)
    scores = product("bkgtn,bskn->bkgts", q_BKGTN, k_BSKN)
    scores = softcap(scores * config.query_scale, config.attn_softcap)
    scores = jnp.where(visible_BTS[:, None, None], scores, NEGATIVE)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v_BSKN.dtype)
    mixed_BKGTN = product("bkgts,bskn->bkgtn", probabilities, v_BSKN).astype(q_BTHN.dtype)
    return jnp.moveaxis(mixed_BKGTN, 3, 1).reshape(rows, length, heads, size)


def softcap(x, cap):
    """Gemma 2's soft cap, `cap * tanh(x / cap)`; 0 is off."""
    return cap * jnp.tanh(x / cap) if cap else x


def _in_pieces(config, q_BTHN, k_BTKN, v_BTKN, positions_BT, segments_BT, window):
    """Plain attention, PIECE queries at a time, and of the keys only what stands before the end of their group.

    The scores `[B, H, T, S]` never exist whole, nor are they kept for the backward pass; most of those that the mask
    would drop are not computed.
    """
    length = q_BTHN.shape[1]
    queries = q_BTHN, positions_BT, *([] if segments_BT is None else [segments_BT])
    if length <= PIECE:
        return _piece(config, window, k_BTKN, v_BTKN, queries[1:], queries)
    group = -(-length // (GROUPS * PIECE)) * PIECE
    out = []
    for start in range(0, length, group):
        end = min(start + group, length)
        keys = k_BTKN[:, :end], v_BTKN[:, :end], [x[:, :end] for x in queries[1:]]
        run = jax.checkpoint(partial(_piece, config, window, *keys))
        part = [x[:, start:end] for x in queries]
        out.append(run(part) if end - start <= PIECE else _one_after_the_other(run, part))
    return jnp.concatenate(out, axis=1)


def _one_after_the_other(run, queries):
    """`run` of each PIECE of the queries, in a loop."""
    rows, length = queries[0].shape[:2]
    count = -(-length // PIECE)

    def cut(x):
        padded = jnp.pad(x, ((0, 0), (0, count * PIECE - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(rows, count, PIECE, *x.shape[2:]), 1, 0)

    out = jnp.moveaxis(jax.lax.map(run, [cut(x) for x in queries]), 0, 1)
    return out.reshape(rows, count * PIECE, *out.shape[3:])[:, :length]


def _piece(config, window, k_BSKN, v_BSKN, key_places, queries):
    """Plain attention of some queries. Places: positions, and segments where there are any."""
    q_BTHN, positions_BT, *segments_BT = queries
    key_positions_BS, *key_segments_BS = key_places
    seen_BTS = visible(positions_BT, key_positions_BS, window, *segments_BT, *key_segments_BS)
    return attention(config, q_BTHN, k_BSKN, v_BSKN, seen_BTS)


def _cudnn(config, q_BTHN, k_BTKN, v_BTKN, positions_BT, segments_BT, window):
    """The mask goes in as an array `[B, 1, T, S]`, so that every row is right."""
    seen_BTS = visible(positions_BT, positions_BT, window, segments_BT, segments_BT)
    return jax.nn.dot_product_attention(
        q_BTHN, k_BTKN, v_BTKN, mask=seen_BTS[:, None], scale=config.query_scale, implementation="cudnn"
    )


def _splash(config, q_BTHN, k_BTKN, v_BTKN, positions_BT, segments_BT, window):
    """Splash attention, each device its own rows and heads. Pads are a segment that no real token is in."""
    segments_BT = jnp.zeros_like(positions_BT) if segments_BT is None else segments_BT
    arrays = q_BTHN, k_BTKN, v_BTKN, jnp.where(positions_BT >= 0, segments_BT + 1, 0), jnp.asarray(window)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _splash_rows(config, jax.default_backend(), *arrays)
    heads, rows = P(ROW_AXES, None, "tensor", None), P(ROW_AXES, None)
    run = partial(_splash_rows, config, mesh.abstract_device.platform)
    return jax.shard_map(run, in_specs=(heads, heads, heads, rows, P()), out_specs=heads, check_vma=False)(*arrays)


def _splash_rows(config, platform, q_BTHN, k_BTKN, v_BTKN, segments_BT, window):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads = q_BTHN.shape[1:3]
    block = min(SPLASH_BLOCK, -(-length // LANES) * LANES)
    padding = -length % block
    room = length + padding
    sizes = splash.BlockSizes(*[block] * 8)

    def kernel_of(reach: int):
        causal = splash.CausalMask((room, room))
        mask = splash.LocalMask((room, room), (reach - 1, 0), 0) if reach else causal
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
            attn_logits_soft_cap=config.attn_softcap or None, interpret=platform == "cpu",
        )  # fmt: skip
        return lambda q, k, v, ids: jax.vmap(kernel)(q, k, v, splash.SegmentIds(ids, ids))

    def by_head(x_BTXN):
        return jnp.pad(x_BTXN, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)

    reaches = sorted(set(config.windows))  # 0, all, comes first
    place = sum((window == reach).astype(jnp.int32) * i for i, reach in enumerate(reaches) if reach)
    arrays = by_head(q_BTHN * config.query_scale), by_head(k_BTKN), by_head(v_BTKN)
    ids_BT = jnp.pad(segments_BT, ((0, 0), (0, padding)))
    if len(reaches) == 1:
        out_BHTN = kernel_of(reaches[0])(*arrays, ids_BT)
    else:
        out_BHTN = jax.lax.switch(place, [kernel_of(reach) for reach in reaches], *arrays, ids_BT)
    return out_BHTN.swapaxes(1, 2)[:, :length].astype(q_BTHN.dtype)
