"""What the values of a config may be."""

import math
import re
from dataclasses import fields, is_dataclass
from operator import attrgetter
from urllib.parse import urlsplit

from cai_jax import config as c
from cai_jax.config import LABELERS, STAGES, Config
from cai_jax.config_bounds import BOUNDS
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
    _check_sft(config)
    for name in REINFORCED:
        frozen_dtype = getattr(config, name).frozen_dtype
        if config.lora.rank and frozen_dtype:
            raise UserError(f"{name}.frozen_dtype ({frozen_dtype}) must be empty with lora.rank above 0: policy and "
                            "reference are one copy then; model.dtype=bfloat16 makes that smaller")
    if config.ppo.kl_target and not config.ppo.kl_coef:
        raise UserError(f"ppo.kl_coef must be above 0 with ppo.kl_target={config.ppo.kl_target}: an adaptive "
                        "coefficient is multiplied, from there on")


def _check_sft(config: Config) -> None:
    sources = set(parse_mixer(config.sft.mixer))
    if config.sft.anchor and not ("helpful" in sources and len(sources) > 1):
        raise UserError(f"sft.anchor ({config.sft.anchor:g}) holds the model to its own helpful answers while it "
                        "learns others: sft.mixer must have helpful and one more set")


def rates_revisions(config: Config) -> bool:
    """Whether revisions get a log-ratio: where one of several is chosen by it, or `sft.least_ratio` leaves some out."""
    return config.critique_revision.draws > 1 or config.sft.least_ratio > 0


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
        elif f.name in BOUNDS.get(type(node), {}):
            allowed, rule = BOUNDS[type(node)][f.name]
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
    for name, prompts in (("ppo", config.ppo.rollouts), ("grpo", config.grpo.rollouts // config.grpo.group)):
        share = getattr(config, name).red_team_share
        if 0 < share < 1 and not 0 < round(share * prompts) < prompts:
            raise UserError(f"{name}.red_team_share ({share}) leaves one of the sets no prompt of the {prompts} of an "
                            "update: raise the rollouts, or take another share (0 draws by the sizes of the sets)")


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
    if dpo.soft_labels and dpo.nll_coef:
        raise UserError(f"dpo.nll_coef ({dpo.nll_coef:g}) must be 0 with dpo.soft_labels: where a label is unsure, the "
                        "response that is chosen is no better than the other")
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
    if settings.critic and not settings.critiques:
        raise UserError("critique_revision.critic is set, and critique_revision.critiques=false asks for no critiques: "
                        "drop one of them")
    if settings.draws > 1 and settings.reviser:
        raise UserError(f"critique_revision.draws ({settings.draws}) must be 1 where critique_revision.reviser is "
                        "external: one revision is paid for")
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
