from pathlib import Path

import jax
import numpy as np
import pytest

LOSSES = Path(__file__).parents[1] / "oracles" / "losses"


@pytest.fixture(autouse=True)
def strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def oracle():
    """Arrays of one file of expected numbers, by name."""

    def read(name):
        with np.load(LOSSES / f"{name}.npz") as file:
            return {key: file[key] for key in file.files}

    return read
