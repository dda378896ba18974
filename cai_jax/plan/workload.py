"""How much a run has to do: prompts, tokens and steps, from its config alone.

What depends on text that is still to be written (lengths of answers, prompts that do not fit) is taken at its limit.
"""

from dataclasses import dataclass
from pathlib import Path

from cai_jax.config import Config, PromptSet
from cai_jax.config_rules import rates_revisions
from cai_jax.constitution import AIMS, Constitution, load_constitution
from cai_jax.gold import load_gold
from cai_jax.prompt_sets import load_prompts
from cai_jax.prompts import unlike_answers, worked_answers

CHARACTERS_A_TOKEN = 4  # of English prose, for the usual vocabularies
ASSUMED_PROMPTS, ASSUMED_TOKENS = 1000, 128  # of a set that is on the hub


@dataclass(frozen=True)
class PromptCount:
    """Rows of a prompt set, tokens of a row on average, and categories."""

    rows: int
    tokens: float
    categories: int = 1


@dataclass(frozen=True)
class Workload:
    """What the stages of a run have to do, and what had to be assumed to say so."""

    prompts: dict[str, PromptCount]
    # Tokens of the conversation starts that the requests of a stage share, and of responses and labels by themselves.
    starts: dict[str, tuple[int, ...]]
    principles: int
    gold: PromptCount  # pairs of the judge stage, a prompt with both responses
    assumptions: tuple[str, ...]

    def rows(self, *names: str) -> int:
        """Prompts of some sets."""
        return sum(self.prompts[name].rows for name in names)

    def tokens(self, *names: str) -> float:
        """Mean tokens of a prompt of some sets."""
        return sum(self.prompts[n].rows * self.prompts[n].tokens for n in names) / max(self.rows(*names), 1)


def workload_of(config: Config) -> Workload:
    """Count prompts and worked examples; nothing is fetched. Raises UserError for a local set that cannot be read."""
    sets, assumed = {}, [f"a token is {CHARACTERS_A_TOKEN} characters of prompts and worked examples"]
    for name in ("red_team", "helpful", "eval_red_team", "eval_helpful", "eval_look_alike"):
        prompt_set: PromptSet = getattr(config.prompts, name)
        if prompt_set.path.startswith("shipped:") or Path(prompt_set.path).expanduser().exists():
            sets[name] = _counted(load_prompts(prompt_set, name).rows)
        else:
            rows = prompt_set.limit or ASSUMED_PROMPTS
            sets[name] = PromptCount(rows, ASSUMED_TOKENS)
            assumed.append(f"prompts.{name} ({prompt_set.path}) is not read: {rows} prompts of {ASSUMED_TOKENS} tokens")
    assumed.append("every text is as long as its limit")
    if "red_team" in config.stages:
        assumed.append("stages after red_team have the prompts of the config alone, not those that it will write")
    constitution = load_constitution(config.constitution, config.principles)
    starts = {"critique_revision": _revision_starts(config, constitution)}
    starts["judge"] = starts["labels"] = _label_starts(config, constitution)
    starts["responses"] = _response_starts(config, constitution)
    starts["preferences"] = tuple(dict.fromkeys((*starts["labels"], *starts["responses"])))
    return Workload(sets, starts, len(constitution.principles), _gold(config, constitution), tuple(assumed))


def _revision_starts(config: Config, constitution: Constitution) -> tuple[int, ...]:
    """The worked critiques of each aim of a round, and what draws are chosen by."""
    matched = config.critique_revision.principles == "matched"
    asked = constitution.matching("", "harmless") if matched else constitution.principles
    of_aims = [[principle] for principle in {principle.aim: principle for principle in asked}.values()]
    starts = [_tokens(constitution.worked(principles)) for principles in of_aims]
    return (*starts, *(_compared(constitution, of_aims) if rates_revisions(config) else ()))


def _label_starts(config: Config, constitution: Constitution) -> tuple[int, ...]:
    """The worked comparisons, and the worked answers where labels go by these."""
    shown = _tokens(constitution.preference_few_shots)
    if "examples" not in (*config.preferences.labelers, *config.judge.also):
        return (shown,)
    of_aims = [[principle] for principle in {p.aim: p for p in constitution.principles}.values()]
    if config.preferences.principles != 1 or config.judge.principles == "all":
        of_aims.append(list(constitution.principles))
    return (shown, *_compared(constitution, of_aims))


def _response_starts(config: Config, constitution: Constitution) -> tuple[int, ...]:
    """The worked answers that contrasted responses are sampled with."""
    if not config.preferences.contrasted:
        return (0,)
    return tuple(_length(worked_answers(constitution, constitution.matching("", aim))) for aim in AIMS)


def _compared(constitution: Constitution, of_aims) -> list[int]:
    """The worked answers of principles, and those of others, each once."""
    own = [worked_answers(constitution, principles) for principles in of_aims]
    others = [unlike_answers(constitution, principles) for principles in of_aims]
    return [_length(turns) for turns in {str(turns): turns for turns in (*own, *others) if turns}.values()]


def _length(turns) -> int:
    """The tokens of a conversation, about."""
    return round(sum(len(turn["content"]) for turn in turns) / CHARACTERS_A_TOKEN)


def _gold(config: Config, constitution: Constitution) -> PromptCount:
    if "judge" not in config.stages:
        return PromptCount(0, 0.0)
    pairs = load_gold(config.judge.gold, constitution).pairs
    turns = sum(len(turn["content"]) for pair in pairs for turn in pair.messages)
    characters = turns + sum(len(pair.response_a) + len(pair.response_b) for pair in pairs)
    return PromptCount(len(pairs), characters / CHARACTERS_A_TOKEN / len(pairs))


def _counted(rows) -> PromptCount:
    characters = sum(len(message["content"]) for row in rows for message in row.messages)
    categories = len({row.category for row in rows})
    return PromptCount(len(rows), characters / CHARACTERS_A_TOKEN / max(len(rows), 1), categories)


def _tokens(few_shots) -> int:
    characters = sum(len(str(value)) for shot in few_shots for value in vars(shot).values())
    return round(characters / CHARACTERS_A_TOKEN)
