"""Scores of a reward model for token sequences of any length."""

from collections import defaultdict
from functools import partial

import jax
import numpy as np

from cai_jax.mesh import on_host
from cai_jax.models.heads import last_real, values
from cai_jax.sampler.engine import bucket
from cai_jax.training.batches import right_padded

ROWS, SMALLEST_BUCKET = 16, 64


def score_texts(context, config, params, rows_of_tokens) -> np.ndarray:
    """The reward of every token sequence, `[rows]` float32. A row's score does not depend on the other rows."""
    groups = defaultdict(list)
    for index, tokens in enumerate(rows_of_tokens):
        groups[bucket(len(tokens), SMALLEST_BUCKET)].append(index)
    rows = rows_of_pass(context.mesh)
    scores = np.zeros(len(rows_of_tokens), np.float32)
    for length, indices in sorted(groups.items()):
        for start in range(0, len(indices), rows):
            batch = indices[start : start + rows]
            texts = [rows_of_tokens[i] for i in batch] + [[0]] * (rows - len(batch))
            placed = context.put_rows(right_padded(texts, length))
            shape = context.config.model
            rewards_B = _rewards(config, context.mesh, params, *placed, shape.compute_dtype, shape.attention)
            scores[batch] = on_host(rewards_B)[: len(batch)]
    return scores


def rows_of_pass(mesh) -> int:
    """Rows that are scored together: at least ROWS, and as many for each data shard."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-ROWS // ways) * ways


def lower_rewards(config, model, mesh, params, tokens_BT, positions_BT):
    """The scoring program of a run's `Config`, lowered from shapes in the place of params and texts."""
    shape = config.model
    return _rewards.lower(model, mesh, params, tokens_BT, positions_BT, shape.compute_dtype, shape.attention)


@partial(jax.jit, static_argnames=("config", "mesh", "dtype", "attention"))
def _rewards(config, mesh, params, tokens_BT, positions_BT, dtype, attention):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for those who ask which mesh is in use
        values_BT = values(config, params, tokens_BT, positions_BT, attention=attention, dtype=dtype)
        return last_real(values_BT, positions_BT)
