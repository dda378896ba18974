"""YAML that people write: read strictly, every mistake in one line with its place."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from cai_jax.errors import UserError


def read_yaml(path: str | Path, as_written: str = ""):
    """The one document of a YAML file as plain dicts, lists and scalars; None for an empty file.

    The value of the top-level key `as_written` stays the text in the file: `version: 1.10`, read as a
    number, would become 1.1. Raises UserError with file and line for what is not UTF-8, not YAML, or has a
    key twice in one mapping (YAML would silently keep the last).
    """
    text = _read(Path(path))
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _refuse_double_keys(root, path)
        _keep_as_written(root, as_written)
        return loader.construct_document(root)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"character U+{error.character:04X} does not belong in a text"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, problem = mark.line + 1, error.problem or error.context
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be read") from None
    raise _at_line(path, line, f"not valid YAML: {problem}")


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _at_line(path, line, "not UTF-8 text; save the file as UTF-8") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, in which a scalar that its type refuses (2024-13-45) is an error with a line."""

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            problem = "this looks like a number or a date but is none; put it in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def _refuse_double_keys(root: yaml.Node, path: str | Path) -> None:
    for mapping in _mapping_nodes(root):
        lines = {}
        for key, _ in mapping.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # the loader itself refuses those that cannot be keys
            line = key.start_mark.line + 1
            first = lines.get(key.value)
            if first is not None:
                raise _at_line(path, line, f"field {key.value} is given twice (first on line {first})")
            lines[key.value] = line


def _mapping_nodes(root: yaml.Node) -> Iterator[yaml.MappingNode]:
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias is the same node again, and may hold itself
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            yield node
            waiting.extend(value for _, value in node.value)


def _keep_as_written(root: yaml.Node, name: str) -> None:
    numbers_and_dates = [f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")]
    if isinstance(root, yaml.MappingNode):
        for key, value in root.value:
            if key.value == name and value.tag in numbers_and_dates:
                value.tag = "tag:yaml.org,2002:str"


def _at_line(path: str | Path, line: int, what: str) -> UserError:
    return UserError(" ".join(f"{path}: line {line}: {what}".split()))
