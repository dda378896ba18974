"""The inputs of the selected stages, checked before any compute is spent and before `--fresh` throws anything away."""

from functools import partial
from operator import attrgetter
from pathlib import Path

from cai_jax.chat import encode_chat, turn_end_id
from cai_jax.config import Config
from cai_jax.config_rules import REINFORCED, rates_revisions
from cai_jax.constitution import AIMS, Constitution, load_constitution
from cai_jax.conversation_sets import OWN, Conversations, load_conversations, parse_mixer
from cai_jax.endpoint import EXTERNAL
from cai_jax.errors import UserError
from cai_jax.gold import Gold, check_apart, load_gold
from cai_jax.models.pretrained import ModelInfo, check_model, model_hash, written_ids
from cai_jax.prompt_sets import PromptRows, check_disjoint, load_prompts, with_unique_ids
from cai_jax.prompts import resolve_options, resolve_ratings
from cai_jax.run_folder import StageFolder

# The stages that each stage reads, and the config field that names a model folder in their place.
INPUTS = {
    "red_team": {},
    "critique_revision": {},
    "sft": {"critique_revision": ""},
    "judge": {},
    "preferences": {"sft": "policy"},
    "reward_model": {"preferences": "", "sft": "start"},
    "ppo": {"sft": "policy", "reward_model": "reward_model"},
    "dpo": {"preferences": "", "sft": "policy"},
    "best_of_n": {"sft": "policy", "reward_model": "reward_model"},
    "grpo": {"sft": "policy", "reward_model": "reward_model"},
    "evaluate": {
        "sft": "sft", "reward_model": "reward_model", "ppo": "rl", "dpo": "dpo", "best_of_n": "best_of_n",
        "grpo": "grpo",
    },
}  # fmt: skip
# Config fields by which a stage can ask the model at the endpoint.
ASKS = {
    "critique_revision": ("critique_revision.critic", "critique_revision.reviser"),
    "judge": ("preferences.labelers", "judge.also"),
    "preferences": ("preferences.labelers",),
}
HELPERS = {"red_team": ("writer", "target")}  # fields that name models beside those
COMPARES_WHAT_THERE_IS = ("evaluate",)
# Of the models that stages leave.
_KINDS = {
    "sft": "policy", "reward_model": "reward", "ppo": "policy", "dpo": "policy", "best_of_n": "policy",
    "grpo": "policy",
}  # fmt: skip
_TRAIN_SETS = ("red_team", "helpful")
EVAL_SETS = ("eval_red_team", "eval_helpful", "eval_look_alike")


def sources(config: Config, stage: str) -> dict[str, str]:
    """The INPUTS of a stage under a config.

    An SFT on other sets alone reads no revisions; what is rewarded by a judge or a rule has no reward model.
    """
    if stage == "sft" and "revisions" not in parse_mixer(config.sft.mixer):
        return {}
    if stage in REINFORCED and getattr(config, stage).reward != "model":
        return {"sft": "policy"}
    return INPUTS[stage]


def judge_of(config: Config, stage: str) -> str:
    """The model that the config puts in the place of the base model as the judge of a stage; "": none, or no judge."""
    if stage in ("judge", "preferences"):
        return config.preferences.judge
    if stage in REINFORCED and getattr(config, stage).reward in ("judge", "examples"):
        return getattr(config, stage).judge
    return ""


def is_watched(config: Config, stage: str) -> bool:
    """Whether the monitors look at what a stage trains."""
    return stage in REINFORCED and config.monitor.every > 0


def asks_endpoint(config: Config, stage: str) -> str:
    """The config field by which a stage asks the model at the endpoint; "": it does not."""
    if is_watched(config, stage) and config.monitor.judge == EXTERNAL:
        return "monitor.judge"
    return next((name for name in ASKS.get(stage, ()) if EXTERNAL in attrgetter(name)(config)), "")


def labelers_of(config: Config, stage: str) -> tuple[str, ...]:
    """The names of the labelers that a stage asks, if any."""
    also = config.judge.also if stage == "judge" else ()
    return (*config.preferences.labelers, *also) if stage in ("judge", "preferences") else ()


def best_of_n_is_a_model(config: Config) -> bool:
    """Whether the evaluation has a model of best-of-n; else it is a way to answer, and draws n answers itself."""
    return config.best_of_n.distill or bool(config.evaluate.best_of_n)


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


def read_gold(config: Config, constitution: Constitution, prompts: dict[str, PromptRows]) -> Gold | None:
    """The gold pairs of the judge stage, none without it. Raises UserError where a prompt of the run is among them."""
    if "judge" not in config.stages:
        return None
    gold = load_gold(config.judge.gold, constitution)
    check_apart(gold, prompts)
    return gold


def read_mixed(config: Config, prompts: dict[str, PromptRows]) -> dict[str, Conversations]:
    """The sets of conversations that the SFT of this command mixes in, by their source; none without that stage."""
    if "sft" not in config.stages:
        return {}
    evaluation = {name: prompts[name] for name in EVAL_SETS}
    return {s: load_conversations(s, evaluation) for s in parse_mixer(config.sft.mixer) if s not in OWN}


def check_principles(config: Config, constitution: Constitution) -> None:
    """Raise UserError where the constitution does not give what the labelers of a selected stage need."""
    reinforced = [stage for stage in config.stages if stage in REINFORCED]
    rewarded = [f"{stage}.reward" for stage in reinforced if getattr(config, stage).reward == "examples"]
    labelers = {name for stage in config.stages for name in labelers_of(config, stage)}
    asked = labelers | ({"examples"} if rewarded else set())
    if "rule" in asked and not any(principle.check for principle in constitution.principles):
        raise UserError(f"{constitution.path}: no principle has a check, which the labeler rule needs: write one, "
                        "or take rule out of preferences.labelers and judge.also")
    if "examples" in asked and not constitution.critique_few_shots:
        fields = ["preferences.labelers", "judge.also"] if "examples" in labelers else []
        named = " and ".join([*fields, *rewarded])
        raise UserError(f"{constitution.path}: few_shots has no worked critique, and the labeler examples needs some: "
                        f"write them, or take examples out of {named}")
    if _rates_revisions(config) and not constitution.critique_few_shots:
        draws, least = config.critique_revision.draws, config.sft.least_ratio
        raise UserError(f"{constitution.path}: few_shots has no worked critique, by which critique_revision.draws "
                        f"({draws}) and sft.least_ratio ({least:g}) choose: write some, or set them to 1 and 0")
    _check_aims(config, constitution, asked)
    if rewarded and constitution.aims != ("",) and (missing := _without_principle(constitution)):
        raise UserError(f"{constitution.path}: no principle has the aim {missing[0]}, which {rewarded[0]}=examples "
                        "needs: write one, or take another reward")
    if "preferences" not in config.stages:
        return
    count, there = config.preferences.principles, len(constitution.principles)
    if count > there:
        raise UserError(f"preferences.principles ({count}) is more than the {there} of {constitution.path}; "
                        "0 takes all")


def _rates_revisions(config: Config) -> bool:
    return "critique_revision" in config.stages and rates_revisions(config)


def _check_aims(config: Config, constitution: Constitution, asked: set[str]) -> None:
    """Refuse what would show worked examples of one aim, or principles of it, where the other is meant."""
    told = {constitution.principle(shot.principle).aim for shot in constitution.critique_few_shots}
    if ("examples" in asked or _rates_revisions(config)) and (missing := set(constitution.aims) - told):
        names = " or ".join(sorted(aim or "no" for aim in missing))
        raise UserError(f"{constitution.path}: no worked critique has a principle of {names} aim, and others have: "
                        "write one for each aim, or leave aim out of all principles")
    if "preferences" not in config.stages:
        return
    settings = config.preferences
    if settings.contrasted and (missing := [aim for aim in AIMS if aim not in told]):
        raise UserError(f"{constitution.path}: no worked critique has a principle of {' or '.join(missing)} aim, which "
                        "preferences.contrasted needs: write one, or set preferences.contrasted=false")
    if "examples" in settings.labelers and len(told) > 1 and not settings.matched:
        raise UserError("preferences.labelers: examples reads the worked answers of the aim of a pair's principle, and "
                        f"{constitution.path} has {' and '.join(sorted(told))} ones: set preferences.matched=true, so "
                        "that the aim fits the prompt")
    if settings.matched and (missing := _without_principle(constitution)):
        raise UserError(f"{constitution.path}: no principle has the aim {missing[0]}, which preferences.matched needs: "
                        "write one, or set preferences.matched=false")
    if settings.matched and constitution.aims == ("",):
        raise UserError(f"{constitution.path}: no principle has an aim, by which preferences.matched goes: write them, "
                        "or set preferences.matched=false")


def _without_principle(constitution: Constitution) -> list[str]:
    """The aims that no principle has; one that says no aim is of either."""
    return [aim for aim in AIMS if not {aim, ""} & set(constitution.aims)]


def check_models(config: Config, run_dir: Path) -> None:
    """Raise UserError for a model or an earlier stage that a selected stage needs and cannot use.

    Reads configs, tokenizers and the shapes of tensors, no weights.
    """
    named = [getattr(getattr(config, stage), role) for stage in HELPERS for role in HELPERS[stage]]
    named += [judge_of(config, stage) for stage in config.stages]
    watched = [stage for stage in config.stages if is_watched(config, stage)]
    named += [config.monitor.model for _ in watched]
    for source in filter(None, (config.model.source, *named)):
        _check_apart(config, run_dir, source)
    base = check_model(config.model.source, "policy")
    _check_tokenizer(base)
    made = dict.fromkeys(("red_team", "critique_revision", "preferences")) | {"sft": base}  # what stages will leave
    for stage in config.stages:
        models = {source: _input(config, run_dir, stage, source, made) for source in sources(config, stage)}
        if stage in ("reward_model", *REINFORCED, "dpo", "best_of_n"):
            made[stage] = models["sft"]
        if check := _CHECKS.get(stage):
            check(config, base, models)
        if stage in watched:
            _check_monitor(stage, config, base, models)


def _input(config: Config, run_dir: Path, stage: str, source: str, made: dict) -> ModelInfo | None:
    """The model that a stage takes from a source; None where that leaves no model, or there is none to compare."""
    kind, is_start = _KINDS.get(source), stage == "reward_model"  # which starts from a policy or a reward model
    if override := override_of(config, stage, source):
        _check_apart(config, run_dir, override)
        heads = config.reward_model.heads if is_start else 1
        model = check_model(override, "reward" if is_start else kind, is_start, heads)
    elif source == "best_of_n" and not config.best_of_n.distill:
        return None
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


def _check_labelers(stage: str, config: Config, base: ModelInfo, models: dict) -> None:
    if stage == "preferences" and "judge" in config.stages:
        return  # it asks the same model, these labelers among others
    judge = check_model(config.preferences.judge, "policy") if config.preferences.judge else base
    _check_tokenizer(judge)
    names = labelers_of(config, stage)
    if {"options", "thought"} & set(names):
        resolve_options(judge.tokenizer)
    if "rating" in names:
        resolve_ratings(judge.tokenizer)


def _check_reward_model(config: Config, base: ModelInfo, models: dict) -> None:
    _check_length("reward_model.max_length", config.reward_model.max_length, models["sft"])
    _check_same_ids(base, models["sft"])


def _check_rewards(stage: str, config: Config, base: ModelInfo, models: dict) -> None:
    settings = getattr(config, stage)
    if settings.reward == "model":
        _check_same_ids(models["sft"], models["reward_model"])
        row = settings.max_prompt_tokens + settings.response.max_new_tokens
        longest = min(row, models["sft"].config.max_position)
        name = f"{stage}.max_prompt_tokens + {stage}.response.max_new_tokens"
        _check_length(name, longest, models["reward_model"])
    elif settings.reward in ("judge", "examples"):
        judge = check_model(settings.judge, "policy") if settings.judge else base
        _check_tokenizer(judge)
        if settings.reward == "judge":
            resolve_ratings(judge.tokenizer)
    elif not _has_checks(config):
        raise UserError(f"{stage}.reward=rule: no principle of the constitution ({config.constitution}) has a check; "
                        "name one that has, such as verifiable")


def _check_dpo(config: Config, base: ModelInfo, models: dict) -> None:
    _check_length("dpo.max_length", config.dpo.max_length, models["sft"])


def _check_best_of_n(config: Config, base: ModelInfo, models: dict) -> None:
    _check_same_ids(models["sft"], models["reward_model"])
    if config.best_of_n.distill:
        _check_length("best_of_n.sequence_length", config.best_of_n.sequence_length, models["sft"])


def _check_monitor(stage: str, config: Config, base: ModelInfo, models: dict) -> None:
    settings, trained_on = config.monitor, getattr(config, stage)
    if _is_training_reward(stage, config, models):
        raise UserError(f"monitor.judge={settings.judge} is the reward that {stage} trains on ({stage}.reward="
                        f"{trained_on.reward}): an alarm needs a judge that nothing is trained on; take another")
    if settings.judge == "model":
        judge = check_model(settings.model, "reward")
        _check_same_ids(models["sft"], judge)
        row = trained_on.max_prompt_tokens + settings.response.max_new_tokens
        longest = min(row, models["sft"].config.max_position)
        _check_length(f"{stage}.max_prompt_tokens + monitor.response.max_new_tokens", longest, judge)
    elif settings.judge in ("rating", "contrast"):
        judge = check_model(settings.model, "policy") if settings.model else base
        _check_tokenizer(judge)
        if settings.judge == "rating":
            resolve_ratings(judge.tokenizer)
    elif settings.judge == "rule" and not _has_checks(config):
        raise UserError(f"monitor.judge=rule: no principle of the constitution ({config.constitution}) has a check; "
                        "take another judge")


def _is_training_reward(stage: str, config: Config, models: dict) -> bool:
    """Whether the monitors' judge is what the policy is trained on: the same kind, and the same model."""
    settings, trained_on = config.monitor, getattr(config, stage)
    kind = {"judge": "rating"}.get(trained_on.reward, trained_on.reward)
    if settings.judge != kind or kind == "rule":
        return settings.judge == kind
    if kind == "rating":
        return _same_model(settings.model or config.model.source, trained_on.judge or config.model.source)
    made_here = "reward_model" in config.stages and not trained_on.reward_model  # in a folder that _check_apart refuses
    return not made_here and _same_model(settings.model, str(models["reward_model"].source))


def _same_model(one: str, other: str) -> bool:
    return one == other or model_hash(one) == model_hash(other)


def _has_checks(config: Config) -> bool:
    return any(principle.check for principle in load_constitution(config.constitution, config.principles).principles)


def _check_evaluate(config: Config, base: ModelInfo, models: dict) -> None:
    policies = [base, *(model for name, model in models.items() if model and name != "reward_model")]
    readers = [base, *([models["reward_model"]] if models["reward_model"] else [])]
    for writer in policies:
        for reader in readers:
            _check_same_ids(writer, reader)


_CHECKS = {
    "red_team": _check_red_team,
    "sft": _check_sft,
    "judge": partial(_check_labelers, "judge"),
    "preferences": partial(_check_labelers, "preferences"),
    "reward_model": _check_reward_model,
    "ppo": partial(_check_rewards, "ppo"),
    "dpo": _check_dpo,
    "best_of_n": _check_best_of_n,
    "grpo": partial(_check_rewards, "grpo"),
    "evaluate": _check_evaluate,
}
