"""Pure losses over arrays: no model, no optimizer, no state.

Each module has the scalar loss of a whole batch and, under it, the terms per token or per row that the scalar
is the mean of. The training step sums terms and counts over microbatches and divides once, so that a mean is
over the tokens of the batch and never a mean of means. float64 stays float64; half precision is raised to
float32. Masks are bool or 0/1, and what a mask leaves out may hold anything, NaN included.

Letters: B rows, T tokens, D model, V vocabulary.
"""

from . import dpo, grpo, logprobs, pairwise, ppo, sft

__all__ = ["dpo", "grpo", "logprobs", "pairwise", "ppo", "sft"]
