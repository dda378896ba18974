"""The inputs of the selected stages, checked before any compute is spent and before `--fresh` throws anything away."""

from pathlib import Path

from cai_jax.chat import encode_chat, turn_end_id
from cai_jax.config import Config
from cai_jax.conversation_sets import OWN, Conversations, load_conversations, parse_mixer
from cai_jax.errors import UserError
from cai_jax.models.pretrained import ModelInfo, check_model, written_ids
from cai_jax.prompt_sets import PromptRows, check_disjoint, load_prompts, with_unique_ids
from cai_jax.prompts import resolve_options
from cai_jax.provenance import StageFolder

# The stages that each stage reads, and the config field that names a model folder in their place.
INPUTS = {
    "red_team": {},
    "critique_revision": {},
    "sft": {"critique_revision": ""},
    "preferences": {"sft": "policy"},
    "reward_model": {"preferences": "", "sft": "start"},
    "ppo": {"sft": "policy", "reward_model": "reward_model"},
    "evaluate": {"sft": "sft", "reward_model": "reward_model", "ppo": "rl"},
}
HELPERS = {"red_team": ("writer", "target"), "preferences": ("judge",)}  # fields that name models beside those
COMPARES_WHAT_THERE_IS = ("evaluate",)
_KINDS = {"sft": "policy", "reward_model": "reward", "ppo": "policy"}  # of the models that stages leave
_TRAIN_SETS = ("red_team", "helpful")
EVAL_SETS = ("eval_red_team", "eval_helpful", "eval_look_alike")


def sources(config: Config, stage: str) -> dict[str, str]:
    """The INPUTS of a stage under a config: an SFT on other sets alone reads no revisions."""
    if stage == "sft" and "revisions" not in parse_mixer(config.sft.mixer):
        return {}
    return INPUTS[stage]


def override_of(config: Config, stage: str, source: str) -> str:
    """The model that the config puts in the place of a source stage; "": none."""
    name = INPUTS[stage][source]
    return getattr(getattr(config, stage), name) if name else ""


def read_prompts(config: Config) -> dict[str, PromptRows]:
    """All sets of a run, whatever its stages: what is evaluated in one command may have been trained on in another.

    Raises UserError for a set that cannot be read, and for a prompt on both sides.
    """

    def read(names):
        return with_unique_ids({name: load_prompts(getattr(config.prompts, name), name) for name in names})

    train, evaluation = read(_TRAIN_SETS), read(EVAL_SETS)
    check_disjoint(train, evaluation)
    return train | evaluation


def read_mixed(config: Config, prompts: dict[str, PromptRows]) -> dict[str, Conversations]:
    """The sets of conversations that the SFT of this command mixes in, by their source; none without that stage."""
    if "sft" not in config.stages:
        return {}
    evaluation = {name: prompts[name] for name in EVAL_SETS}
    return {s: load_conversations(s, evaluation) for s in parse_mixer(config.sft.mixer) if s not in OWN}


def check_models(config: Config, run_dir: Path) -> None:
    """Raise UserError for a model or an earlier stage that a selected stage needs and cannot use.

    Reads configs, tokenizers and the shapes of tensors, no weights.
    """
    named = [getattr(getattr(config, stage), role) for stage in HELPERS for role in HELPERS[stage]]
    for source in filter(None, (config.model.source, *named)):
        _check_apart(config, run_dir, source)
    base = check_model(config.model.source, "policy")
    _check_tokenizer(base)
    made = dict.fromkeys(("red_team", "critique_revision", "preferences")) | {"sft": base}  # what stages will leave
    for stage in config.stages:
        models = {source: _input(config, run_dir, stage, source, made) for source in sources(config, stage)}
        if stage in ("reward_model", "ppo"):
            made[stage] = models["sft"]
        if check := _CHECKS.get(stage):
            check(config, base, models)


def _input(config: Config, run_dir: Path, stage: str, source: str, made: dict) -> ModelInfo | None:
    """The model that a stage takes from a source; None where that leaves no model, or there is none to compare."""
    kind, is_start = _KINDS.get(source), stage == "reward_model"  # which starts from a policy or a reward model
    if override := override_of(config, stage, source):
        _check_apart(config, run_dir, override)
        model = check_model(override, "reward" if is_start else kind, new_head=is_start)
    elif source in config.stages:
        return made[source]
    elif StageFolder(run_dir, source).done() is not None:
        if kind is None:
            return None
        model = check_model(run_dir / source / "model", kind)
    elif stage in COMPARES_WHAT_THERE_IS:
        return None
    else:
        name = INPUTS[stage][source]
        raise UserError(
            f"{run_dir}: stage {stage} needs the artifacts of stage {source}, which are not there: "
            f"run --stages={source} first" + (f", or set {stage}.{name} to a model folder" if name else "")
        )
    _check_tokenizer(model, encodes=kind == "policy")
    return model


def _check_apart(config: Config, run_dir: Path, source: str) -> None:
    """A model that is named must not be one that the command itself replaces, or `--fresh` throws away."""
    for stage in config.stages:
        if Path(source).expanduser().resolve().is_relative_to((run_dir / stage).resolve()):
            raise UserError(f"{source}: is what stage {stage} of this command makes; name a copy of it elsewhere")


def _check_tokenizer(model: ModelInfo, encodes: bool = True) -> None:
    """A tokenizer is there; in a model that conversations are encoded for, it has a template and an end of turn."""
    if model.tokenizer is None:
        raise UserError(f"{model.source}: has no tokenizer; put the tokenizer files into the model folder")
    if encodes:
        encode_chat(model.tokenizer, [{"role": "user", "content": "Hello"}])
        turn_end_id(model.tokenizer)


def _check_same_ids(writer: ModelInfo, reader: ModelInfo) -> None:
    """What one model writes as token ids must mean the same to the model that reads them."""
    theirs = reader.tokenizer.get_vocab()
    for token, number in written_ids(writer.tokenizer).items():
        if theirs.get(token) != number:
            raise UserError(
                f"{reader.source}: its tokenizer is not that of {writer.source}, whose tokens it is given "
                f"({token!r} is {number} there and {theirs.get(token, 'nothing')} here): take models of one tokenizer"
            )


def _check_length(name: str, length: int, model: ModelInfo) -> None:
    if length > model.config.max_position:
        raise UserError(
            f"{name} ({length}) exceeds the {model.config.max_position} positions of {model.source}: lower it"
        )


def _check_red_team(config: Config, base: ModelInfo, models: dict) -> None:
    for source in filter(None, (config.red_team.writer, config.red_team.target)):
        _check_tokenizer(check_model(source, "policy"))


def _check_sft(config: Config, base: ModelInfo, models: dict) -> None:
    _check_length("sft.sequence_length", config.sft.sequence_length, base)


def _check_preferences(config: Config, base: ModelInfo, models: dict) -> None:
    judge = check_model(config.preferences.judge, "policy") if config.preferences.judge else base
    _check_tokenizer(judge)
    resolve_options(judge.tokenizer)


def _check_reward_model(config: Config, base: ModelInfo, models: dict) -> None:
    _check_length("reward_model.max_length", config.reward_model.max_length, models["sft"])
    _check_same_ids(base, models["sft"])


def _check_ppo(config: Config, base: ModelInfo, models: dict) -> None:
    _check_same_ids(models["sft"], models["reward_model"])
    row = config.ppo.max_prompt_tokens + config.ppo.response.max_new_tokens
    longest = min(row, models["sft"].config.max_position)
    _check_length("ppo.max_prompt_tokens + ppo.response.max_new_tokens", longest, models["reward_model"])


def _check_evaluate(config: Config, base: ModelInfo, models: dict) -> None:
    policies = [base, *(models[name] for name in ("sft", "ppo") if models[name])]
    readers = [base, *([models["reward_model"]] if models["reward_model"] else [])]
    for writer in policies:
        for reader in readers:
            _check_same_ids(writer, reader)


_CHECKS = {
    "red_team": _check_red_team,
    "sft": _check_sft,
    "preferences": _check_preferences,
    "reward_model": _check_reward_model,
    "ppo": _check_ppo,
    "evaluate": _check_evaluate,
}
