"""Direct preference optimization and its relatives, on log-probs of whole responses."""

import jax
import jax.numpy as jnp

from .logprobs import as_float

KINDS = ("sigmoid", "ipo", "hinge", "robust")


def terms(policy_chosen_B, policy_rejected_B, ref_chosen_B, ref_rejected_B, beta, kind="sigmoid", smoothing=0.0):
    """The loss of each pair, [B]; see loss."""
    chosen_B = as_float(policy_chosen_B) - as_float(ref_chosen_B)
    rejected_B = as_float(policy_rejected_B) - as_float(ref_rejected_B)
    gap_B = chosen_B - rejected_B
    if kind in ("sigmoid", "robust"):
        agree_B = -jax.nn.log_sigmoid(beta * gap_B)
        differ_B = -jax.nn.log_sigmoid(-beta * gap_B)
        if kind == "sigmoid":
            return (1 - smoothing) * agree_B + smoothing * differ_B
        return ((1 - smoothing) * agree_B - smoothing * differ_B) / (1 - 2 * smoothing)
    if kind not in KINDS:
        raise ValueError(f"unknown kind of DPO loss {kind!r}: use one of {', '.join(KINDS)}")
    if jnp.ndim(smoothing) or smoothing:
        raise ValueError(f"the DPO loss {kind!r} has no label smoothing: use kind 'sigmoid' or 'robust'")
    if kind == "ipo":
        return jnp.square(gap_B - 1 / (2 * beta))
    return jax.nn.relu(1 - beta * gap_B)


def loss(policy_chosen_B, policy_rejected_B, ref_chosen_B, ref_rejected_B, beta, kind="sigmoid", smoothing=0.0):
    """Mean loss over pairs of h = (policy - reference of chosen) - (policy - reference of rejected).

    Args:
      policy_*_B, ref_*_B: summed log-probs of each response, in nats. For ipo, means per token keep the
        target 1/(2 beta) the same for short and long responses.
      beta: strength of the tie to the reference.
      kind: sigmoid  -(1-e) log s(beta h) - e log s(-beta h): DPO (Rafailov et al. 2023, arXiv 2305.18290), and
                     with e > 0 conservative DPO (Mitchell 2023);
            robust   (-(1-e) log s(beta h) + e log s(-beta h)) / (1 - 2e), unbiased for labels that are flipped
                     with probability e (Chowdhury et al. 2024, arXiv 2403.00409);
            ipo      (h - 1/(2 beta))^2 (Azar et al. 2023, arXiv 2310.12036);
            hinge    max(0, 1 - beta h) (Zhao et al. 2023, arXiv 2305.10425).
      smoothing: e, below 0.5, or e of each pair as [B]; for sigmoid and robust only. With 1 - p for a pair whose first
        response is better with probability p, sigmoid learns from soft labels: it is then Bradley-Terry on beta times
        the log-ratios, with p as its target. Robust divides by 1 - 2e, so its e must stay away from 0.5.

    Raises:
      ValueError: unknown kind, or smoothing for a kind that has none.
    """
    arrays = (policy_chosen_B, policy_rejected_B, ref_chosen_B, ref_rejected_B)
    return terms(*arrays, beta, kind, smoothing).mean()
