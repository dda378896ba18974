import pytest

from cai_jax.accelerators import GIB, parse_slice
from cai_jax.config import Config, Mesh, Model, Ppo, Sampler
from cai_jax.overrides import apply_overrides
from cai_jax.plan import mend

CONFIG = Config(
    model=Model("random:llama"), description="a test", stages=("ppo",), mesh=Mesh(data=1, fsdp=-1),
    sampler=Sampler(rows=64), ppo=Ppo(rollouts=64, minibatches=2, microbatches=1),
)  # fmt: skip
PIECE = parse_slice("v4-32")


def test_candidates_are_valid_settings_and_grow():
    changes = list(mend.candidates(CONFIG, PIECE, lambda settings: True))
    for settings, piece in changes:
        apply_overrides(CONFIG, settings)
        assert piece.chips >= PIECE.chips
    sizes = [piece.chips for _, piece in changes]
    assert sizes == sorted(sizes) and sizes[-1] > PIECE.chips  # more chips only when no setting helps
    assert len(set(changes)) == len(changes)


@pytest.mark.parametrize("remat, less", [("none", ["dots", "full"]), ("dots", ["full"]), ("full", [])])
def test_less_is_kept_of_a_layer_before_more_is_done_again(remat, less):
    config = apply_overrides(CONFIG, [f"model.remat={remat}"])
    changes = [settings for settings, _ in mend.candidates(config, PIECE, lambda settings: False)]
    assert [setting for settings in changes for setting in settings if "remat" in setting] == [
        f"model.remat={each}" for each in less
    ]


def test_pairs_are_made_of_what_helps():
    helping = ("model.remat=full",), ("sampler.rows=32",)
    changes = [settings for settings, _ in mend.candidates(CONFIG, PIECE, lambda settings: settings in helping)]
    pairs = [settings for settings in changes if len({mend.name_of(s).split(".")[0] for s in settings}) == 2]
    assert pairs == [("model.remat=full", "sampler.rows=32")]


def bytes_of(config, piece):
    """Needs 100 bytes a chip, less with more microbatches and chips."""
    return 100 * GIB * 16 // config.ppo.microbatches // piece.chips


def test_the_first_that_fits_is_taken():
    asked = []

    def fits(config, piece):
        asked.append(config.ppo.microbatches)
        return True

    assert mend.nearest(CONFIG, PIECE, bytes_of, fits) == (("ppo.microbatches=4",), PIECE)
    assert asked == [4]  # what is too large at a guess is not measured


def test_what_the_measure_refuses_is_not_named():
    settings, piece = mend.nearest(CONFIG, PIECE, bytes_of, lambda config, piece: piece.chips >= 64)
    assert (settings, piece.name) == ((), "v4-128")


def test_nothing_fits():
    assert mend.nearest(CONFIG, PIECE, bytes_of, lambda config, piece: False) is None
    assert mend.nearest(CONFIG, PIECE, lambda config, piece: 10**15, lambda config, piece: True) is None
