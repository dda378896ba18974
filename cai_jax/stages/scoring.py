"""Scores of a reward model for token sequences of any length, and log-probs of pairs of responses."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import numpy as np

from cai_jax.chat import encode_chat
from cai_jax.mesh import on_host
from cai_jax.models.heads import head_values, last_real
from cai_jax.objectives.model_losses import pair_logprobs
from cai_jax.sampler.engine import bucket
from cai_jax.training.batches import pair_rows, right_padded

ROWS, SMALLEST_BUCKET = 16, 64


def score_texts(context, config, params, rows_of_tokens) -> np.ndarray:
    """The reward of every token sequence, the mean of its heads, `[rows]` float32."""
    return score_heads(context, config, params, rows_of_tokens).mean(axis=-1)


def score_heads(context, config, params, rows_of_tokens) -> np.ndarray:
    """The score of every token sequence by every head, `[rows, K]` float32; the other rows have no part in it."""
    shape, rows = context.config.model, rows_of_pass(context.mesh)
    scores = np.zeros((len(rows_of_tokens), config.score_heads), np.float32)
    for length, batch in _passes([len(tokens) for tokens in rows_of_tokens], rows):
        texts = [rows_of_tokens[i] for i in batch] + [[0]] * (rows - len(batch))
        placed = context.put_rows(right_padded(texts, length))
        rewards_BK = _rewards(config, context.mesh, params, *placed, shape.compute_dtype, shape.attention)
        scores[batch] = on_host(rewards_BK)[: len(batch)]
    return scores


def score_samples(context, reward, tokenizer, conversations, samples) -> list[float]:
    """The reward of every sample as the answer to its conversation; `tokenizer` is that of the model that wrote it."""
    texts = [encode_chat(tokenizer, messages) + s.tokens for messages, s in zip(conversations, samples, strict=True)]
    return [float(score) for score in score_texts(context, reward.config, reward.params, texts)]


def score_several(context, reward, tokenizer, conversations, drawn) -> list[list[float]]:
    """The rewards of all samples of every conversation; `drawn` has a list of samples for each."""
    asked = [messages for messages, samples in zip(conversations, drawn, strict=True) for _ in samples]
    scores = iter(score_samples(context, reward, tokenizer, asked, [s for samples in drawn for s in samples]))
    return [[next(scores) for _ in samples] for samples in drawn]


def score_pairs(context, config, params, pairs: Sequence[tuple]) -> np.ndarray:
    """Log-probs of both responses of every pair, summed over their tokens, `[pairs, 2]` float32, in nats.

    `pairs` are (prompt, first, second) as token ids. A pair's log-probs do not depend on the other pairs.
    """
    shape, rows = context.config.model, rows_of_pass(context.mesh)
    logprobs = np.zeros((len(pairs), 2), np.float32)
    for length, batch in _passes([sum(map(len, pair)) for pair in pairs], rows):
        texts = pair_rows([pairs[i] for i in batch] + [([], [], [])] * (rows - len(batch)), length)
        placed = context.put_rows({name: texts[name] for name in ("tokens", "positions", "segments")})
        logprobs_B2 = _pair_logprobs(config, context.mesh, params, placed, shape.compute_dtype, shape.attention)
        logprobs[batch] = on_host(logprobs_B2)[: len(batch)]
    return logprobs


def _passes(lengths: Sequence[int], rows: int) -> Iterator[tuple[int, list[int]]]:
    """Places of at most `rows` texts that go through together, with the length that each of them is padded to."""
    groups = defaultdict(list)
    for place, length in enumerate(lengths):
        groups[bucket(length, SMALLEST_BUCKET)].append(place)
    for length, places in sorted(groups.items()):
        for start in range(0, len(places), rows):
            yield length, places[start : start + rows]


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
        values_BTK = head_values(config, params, tokens_BT, positions_BT, attention=attention, dtype=dtype)
        return last_real(values_BTK, positions_BT)


def lower_pairs(config, model, mesh, params, batch):
    """The program that scores pairs, lowered from shapes in the place of params and pairs."""
    return _pair_logprobs.lower(model, mesh, params, batch, config.model.compute_dtype, config.model.attention)


@partial(jax.jit, static_argnames=("config", "mesh", "dtype", "attention"))
def _pair_logprobs(config, mesh, params, batch, dtype, attention):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return pair_logprobs(config, params, batch, compute_dtype=dtype, attention=attention)
