"""Reward model: Bradley-Terry on pairs of scores, with soft labels."""

import jax
import jax.numpy as jnp

from .logprobs import as_float


def bradley_terry_terms(chosen_B, rejected_B, probability_B=1.0, margin_B=0.0, center=0.0):
    """The loss of each pair, [B]; see bradley_terry."""
    chosen_B, rejected_B = as_float(chosen_B), as_float(rejected_B)
    logit_B = chosen_B - rejected_B - margin_B
    cross_entropy_B = -(
        probability_B * jax.nn.log_sigmoid(logit_B) + (1 - probability_B) * jax.nn.log_sigmoid(-logit_B)
    )
    return cross_entropy_B + center * jnp.square(chosen_B + rejected_B)


def label_margin(probability_B, scale: float):
    """A margin for each pair, [B]: `scale` times the label's log-odds, bounded to those of 0.01 and 0.99.

    The surer the label, the further apart the scores are to be; a tie asks for nothing, and swapping a pair turns its
    margin round. It is negative where the second response is the better one.
    """
    bounded_B = jnp.clip(probability_B, 0.01, 0.99)
    return scale * (jnp.log(bounded_B) - jnp.log1p(-bounded_B))


def bradley_terry(chosen_B, rejected_B, probability_B=1.0, margin_B=0.0, center=0.0):
    """Mean over pairs of -[p log s(d) + (1 - p) log s(-d)] + center (chosen + rejected)^2.

    Here s is the logistic function and d = chosen - rejected - margin. The margin shifts the logit, so with a
    soft label the loss stays a cross-entropy: it is least where s(d) = p.

    Args:
      chosen_B, rejected_B: scores of the two responses of each pair.
      probability_B: that the first is better: 1 for a hard label, between 0 and 1 for a soft one (Bai et al.
        2022, arXiv 2212.08073, section 4.1).
      margin_B: by how much the first should win, in units of score (Llama 2, arXiv 2307.09288, section 3.2.2).
      center: weight of the squared sum, which keeps scores near 0 (Eisenstein et al. 2023, arXiv 2312.09244).
    """
    return bradley_terry_terms(chosen_B, rejected_B, probability_B, margin_B, center).mean()
