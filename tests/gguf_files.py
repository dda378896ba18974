"""GGUF files written for tests, and what a file that cannot be converted must meet."""

import gguf
import pytest

from cai_jax.errors import UserError
from cai_jax.models.gguf import convert_gguf


def write_file(path, architecture, keys, tensors):
    """A GGUF file. `keys` whose value is None are left out; `tensors`: (name, stored array, type)."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, array, kind in tensors:
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(path, *words):
    """The conversion ends in one line with these words and the file's name, and leaves nothing behind."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(UserError) as error:
        convert_gguf(path, path.parent / "folder")
    assert sorted(path.parent.iterdir()) == before
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in (path.name, *words)), message
