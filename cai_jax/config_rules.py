"""What the values of a config may be."""

import math
import re
from dataclasses import fields, is_dataclass
from operator import attrgetter
from urllib.parse import urlsplit

from cai_jax import config as c
from cai_jax.config import LABELERS, STAGES, Config
from cai_jax.conversation_sets import parse_mixer
from cai_jax.errors import UserError, did_you_mean


def validate(config: Config) -> None:
    """Raise a UserError that names the first field at fault; nothing is loaded or computed."""
    _check_secrets(config.endpoint)
    _check_fields(config, prefix="")
    _check_stages(config.stages)
    _check_mesh(config.mesh)
    _check_batches(config)
    _check_labelers(config.preferences)
    _check_judge(config)
    _check_sampling(config)
    _check_lengths(config)
    _check_external(config)
    _check_dpo(config.dpo)
    _check_monitor(config)
    parse_mixer(config.sft.mixer)
    for name in REINFORCED:
        frozen_dtype = getattr(config, name).frozen_dtype
        if config.lora.rank and frozen_dtype:
            raise UserError(f"{name}.frozen_dtype ({frozen_dtype}) must be empty with lora.rank above 0: policy and "
                            "reference are one copy then; model.dtype=bfloat16 makes that smaller")
    if config.ppo.kl_target and not config.ppo.kl_coef:
        raise UserError(f"ppo.kl_coef must be above 0 with ppo.kl_target={config.ppo.kl_target}: an adaptive "
                        "coefficient is multiplied, from there on")


def _check_fields(node, prefix: str) -> None:
    for f in fields(node):
        name, value = prefix + f.name, getattr(node, f.name)
        if not _has_type(value, f.type):
            raise UserError(f"{name} must be {_type_name(f.type)}, not {value!r}")
        if is_dataclass(value):
            _check_fields(value, name + ".")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} must be a finite number, not {value}")
        elif isinstance(value, str) and "\0" in value:
            raise UserError(f"{name} holds a zero byte: {value!r}")
        elif f.name in _RULES.get(type(node), {}):
            allowed, rule = _RULES[type(node)][f.name]
            if not allowed(value):
                raise UserError(f"{name} must be {rule}, not {value!r}")


def _has_type(value, expected) -> bool:
    if expected is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if expected == tuple[str, ...]:
        return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    return isinstance(value, expected)


def _type_name(expected) -> str:
    if expected == tuple[str, ...]:
        return "a tuple of str"
    return f"a {expected.__name__}" if is_dataclass(expected) else f"of type {expected.__name__}"


def _check_stages(stages: tuple[str, ...]) -> None:
    if not stages:
        raise UserError(f"stages names no stage; there are {', '.join(STAGES)}")
    for stage in stages:
        if stage not in STAGES:
            raise UserError(f"stages: there is no stage {stage!r}{did_you_mean(stage, STAGES)} "
                            f"(there are {', '.join(STAGES)})")
    in_order = tuple(stage for stage in STAGES if stage in stages)
    if stages != in_order:
        raise UserError(f"stages must be each named once and in their order: {','.join(in_order)}, "
                        f"not {','.join(stages)}")


def _check_mesh(mesh: c.Mesh) -> None:
    if [mesh.data, mesh.fsdp, mesh.tensor].count(-1) > 1:
        raise UserError("mesh: only one of data, fsdp and tensor may be -1 (whatever is left)")


def _check_batches(config: Config) -> None:
    for name in ("sft", "reward_model", "dpo", "best_of_n"):
        section = getattr(config, name)
        if section.batch_size % section.microbatches:
            raise UserError(f"{name}.batch_size ({section.batch_size}) must be a multiple of "
                            f"{name}.microbatches ({section.microbatches})")
    for name in REINFORCED:
        section = getattr(config, name)
        if section.rollouts % (section.minibatches * section.microbatches):
            raise UserError(f"{name}.rollouts ({section.rollouts}) must be a multiple of {name}.minibatches x "
                            f"{name}.microbatches ({section.minibatches} x {section.microbatches})")
    if config.grpo.rollouts % config.grpo.group:
        raise UserError(f"grpo.rollouts ({config.grpo.rollouts}) must be a multiple of grpo.group "
                        f"({config.grpo.group})")


def _check_labelers(settings: c.Preferences) -> None:
    names = settings.labelers
    _check_known("preferences.labelers", names)
    if not names or len(set(names)) < len(names):
        raise UserError(f"preferences.labelers must name some of {', '.join(LABELERS)}, each once, not {names!r}")
    if settings.filters.consistent and settings.orders != "both":
        raise UserError("preferences.filters.consistent needs both orders: set preferences.orders=both")


def _check_judge(config: Config) -> None:
    also = config.judge.also
    _check_known("judge.also", also)
    if len(set(also)) < len(also) or set(also) & set(config.preferences.labelers):
        raise UserError(f"judge.also must name labelers that preferences.labelers does not, each once, not {also!r}")


def _check_known(field: str, names: tuple[str, ...]) -> None:
    for name in names:
        if name not in LABELERS:
            raise UserError(f"{field}: there is no labeler {name!r}{did_you_mean(name, LABELERS)} "
                            f"(there are {', '.join(LABELERS)})")


def _check_sampling(config: Config) -> None:
    if config.red_team.request.temperature == 0:
        raise UserError("red_team.request.temperature must be above 0: lists are to differ from draw to draw")
    if config.preferences.response.temperature == 0:
        raise UserError("preferences.response.temperature must be above 0: "
                        "the two responses of a greedy pair are the same")
    if config.best_of_n.response.temperature == 0:
        raise UserError("best_of_n.response.temperature must be above 0: n greedy answers are the same")
    # The ratio of PPO compares log-probs of the whole distribution; a filtered rollout comes from another.
    for section in REINFORCED:
        response, whole = getattr(config, section).response, c.Sampling()
        if response.temperature == 0:
            raise UserError(f"{section}.response.temperature must be above 0: {section.upper()} learns from sampled "
                            "responses")
        for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
            if getattr(response, name) != getattr(whole, name):
                raise UserError(f"{section}.response.{name} must be {getattr(whole, name)} (off): "
                                f"{section.upper()} samples from the whole distribution")


def _check_dpo(dpo: c.Dpo) -> None:
    if dpo.smoothing and dpo.kind not in ("sigmoid", "robust"):
        raise UserError(f"dpo.smoothing ({dpo.smoothing}) must be 0 with dpo.kind={dpo.kind}: "
                        "only sigmoid and robust have it")
    if dpo.soft_labels and (dpo.kind != "sigmoid" or dpo.smoothing):
        raise UserError("dpo.soft_labels goes with dpo.kind=sigmoid and dpo.smoothing=0: "
                        "each label's probability is its smoothing")


def _check_lengths(config: Config) -> None:
    longest = config.sampler.max_length
    samplings = {f"{section}.{part}": attrgetter(part)(getattr(config, section))
                 for section, parts in _SAMPLINGS.items() if section in config.stages for part in parts}
    for name, sampling in samplings.items():
        if sampling.max_new_tokens >= longest:
            raise UserError(f"{name}.max_new_tokens ({sampling.max_new_tokens}) leaves no room for a prompt "
                            f"in sampler.max_length ({longest})")
    for name in REINFORCED:
        section = getattr(config, name)
        row = section.max_prompt_tokens + section.response.max_new_tokens
        if name in config.stages and row > longest:
            raise UserError(f"{name}.max_prompt_tokens + {name}.response.max_new_tokens ({row}) must not exceed "
                            f"sampler.max_length ({longest})")


def _check_monitor(config: Config) -> None:
    settings, frontier = config.monitor, config.checkpoints.export == "frontier"
    if settings.judge == "model" and not settings.model:
        raise UserError("monitor.judge=model needs monitor.model: the folder of a reward model that is not trained on")
    if settings.judge in ("rule", "external") and settings.model:
        raise UserError(f"monitor.model ({settings.model}) must be empty with monitor.judge={settings.judge}, which "
                        "asks no model of this run")
    if frontier and not settings.every:
        raise UserError("checkpoints.export=frontier needs the monitors: set monitor.every above 0")
    for name in REINFORCED if settings.every else ():
        section = getattr(config, name)
        if name not in config.stages:
            continue
        row = section.max_prompt_tokens + settings.response.max_new_tokens
        if row > config.sampler.max_length:
            raise UserError(f"{name}.max_prompt_tokens + monitor.response.max_new_tokens ({row}) must not exceed "
                            f"sampler.max_length ({config.sampler.max_length})")
        if frontier and section.checkpoint_every % settings.every and settings.every % section.checkpoint_every:
            raise UserError(f"{name}.checkpoint_every ({section.checkpoint_every}) must be a multiple of monitor.every "
                            f"({settings.every}), or the other way round, with checkpoints.export=frontier: a state is "
                            "chosen among those that are both saved and looked at")


REINFORCED = ("ppo", "grpo")  # sections of the stages that learn from rollouts


def _check_secrets(endpoint: c.Endpoint) -> None:
    """Refuse a key in the place of its variable, or inside the address; what was given is not repeated."""
    if not re.fullmatch(r"([A-Z_][A-Z0-9_]*)?", str(endpoint.key_env)):
        raise UserError("endpoint.key_env must be the name of an environment variable in capitals, such as "
                        "OPENAI_API_KEY, never the key itself")
    try:
        url = urlsplit(str(endpoint.base_url))
        plain = url.scheme in ("http", "https") and url.hostname and not (url.username or url.password)
        plain = plain and not (url.query or url.fragment) and (url.port is None or url.port > 0)
    except ValueError:
        plain = False
    if endpoint.base_url and not plain:
        raise UserError("endpoint.base_url must be like https://host:port/v1, without user, password or query")


def _check_external(config: Config) -> None:
    endpoint, settings = config.endpoint, config.critique_revision
    if endpoint.max_cost and not (endpoint.price_read or endpoint.price_written):
        raise UserError(f"endpoint.max_cost ({endpoint.max_cost}) needs endpoint.price_read and endpoint.price_written")
    for who, what in (("critic", "critique"), ("reviser", "revision")):
        if not getattr(settings, who):
            continue
        for name in ("top_k", "min_p", "repetition_penalty"):
            if getattr(getattr(settings, what), name) != getattr(c.Sampling(), name):
                raise UserError(f"critique_revision.{what}.{name} must be {getattr(c.Sampling(), name)} (off): not "
                                f"every endpoint knows it, and critique_revision.{who} is external")


_SAMPLINGS = {
    "red_team": ("request", "response"),
    "critique_revision": ("response", "critique", "revision"),
    "sft": ("helpful",),
    "preferences": ("response", "thought.reasoning"),
    "ppo": ("response",),
    "best_of_n": ("response",),
    "grpo": ("response",),
    "evaluate": ("response",),
}


def _at_least(low):
    return (lambda value: value >= low), f"at least {low}"


def _one_of(*choices):
    return (lambda value: value in choices), "one of " + ", ".join(choices)


_POSITIVE = (lambda value: value > 0), "above 0"
_FROM_0_BELOW_1 = (lambda value: 0 <= value < 1), "from 0 to below 1"
_BETWEEN_0_AND_1 = (lambda value: 0 < value < 1), "between 0 and 1, both left out"
_ABOVE_0_TO_1 = (lambda value: 0 < value <= 1), "above 0 and at most 1"
_FROM_0_TO_1 = (lambda value: 0 <= value <= 1), "from 0 to 1"
_ABOVE_HALF = (lambda value: 0.5 < value <= 1), "above 0.5 and at most 1"
_NOT_EMPTY = (lambda value: bool(value.strip())), "a text that is not empty"
_ONE_LINE = (lambda value: bool(value.strip()) and len(value.splitlines()) == 1), "one line of text"
_AXIS = (lambda value: value == -1 or value >= 1), "at least 1, or -1 for whatever is left"
_OURS_OR_EXTERNAL = (lambda value: value in ("", "external")), "empty (the model itself) or external"
_DTYPE = _one_of("float32", "bfloat16")
_OF_ROLLOUTS = {
    "reward": _one_of("model", "judge", "rule"),
    "principles": _one_of("drawn", "all"),
    "updates": _at_least(1),
    "rollouts": _at_least(1),
    "epochs": _at_least(1),
    "minibatches": _at_least(1),
    "microbatches": _at_least(1),
    "max_update_kl": _at_least(0),
    "max_prompt_tokens": _at_least(1),
    "kl_coef": _at_least(0),
    "clip": _POSITIVE,
    "missing_eos_penalty": _at_least(0),
    "uncertainty_penalty": _at_least(0),
    "frozen_dtype": ((lambda value: value in ("", "bfloat16", "int8")), "empty (as model.dtype), bfloat16 or int8"),
    "checkpoint_every": _at_least(1),
}

_RULES = {
    c.Model: {
        "source": _NOT_EMPTY,
        "dtype": _DTYPE,
        "compute_dtype": _DTYPE,
        "remat": _one_of("none", "dots", "full"),
        "attention": _one_of("auto", "xla", "splash", "cudnn"),
    },
    c.Logging: {"wandb": ((lambda name: not set(name) & set("/\\#?%: ")), "a name without / \\ # ? % : and spaces")},
    c.Mesh: {"data": _AXIS, "fsdp": _AXIS, "tensor": _AXIS},
    c.PromptSet: {"path": _NOT_EMPTY, "prompt": _NOT_EMPTY, "limit": _at_least(0)},
    c.Sampling: {
        "temperature": _at_least(0),
        "top_k": _at_least(0),
        "top_p": _ABOVE_0_TO_1,
        "min_p": _FROM_0_BELOW_1,
        "repetition_penalty": _POSITIVE,
        "max_new_tokens": _at_least(1),
    },
    c.Sampler: {"rows": _at_least(1), "max_length": _at_least(2), "prefill_tokens": _at_least(16)},
    c.Lora: {
        "rank": _at_least(0),
        "alpha": _POSITIVE,
        "targets": (
            (lambda value: 0 < len(value) == len(set(value)) and set(value) <= set(c.PROJECTIONS)),
            "some of " + ", ".join(c.PROJECTIONS) + ", each once",
        ),
    },
    c.Optimizer: {
        "learning_rate": _POSITIVE,
        "schedule": _one_of("cosine", "linear", "constant"),
        "warmup_fraction": _FROM_0_BELOW_1,
        "weight_decay": _at_least(0),
        "b1": _FROM_0_BELOW_1,
        "b2": _FROM_0_BELOW_1,
        "eps": _POSITIVE,
        "clip_norm": _POSITIVE,
    },
    c.Endpoint: {
        "limit_field": _one_of("max_tokens", "max_completion_tokens"),
        "requests_at_once": _at_least(1),
        "requests_per_minute": _at_least(0),
        "timeout": _POSITIVE,
        "retries": _at_least(0),
        "max_requests": _at_least(0),
        "max_tokens_total": _at_least(0),
        "max_cost": _at_least(0),
        "price_read": _at_least(0),
        "price_written": _at_least(0),
        "logprobs": ((lambda value: 0 <= value <= 20), "from 0 to 20"),
        "samples": _at_least(1),
        "verdict_tokens": _at_least(1),
    },
    c.RedTeam: {
        "draws": _at_least(1),
        "examples": _at_least(1),
        "most_similar": _ABOVE_0_TO_1,
        "keep": _one_of("answer", "margin", "all"),
        "easiest": _ABOVE_0_TO_1,
        "rows_per_shard": _at_least(1),
    },
    c.CritiqueRevision: {
        "rounds": _at_least(1), "critic": _OURS_OR_EXTERNAL, "reviser": _OURS_OR_EXTERNAL,
        "rows_per_shard": _at_least(1),
    },  # fmt: skip
    c.Sft: {
        "epochs": _at_least(1),
        "batch_size": _at_least(1),
        "microbatches": _at_least(1),
        "sequence_length": _at_least(2),
        "rows_per_shard": _at_least(1),
        "checkpoint_every": _at_least(1),
    },
    c.Judge: {
        "principles": _one_of("own", "all"),
        "pleas": _at_least(0),
        "minimum_accuracy": ((lambda value: 0.5 <= value < 1), "from 0.5 to below 1"),
        "on_failure": _one_of("stop", "continue"),
    },
    c.Thought: {"most": _ABOVE_HALF},
    c.Contrast: {"scale": _POSITIVE},
    c.Rating: {"scale": _POSITIVE},
    c.Rule: {"probability": _ABOVE_HALF},
    c.Filters: {"least_confidence": ((lambda value: 0.5 <= value < 1), "from 0.5 to below 1")},
    c.Preferences: {
        "principles": _at_least(0),
        "orders": _one_of("both", "first"),
        "pairs_per_prompt": _at_least(1),
        "rows_per_shard": _at_least(1),
    },
    c.RewardModel: {
        "epochs": _at_least(1),
        "batch_size": _at_least(1),
        "microbatches": _at_least(1),
        "max_length": _at_least(2),
        "held_out": _BETWEEN_0_AND_1,
        "heads": _at_least(1),
        "margin": _at_least(0),
        "center": _at_least(0),
        "checkpoint_every": _at_least(1),
    },
    c.Ppo: {
        **_OF_ROLLOUTS,
        "value_trunk": _one_of("separate", "shared"),
        "kl_target": _at_least(0),
        "kl_horizon": _at_least(1),
        "kl_per": _one_of("token", "sequence"),
        "kl_estimator": _one_of("k1", "k2", "k3"),
        "score_clip": _at_least(0),
        "gamma": _FROM_0_TO_1,
        "lam": _FROM_0_TO_1,
        "value_clip": _POSITIVE,
        "value_coef": _at_least(0),
    },
    c.Dpo: {
        "kind": _one_of("sigmoid", "ipo", "hinge", "robust"),
        "beta": _POSITIVE,
        "smoothing": ((lambda value: 0 <= value < 0.5), "from 0 to below 0.5"),
        "epochs": _at_least(1),
        "batch_size": _at_least(1),
        "microbatches": _at_least(1),
        "max_length": _at_least(2),
        "held_out": _BETWEEN_0_AND_1,
        "rows_per_shard": _at_least(1),
        "checkpoint_every": _at_least(1),
    },
    c.BestOfN: {
        "n": _at_least(2),
        "rows_per_shard": _at_least(1),
        "epochs": _at_least(1),
        "batch_size": _at_least(1),
        "microbatches": _at_least(1),
        "sequence_length": _at_least(2),
        "checkpoint_every": _at_least(1),
    },
    c.Grpo: {**_OF_ROLLOUTS, "group": _at_least(2), "length_norm": _one_of("response", "limit")},
    c.Monitor: {
        "every": _at_least(0),
        "probes": _at_least(1),
        "judge": _one_of("rule", "rating", "contrast", "external", "model"),
        "principles": _one_of("drawn", "all"),
        "kl_budget": _at_least(0),
        "refusal_bound": _FROM_0_TO_1,
        "degenerate_bound": _FROM_0_TO_1,
        "length_factor": ((lambda value: value == 0 or value > 1), "above 1, or 0 for any length"),
        "boilerplate_bound": _FROM_0_TO_1,
        "stop": (
            (lambda value: len(value) == len(set(value)) and set(value) <= set(c.ALARMS)),
            "some of " + ", ".join(c.ALARMS) + ", each once",
        ),
        "patience": _at_least(1),
    },
    c.Checkpoints: {"keep": _at_least(1), "export": _one_of("last", "best", "frontier")},
    c.Evaluate: {"rows_per_shard": _at_least(1)},
    Config: {
        "description": _ONE_LINE,
        "constitution": _NOT_EMPTY,
        "seed": ((lambda value: 0 <= value < 2**32), "from 0 to 4294967295"),
    },
}
