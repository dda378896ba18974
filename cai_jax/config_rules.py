"""What the values of a config may be."""

import math
from dataclasses import fields, is_dataclass

from cai_jax import config as c
from cai_jax.config import STAGES, Config
from cai_jax.conversation_sets import parse_mixer
from cai_jax.errors import UserError, did_you_mean


def validate(config: Config) -> None:
    """Raise a UserError that names the first field at fault; nothing is loaded or computed."""
    _check_fields(config, prefix="")
    _check_stages(config.stages)
    _check_mesh(config.mesh)
    _check_batches(config)
    _check_sampling(config)
    _check_lengths(config)
    parse_mixer(config.sft.mixer)
    if config.lora.rank and config.ppo.frozen_dtype:
        raise UserError(f"ppo.frozen_dtype ({config.ppo.frozen_dtype}) must be empty with lora.rank above 0: policy "
                        "and reference are one copy then; model.dtype=bfloat16 makes that smaller")


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
    for name, section in (("sft", config.sft), ("reward_model", config.reward_model)):
        if section.batch_size % section.microbatches:
            raise UserError(f"{name}.batch_size ({section.batch_size}) must be a multiple of "
                            f"{name}.microbatches ({section.microbatches})")
    ppo = config.ppo
    if ppo.rollouts % (ppo.minibatches * ppo.microbatches):
        raise UserError(f"ppo.rollouts ({ppo.rollouts}) must be a multiple of ppo.minibatches x "
                        f"ppo.microbatches ({ppo.minibatches} x {ppo.microbatches})")


def _check_sampling(config: Config) -> None:
    if config.red_team.request.temperature == 0:
        raise UserError("red_team.request.temperature must be above 0: lists are to differ from draw to draw")
    if config.preferences.response.temperature == 0:
        raise UserError("preferences.response.temperature must be above 0: "
                        "the two responses of a greedy pair are the same")
    # The ratio of PPO compares log-probs of the whole distribution; a filtered rollout comes from another.
    response, whole = config.ppo.response, c.Sampling()
    if response.temperature == 0:
        raise UserError("ppo.response.temperature must be above 0: PPO learns from sampled responses")
    for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
        if getattr(response, name) != getattr(whole, name):
            raise UserError(f"ppo.response.{name} must be {getattr(whole, name)} (off): "
                            "PPO samples from the whole distribution")


def _check_lengths(config: Config) -> None:
    longest = config.sampler.max_length
    samplings = {f"{section}.{part}": getattr(getattr(config, section), part)
                 for section, parts in _SAMPLINGS.items() if section in config.stages for part in parts}
    for name, sampling in samplings.items():
        if sampling.max_new_tokens >= longest:
            raise UserError(f"{name}.max_new_tokens ({sampling.max_new_tokens}) leaves no room for a prompt "
                            f"in sampler.max_length ({longest})")
    row = config.ppo.max_prompt_tokens + config.ppo.response.max_new_tokens
    if "ppo" in config.stages and row > longest:
        raise UserError(f"ppo.max_prompt_tokens + ppo.response.max_new_tokens ({row}) must not exceed "
                        f"sampler.max_length ({longest})")


_SAMPLINGS = {
    "red_team": ("request", "response"),
    "critique_revision": ("response", "critique", "revision"),
    "sft": ("helpful",),
    "preferences": ("response",),
    "ppo": ("response",),
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
_NOT_EMPTY = (lambda value: bool(value.strip())), "a text that is not empty"
_ONE_LINE = (lambda value: bool(value.strip()) and len(value.splitlines()) == 1), "one line of text"
_AXIS = (lambda value: value == -1 or value >= 1), "at least 1, or -1 for whatever is left"
_DTYPE = _one_of("float32", "bfloat16")

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
    c.RedTeam: {
        "draws": _at_least(1),
        "examples": _at_least(1),
        "most_similar": _ABOVE_0_TO_1,
        "keep": _one_of("answer", "margin", "all"),
        "easiest": _ABOVE_0_TO_1,
        "rows_per_shard": _at_least(1),
    },
    c.CritiqueRevision: {"rounds": _at_least(1), "rows_per_shard": _at_least(1)},
    c.Sft: {
        "epochs": _at_least(1),
        "batch_size": _at_least(1),
        "microbatches": _at_least(1),
        "sequence_length": _at_least(2),
        "rows_per_shard": _at_least(1),
        "checkpoint_every": _at_least(1),
    },
    c.Preferences: {"pairs_per_prompt": _at_least(1), "rows_per_shard": _at_least(1)},
    c.RewardModel: {
        "epochs": _at_least(1),
        "batch_size": _at_least(1),
        "microbatches": _at_least(1),
        "max_length": _at_least(2),
        "held_out": _BETWEEN_0_AND_1,
        "center": _at_least(0),
        "checkpoint_every": _at_least(1),
    },
    c.Ppo: {
        "updates": _at_least(1),
        "rollouts": _at_least(1),
        "epochs": _at_least(1),
        "minibatches": _at_least(1),
        "microbatches": _at_least(1),
        "max_prompt_tokens": _at_least(1),
        "kl_coef": _at_least(0),
        "kl_estimator": _one_of("k1", "k2", "k3"),
        "gamma": _FROM_0_TO_1,
        "lam": _FROM_0_TO_1,
        "clip": _POSITIVE,
        "value_clip": _POSITIVE,
        "value_coef": _at_least(0),
        "missing_eos_penalty": _at_least(0),
        "frozen_dtype": ((lambda value: value in ("", "bfloat16", "int8")), "empty (as model.dtype), bfloat16 or int8"),
        "checkpoint_every": _at_least(1),
    },
    c.Checkpoints: {"keep": _at_least(1), "export": _one_of("last", "best")},
    c.Evaluate: {"rows_per_shard": _at_least(1)},
    Config: {
        "description": _ONE_LINE,
        "constitution": _NOT_EMPTY,
        "seed": ((lambda value: 0 <= value < 2**32), "from 0 to 4294967295"),
    },
}
