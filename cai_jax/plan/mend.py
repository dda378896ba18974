"""The nearest change to a config with which all its programs fit: tried in an order, shown by the same measure."""

import sys
from collections.abc import Callable, Iterator

from cai_jax.accelerators import Slice, slices_of
from cai_jax.config import Config
from cai_jax.config_rules import REINFORCED
from cai_jax.errors import UserError
from cai_jax.overrides import apply_overrides, flatten

Change = tuple[tuple[str, ...], Slice]  # settings to make, and the slice to take


def candidates(config: Config, piece: Slice, helps: Callable[[tuple[str, ...]], bool]) -> Iterator[Change]:
    """Changes from small to large: settings that cost time or precision first, then pairs of those that help at all,
    then more chips."""
    singles = list(_settings(config))
    for settings in singles:
        yield settings, piece
    useful = [settings for settings in singles if helps(settings)]
    for i, first in enumerate(useful):
        for second in useful[i + 1 :]:
            if not {name_of(s) for s in first} & {name_of(s) for s in second}:
                yield (*first, *second), piece
    for larger in slices_of(piece.chip):
        if larger.chips > piece.chips:
            yield (), larger


def nearest(
    config: Config, piece: Slice, largest: Callable[[Config, Slice], int], fits, log=lambda line: None
) -> Change | None:
    """The first candidate that fits, None where none does. A candidate that is no valid run is passed over.

    `largest(config, slice)` are the bytes of the program that needs most, at a guess; `fits(config, slice)` is asked
    where that is within the chip's memory, and `log` is told so.
    """

    def guess(settings, where) -> int:
        try:
            return largest(apply_overrides(config, settings), where)
        except UserError:
            return sys.maxsize

    now = guess((), piece)
    for settings, where in candidates(config, piece, lambda settings: guess(settings, piece) < now):
        if guess(settings, where) <= where.chip.usable:
            log(f"trying {as_flags((settings, where), piece)}")
            if fits(apply_overrides(config, settings), where):
                return settings, where
    return None


def as_flags(change: Change, piece: Slice) -> str:
    """A change as the command takes it: `--set sampler.rows=64`, `--plan=v4-64` where it is not the slice `piece`."""
    settings, where = change
    larger = [] if where == piece else [f"--plan={where.name}"]
    return " ".join([*larger, *(f"--set {setting}" for setting in settings)])


def name_of(setting: str) -> str:
    """sampler.rows of "sampler.rows=64"."""
    return setting.partition("=")[0]


def _settings(config: Config) -> Iterator[tuple[str, ...]]:
    flat = flatten(config)
    for remat in {"none": ("dots", "full"), "dots": ("full",), "full": ()}[config.model.remat]:
        yield (f"model.remat={remat}",)
    yield from _more_microbatches(config)
    for ways in (2, 4, 8):
        if config.sampler.rows // ways and config.sampler.rows % ways == 0:
            yield (f"sampler.rows={config.sampler.rows // ways}",)
    for tensor in (2, 4, 8):
        if tensor > config.mesh.tensor:
            yield ("mesh.data=1", "mesh.fsdp=-1", f"mesh.tensor={tensor}")
    for name in (f"{stage}.frozen_dtype" for stage in REINFORCED if stage in config.stages):
        for dtype in ("bfloat16", "int8"):
            if flat[name] not in (dtype, "int8"):
                yield (f"{name}={dtype}",)
    if not config.sampler.int8_cache:
        yield ("sampler.int8_cache=true",)
    if not config.sampler.int8_weights:
        yield ("sampler.int8_weights=true",)
    if config.mesh.data == -1:
        yield ("mesh.data=1", "mesh.fsdp=-1")


def _more_microbatches(config: Config) -> Iterator[tuple[str, ...]]:
    """Twice and four times as many microbatches in every stage that trains."""
    for factor in (2, 4):
        settings = []
        for stage in ("sft", "reward_model", *REINFORCED, "dpo", "best_of_n"):
            if stage in config.stages and (stage != "best_of_n" or config.best_of_n.distill):
                section = getattr(config, stage)
                rows = section.rollouts // section.minibatches if stage in REINFORCED else section.batch_size
                if rows % (section.microbatches * factor) == 0:
                    settings.append(f"{stage}.microbatches={section.microbatches * factor}")
        if settings:
            yield tuple(settings)
