"""Labelers by name, from the config of a run."""

from cai_jax.config import LABELERS, Config, Preferences
from cai_jax.constitution import Constitution
from cai_jax.endpoint import EXTERNAL, Client
from cai_jax.errors import UserError, did_you_mean
from cai_jax.labelers.contrast import Contrast
from cai_jax.labelers.examples import Examples
from cai_jax.labelers.external import ExternalLabeler
from cai_jax.labelers.judge import Judge
from cai_jax.labelers.opinion import Labeler
from cai_jax.labelers.options import Options
from cai_jax.labelers.rating import Rating
from cai_jax.labelers.rule import Rule
from cai_jax.labelers.thought import Thought
from cai_jax.prompts import preference_preamble, resolve_options, resolve_ratings


def labeler(
    name: str, config: Config, constitution: Constitution, judge: Judge, client: Client | None = None
) -> Labeler:
    """The labeler of this name, one of `config.LABELERS`, as the config's `preferences` section has it.

    `client` is what "external" asks.

    Raises UserError for an unknown name, and where the judge's tokenizer or the constitution does not give what the
    labeler needs.
    """
    if name not in LABELERS:
        raise UserError(f"preferences.labelers: there is no labeler {name!r}{did_you_mean(name, LABELERS)} "
                        f"(there are {', '.join(LABELERS)})")
    if name == EXTERNAL:
        return ExternalLabeler(client, constitution, config.preferences.guard)
    return _MAKERS[name](config.preferences, constitution, judge)


def _options(settings: Preferences, constitution: Constitution, judge: Judge) -> Options:
    answer = resolve_options(judge.tokenizer)
    return Options(judge, answer, settings.orders == "both", preference_preamble(constitution, answer))


def _thought(settings: Preferences, constitution: Constitution, judge: Judge) -> Thought:
    return Thought(judge, resolve_options(judge.tokenizer), settings.thought, settings.orders == "both")


def _contrast(settings: Preferences, constitution: Constitution, judge: Judge) -> Contrast:
    return Contrast(judge, settings.contrast)


def _examples(settings: Preferences, constitution: Constitution, judge: Judge) -> Examples:
    return Examples(judge, settings.examples, constitution)


def _rating(settings: Preferences, constitution: Constitution, judge: Judge) -> Rating:
    return Rating(judge, resolve_ratings(judge.tokenizer), settings.rating)


def _rule(settings: Preferences, constitution: Constitution, judge: Judge) -> Rule:
    return Rule(settings.rule)


_MAKERS = {
    "options": _options, "thought": _thought, "contrast": _contrast, "examples": _examples, "rating": _rating,
    "rule": _rule,
}  # fmt: skip
