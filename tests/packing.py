"""Packed rows for tests."""

from cai_jax.training.batches import Packing


def pack(examples, length, share_start=False):
    """All rows of a `Packing` at once."""
    packing = Packing(examples, length, share_start)
    return packing.take(range(len(packing)))
