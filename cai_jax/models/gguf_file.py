"""A GGUF file as keys and tensors. The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

from functools import cached_property
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from cai_jax.errors import UserError

_REQUIRED = object()
# The usual ones among those that `dequantize` knows.
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


class GgufFile:
    """An open file; what is wrong with it is a UserError that names it."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as stream:
                magic = stream.read(4)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        if magic != b"GGUF":
            self.fail("is not a GGUF file; name a file that starts with the letters GGUF")
        try:
            reader = GGUFReader(path)
        # The reader slices a memory map: past the end it finds arrays that are too short, in many ways.
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            reason = " ".join(str(error).split())
            self.fail(f"is cut off or damaged ({reason}); download it again")
        if reader.byte_order != "I":
            self.fail("is big-endian; convert it to little-endian with llama.cpp's gguf_convert_endian.py")
        self.fields = reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def fail(self, message: str):
        raise UserError(f"{self.path}: {message}")

    def get(self, key: str, default=_REQUIRED):
        """The value of a key; without a default the file must have it."""
        field = self.fields.get(key)
        if field is None and default is _REQUIRED:
            self.fail(f"lacks the key '{key}'; use a complete file")
        try:
            return default if field is None else field.contents()
        except UnicodeDecodeError:
            self.fail(f"the key '{key}' is not UTF-8; download the file again")

    def size(self, key: str, default=_REQUIRED) -> int:
        """A whole number above 0."""
        value = self.get(key, default)
        if not isinstance(value, int) or value < 1:
            self.fail(
                f"{key} is {value}, not a whole number above 0; use a sound file "
                "(values that differ by layer are not supported)"
            )
        return value

    def supports(self, what: str, value, supported: tuple) -> None:
        """Fail where a value is none of those that are supported."""
        if value not in supported:
            self.fail(f"{what} '{value}' is not supported; supported: {', '.join(map(str, supported))}")

    @cached_property
    def tokens(self) -> list[str]:
        return self.get("tokenizer.ggml.tokens")

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of bos, eos, pad and unk, as far as the file names them."""
        vocab, named = len(self.tokens), {}
        for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
            number = self.get(f"tokenizer.ggml.{key}_token_id", None)
            if number is not None:
                if not 0 <= number < vocab:
                    self.fail(f"its {key} token {number} is not one of its {vocab} tokens; use a sound file")
                named[name] = number
        return named

    def float32(self, name: str) -> np.ndarray:
        """A tensor, dequantised."""
        tensor = self.tensors[name]
        try:
            return dequantize(tensor.data, tensor.tensor_type).astype("<f4", copy=False)
        except NotImplementedError:
            self.fail(
                f"tensor '{name}' is of type {tensor.tensor_type.name}, which is not supported; "
                f"use a file with {', '.join(TYPES)}"
            )
