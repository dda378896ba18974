"""A config as plain values, and dotted overrides of its fields, each read as the field's type."""

from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace

from cai_jax.config import Config
from cai_jax.errors import UserError, did_you_mean


def to_dict(config) -> dict:
    """The config as nested plain dicts and lists, ready for JSON."""
    return {
        f.name: to_dict(value) if is_dataclass(value) else list(value) if isinstance(value, tuple) else value
        for f in fields(config)
        for value in [getattr(config, f.name)]
    }


def flatten(config) -> dict:
    """Every field by its dotted name, {"sft.epochs": 1, ...}, in the order of the dataclasses."""
    flat = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            flat.update({f"{f.name}.{name}": inner for name, inner in flatten(value).items()})
        else:
            flat[f.name] = list(value) if isinstance(value, tuple) else value
    return flat


def format_value(value) -> str:
    """A field's value as `apply_overrides` reads it back."""
    if isinstance(value, (list, tuple)):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def apply_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """The config with each "dotted.name=value" set, in order, read as the field's type.

    Raises UserError for an unknown name (with the nearest one) and for a value of the wrong type.
    """
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip()
        if not equals or not name:
            raise UserError(f"--set {override}: write it as name=value, for example --set ppo.kl_coef=0.02")
        if name not in flatten(config):
            raise UserError(_unknown_name(config, name))
        config = _replaced(config, name.split("."), name, text)
    return config


def _replaced(node, path: list[str], name: str, text: str):
    head, *rest = path
    if rest:
        return replace(node, **{head: _replaced(getattr(node, head), rest, name, text)})
    expected = next(f.type for f in fields(node) if f.name == head)
    try:
        return replace(node, **{head: _PARSERS[expected](text)})
    except (KeyError, ValueError):
        raise UserError(f"--set {name}={text}: {name} is {_TYPE_NAMES[expected]}") from None


def _unknown_name(config: Config, name: str) -> str:
    names = list(flatten(config))
    inside = [known for known in names if known.startswith(name + ".")]
    if inside:
        return f"--set {name}: this is a section; set one of its fields, for example {inside[0]}"
    same_end = [known for known in names if known.endswith("." + name)]
    return f"--set {name}: no such field" + did_you_mean(same_end[0] if same_end else name, names)


_PARSERS = {
    str: str,
    int: int,
    float: float,
    bool: lambda text: {"true": True, "false": False}[text.strip().lower()],
    tuple[str, ...]: lambda text: tuple(part.strip() for part in text.split(",") if part.strip()),
}
_TYPE_NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple[str, ...]: "a list of names with commas between",
}
