from cai_jax.accelerators import parse_slice
from cai_jax.config import Config, Mesh, Model, Ppo, Sampler, apply_overrides
from cai_jax.plan import mend

CONFIG = Config(
    model=Model("random:llama"), description="a test", stages=("ppo",), mesh=Mesh(data=1, fsdp=-1),
    sampler=Sampler(rows=64), ppo=Ppo(rollouts=64, minibatches=2, microbatches=1),
)  # fmt: skip
PIECE = parse_slice("v4-32")


def test_candidates_are_valid_settings_and_grow():
    changes = list(mend.candidates(CONFIG, PIECE))
    for settings, piece in changes:
        apply_overrides(CONFIG, settings)
        assert piece.chips >= PIECE.chips
    sizes = [piece.chips for _, piece in changes]
    assert sizes == sorted(sizes)  # more chips only when no setting helps
    assert len(set(changes)) == len(changes)


def test_one_setting_is_tried_before_two():
    same_slice = [settings for settings, piece in mend.candidates(CONFIG, PIECE) if piece == PIECE]
    names = [len({mend.name_of(s).split(".")[0] for s in settings}) for settings in same_slice]
    assert names.index(2) >= 5  # e.g. model and sampler together, after every single one


def test_the_first_that_fits_is_taken():
    tried = []

    def fits(config, piece):
        tried.append((config, piece))
        return config.ppo.microbatches == 4

    settings, piece = mend.nearest(CONFIG, PIECE, fits)
    assert settings == ("ppo.microbatches=4",) and piece == PIECE
    assert [c.ppo.microbatches for c, _ in tried][-1] == 4


def test_more_chips_when_no_setting_helps():
    settings, piece = mend.nearest(CONFIG, PIECE, lambda config, piece: piece.chips >= 64)
    assert (settings, piece.name) == ((), "v4-128")


def test_nothing_fits():
    assert mend.nearest(CONFIG, PIECE, lambda config, piece: False) is None
