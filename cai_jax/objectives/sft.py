"""Fine-tuning: negative log-likelihood of the tokens that the mask marks."""

from .logprobs import assert_same_shape, masked_fill, masked_mean, masked_sum


def token_loss(logprobs_BT, mask_BT):
    """Mean negative log-prob, in nats, over the marked tokens of the whole batch (not a mean of row means)."""
    assert_same_shape(logprobs_BT, mask_BT)
    return masked_mean(-masked_fill(logprobs_BT, mask_BT), mask_BT)


def token_loss_sums(logprobs_BT, mask_BT):
    """(summed negative log-prob, tokens): what a step adds up over microbatches before it divides."""
    total, count = masked_sum(logprobs_BT, mask_BT)
    return -total, count
