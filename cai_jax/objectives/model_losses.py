"""The losses of the train steps as functions of parameters and a batch.

Each builder returns an objective for `training.step`: `(params, batch) -> (sum of losses, weight, sums of metrics)`.
Batches are dicts of arrays with rows first; what is in them stands with each builder.
"""

from functools import partial

import jax
import jax.numpy as jnp

from cai_jax.models.families import ModelConfig
from cai_jax.models.heads import head_values, scalar_heads
from cai_jax.models.kernels import cast
from cai_jax.models.transformer import hidden_states, unembed

from . import dpo, grpo, pairwise, ppo, sft
from .logprobs import masked_fill, masked_sum, token_logprobs


def sft_objective(
    config: ModelConfig, compute_dtype="float32", remat="none", attention="auto", anchor=0.0, share_start=False
):
    """Negative log-likelihood of completion tokens in packed rows.

    Batch: `tokens`, `positions`, `segments`, `targets` (1 at completion tokens), `[B, T]` each; see `batches.Packing`,
    also for `share_start`. The weight is the number of completion tokens.

    With an `anchor` above 0, `params` are `{"policy": ..., "reference": ...}`, and completion tokens that `targets`
    marks with 2 count `anchor` times the KL from the reference's distribution instead (`sft.anchored_sum`). Metrics are
    then `anchor_share`, the share of such tokens, and `anchor_kl`, their KL in nats over all completion tokens.
    """

    def hidden_of(params, batch):
        return hidden_states(
            config, params, batch["tokens"], batch["positions"], batch["segments"], remat, attention,
            prefix_segment=share_start, dtype=compute_dtype,
        )  # fmt: skip

    def objective(params, batch):
        policy = params["policy"] if anchor else params
        next_BT, marks_BT = (jnp.roll(batch[name], -1, axis=1) for name in ("tokens", "targets"))
        marks_BT = marks_BT.at[:, -1].set(0)  # the last position predicts nothing
        head = partial(_logits, config, compute_dtype)
        arrays = head, head_weights(config, policy), hidden_of(policy, batch), next_BT, marks_BT
        count = jnp.sum(marks_BT > 0, dtype=jnp.float32)
        if not anchor:
            return sft.nll_sum(*arrays), count, {}
        start = jax.lax.stop_gradient(params["reference"])
        reference = head_weights(config, start), hidden_of(start, batch)
        loss, kl = sft.anchored_sum(*arrays, reference, anchor)
        return loss, count, {"anchor_kl": kl, "anchor_share": jnp.sum(marks_BT == 2, dtype=jnp.float32)}

    return objective


def reward_objective(
    config: ModelConfig, compute_dtype="float32", remat="none", center=0.0, tie=0.0, attention="auto", margin=0.0
):
    """Bradley-Terry with soft targets on pairs; each head learns by itself, the loss is the mean over heads.

    Batch: pairs as rows of `batches.pair_rows`, each a prompt and its two responses: `tokens`, `positions`,
    `segments` `[B, T]`, `last` `[B, 2]`; `probability` `[B]` that the first is better, `real` `[B]` (0 for an empty
    row), and with several heads `head_weights` `[B, K]`, what a pair counts for each of them. `margin` is the scale of
    `pairwise.label_margin`. The weight is the number of pairs. Metrics are of the mean of the heads. Labels nearer than
    `tie` to 1/2 say nothing about right and wrong: `decided_share` are the others, and `accuracy` is the share of pairs
    that are decided and agreed with.
    """

    def objective(params, batch):
        values_BTK = head_values(
            config, params, batch["tokens"], batch["positions"], batch["segments"], remat, attention, compute_dtype
        )
        scores_B2K = jnp.take_along_axis(values_BTK, batch["last"][..., None], axis=1)
        probability_B1 = batch["probability"][:, None]
        wanted_B1 = pairwise.label_margin(probability_B1, margin)
        terms_BK = pairwise.bradley_terry_terms(
            scores_B2K[:, 0], scores_B2K[:, 1], probability_B1, wanted_B1, center
        )
        if config.score_heads > 1:
            terms_BK = terms_BK * batch["head_weights"]
        terms_B, (first_B, second_B) = terms_BK.mean(axis=1), scores_B2K.mean(axis=2).T
        agrees_B = (first_B > second_B) == (batch["probability"] > 0.5)
        loss, count = masked_sum(terms_B, batch["real"])
        is_decided_B = jnp.abs(batch["probability"] - 0.5) >= tie
        decided, _ = masked_sum(is_decided_B.astype(jnp.float32), batch["real"])
        accuracy, _ = masked_sum((agrees_B & is_decided_B).astype(jnp.float32), batch["real"])
        apart, _ = masked_sum(jnp.abs(first_B - second_B), batch["real"])
        return loss, count, {"accuracy": accuracy, "decided_share": decided, "margin": apart}

    return objective


def ppo_objective(
    config: ModelConfig,
    value_config: ModelConfig | None,
    compute_dtype="float32",
    remat="none",
    *,
    temperature: float,
    clip: float,
    value_clip: float,
    value_coef: float,
    value_offset: float = 0.0,
    attention: str = "auto",
):
    """Clipped policy loss plus clipped value loss; `params` are `{"policy": ..., "value": ...}`.

    Without `value_config` they share a trunk: `params` are `{"policy": ...}` alone, whose score head gives the values
    from the hidden states that give the logits, and the gradients of both losses meet there.

    Batch: `tokens` and `positions` `[B, P + N]` (prompt left-padded to P, completion from P on), and for the
    completion `[B, N]`: `mask`, `old_logprobs` (recorded by the sampler), `old_values`, `advantages`, `returns`.
    Logits are divided by the temperature of the rollouts. The value is the value model's output minus `value_offset`:
    what is taken off the scores of the reward model that it starts from. The weight is the number of completion tokens.
    """

    def objective(params, batch):
        mask = batch["mask"]
        arrays = batch["tokens"], batch["positions"], mask
        forms = compute_dtype, remat, attention
        if value_config is None:
            hidden_BND = _before_completion(config, params["policy"], *arrays, *forms)
            head = _head(config, params["policy"], compute_dtype)
            targets_BN = batch["tokens"][:, -mask.shape[1] :]
            logprobs_BN, entropy_BN = token_logprobs(hidden_BND, head, targets_BN, temperature=temperature)
            values_BN = scalar_heads(params["policy"], hidden_BND, compute_dtype)[..., 0]
        else:
            logprobs_BN, entropy_BN = completion_logprobs(config, params["policy"], *arrays, temperature, *forms)
            values_BN = completion_values(value_config, params["value"], *arrays, *forms)
        values_BN = values_BN - value_offset
        policy_BN, policy_metrics = ppo.policy_terms(
            logprobs_BN, batch["old_logprobs"], batch["advantages"], mask, clip
        )
        value_BN, value_metrics = ppo.value_terms(values_BN, batch["old_values"], batch["returns"], mask, value_clip)
        sums = {
            "policy_loss": policy_BN,
            "value_loss": value_BN,
            "entropy": entropy_BN,
            "policy_clip_fraction": policy_metrics["clip_fraction"],
            "value_clip_fraction": value_metrics["clip_fraction"],
            "approx_kl": policy_metrics["approx_kl"],
        }
        loss, count = masked_sum(policy_BN + value_coef * value_BN, mask)
        return loss, count, {name: masked_sum(x, mask)[0] for name, x in sums.items()}

    return objective


def grpo_objective(
    config: ModelConfig, compute_dtype="float32", remat="none", *, temperature: float, clip: float, kl_coef: float,
    length_norm="response", attention="auto",
):  # fmt: skip
    """Group relative policy optimization; `params` are `{"policy": ...}`. The loss stands in objectives/grpo.py.

    Batch: `tokens`, `positions` `[B, P + N]`, `mask`, `old_logprobs` as in `ppo_objective`, `ref_logprobs` `[B, N]`,
    and `advantages` `[B]`. The weight is the number of rows that have a token; metrics are means over a row's tokens.
    """

    def objective(params, batch):
        mask = batch["mask"]
        arrays = batch["tokens"], batch["positions"], mask
        logprobs_BN, entropy_BN = completion_logprobs(
            config, params["policy"], *arrays, temperature, compute_dtype, remat, attention
        )
        recorded = batch["old_logprobs"], batch["ref_logprobs"], batch["advantages"]
        terms_BN, metrics = grpo.terms(logprobs_BN, *recorded, mask, clip, kl_coef)
        has_tokens_B = jnp.any(mask > 0, axis=1)
        loss, count = masked_sum(grpo.per_response(terms_BN, mask, length_norm), has_tokens_B)
        arrays_BN = {
            "entropy": entropy_BN,
            "policy_clip_fraction": metrics["clip_fraction"],
            "approx_kl": metrics["approx_kl"],
            "kl_loss": metrics["kl_loss"],
        }
        sums = {name: grpo.per_response(x_BN, mask, "response").sum() for name, x_BN in arrays_BN.items()}
        return loss, count, sums

    return objective


def dpo_objective(
    config: ModelConfig, compute_dtype="float32", remat="none", *, beta: float, kind="sigmoid", smoothing=0.0,
    nll_coef=0.0, attention="auto",
):  # fmt: skip
    """Direct preference optimization on pairs; the loss and its kinds stand in objectives/dpo.py.

    Batch: pairs as rows of `batches.pair_rows` whose first response is the chosen one: `tokens`, `positions`,
    `segments` `[B, T]`; `ref_logprobs` `[B, 2]`, the reference model's `pair_logprobs` of the same rows; `real` `[B]`
    (0 for an empty row); `smoothing` `[B]` in the place of the one number, where labels are soft. The weight is the
    number of pairs; rewards are beta times the log-ratio to the reference. `nll` is the negative log-prob of a chosen
    token, the mean of a response, of which `nll_coef` is the weight (Pang et al. 2024, arXiv 2404.19733, equation 1).
    """

    def objective(params, batch):
        logprobs_B2 = pair_logprobs(config, params, batch, kind, compute_dtype, remat, attention)
        arrays = *logprobs_B2.T, *batch["ref_logprobs"].T
        nll_B = -logprobs_B2[:, 0] / (1 if kind == "ipo" else jnp.maximum(_of_responses(batch)[..., 0].sum(axis=1), 1))
        terms_B = dpo.terms(*arrays, beta, kind, batch.get("smoothing", smoothing)) + nll_coef * nll_B
        loss, count = masked_sum(terms_B, batch["real"])
        rewards_B2 = beta * (logprobs_B2 - batch["ref_logprobs"])
        sums = {
            "accuracy": (rewards_B2[:, 0] > rewards_B2[:, 1]).astype(jnp.float32),
            "margin": rewards_B2[:, 0] - rewards_B2[:, 1],
            "chosen_reward": rewards_B2[:, 0],
            "rejected_reward": rewards_B2[:, 1],
            "nll": nll_B,
        }
        return loss, count, {name: masked_sum(x_B, batch["real"])[0] for name, x_B in sums.items()}

    return objective


def pair_logprobs(config, params, batch, kind="sigmoid", compute_dtype="float32", remat="none", attention="auto"):
    """Log-probs `[B, 2]` of the two responses of every row of `batches.pair_rows`, summed; for ipo means per token."""
    tokens_BT, positions_BT, segments_BT = batch["tokens"], batch["positions"], batch["segments"]
    hidden_BTD = hidden_states(
        config, params, tokens_BT, positions_BT, segments_BT, remat, attention, dtype=compute_dtype
    )
    # A token is predicted by the one before it in its text: for the first of a response the last of the prompt, which
    # stands at the index that is its position.
    first_BT = segments_BT != jnp.roll(segments_BT, 1, axis=1)
    before_BT = jnp.where(first_BT, positions_BT - 1, jnp.arange(tokens_BT.shape[1]) - 1)
    hidden_BTD = jnp.take_along_axis(hidden_BTD, jnp.maximum(before_BT, 0)[..., None], axis=1)
    logprobs_BT, _ = token_logprobs(hidden_BTD, _head(config, params, compute_dtype), tokens_BT)
    of_responses_BT2 = _of_responses(batch)
    sums_B2 = masked_fill(logprobs_BT[..., None], of_responses_BT2).sum(axis=1)
    return sums_B2 / jnp.maximum(of_responses_BT2.sum(axis=1), 1) if kind == "ipo" else sums_B2


def _of_responses(batch):
    """`[B, T, 2]`: which tokens of `batches.pair_rows` are of each of the two responses."""
    return (batch["segments"][..., None] == jnp.arange(1, 3)) & (batch["positions"] > 0)[..., None]


def completion_logprobs(
    config, params, tokens_BT, positions_BT, mask_BN, temperature=1.0, compute_dtype="float32", remat="none",
    attention="auto",
):  # fmt: skip
    """Log-probs and entropies `[B, N]` of the last N tokens of every row under softmax(logits / temperature)."""
    hidden_BND = _before_completion(config, params, tokens_BT, positions_BT, mask_BN, compute_dtype, remat, attention)
    head = _head(config, params, compute_dtype)
    return token_logprobs(hidden_BND, head, tokens_BT[:, -mask_BN.shape[1] :], temperature=temperature)


def completion_values(
    config, params, tokens_BT, positions_BT, mask_BN, compute_dtype="float32", remat="none", attention="auto"
):
    """Value `[B, N]` of the state before each of the last N tokens."""
    hidden_BND = _before_completion(config, params, tokens_BT, positions_BT, mask_BN, compute_dtype, remat, attention)
    return scalar_heads(params, hidden_BND, compute_dtype).mean(axis=-1)


def _before_completion(config, params, tokens_BT, positions_BT, mask_BN, compute_dtype, remat, attention):
    """The hidden states `[B, N, D]` that predict the last N tokens: those of the token before each."""
    start = tokens_BT.shape[1] - mask_BN.shape[1]
    hidden_BTD = hidden_states(
        config, params, tokens_BT, positions_BT, remat=remat, attention=attention, dtype=compute_dtype
    )
    return hidden_BTD[:, start - 1 : -1]


def head_weights(config: ModelConfig, params) -> dict:
    """The leaf that turns hidden states to logits, by its name."""
    name = "embed" if config.tie_embeddings else "lm_head"
    return {name: params[name]}


def _head(config: ModelConfig, params, compute_dtype):
    """Hidden states to logits."""
    return partial(_logits, config, compute_dtype, head_weights(config, params))


def _logits(config: ModelConfig, compute_dtype, weights, hidden):
    """The cast stands inside, so that slabs add their gradients in the stored dtype."""
    return unembed(config, cast(weights, compute_dtype), hidden)
