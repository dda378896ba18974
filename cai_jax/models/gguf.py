"""A GGUF file becomes a Hugging Face folder: float32 weights, config, tokenizer with its chat template.

    python -m cai_jax.models.gguf FILE.gguf FOLDER

Plain Llama decoders with the byte-level BPE tokenizer of SmolLM and Gemma 3's text models are read; anything else
is refused. Where the file has no chat template the folder has none: put your own there as chat_template.jinja.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from cai_jax.errors import UserError, exit_code
from cai_jax.models.gguf_file import GgufFile
from cai_jax.models.gguf_layouts import Source, layout_of, tensor_sources, token_ids


def convert_gguf(path: str | Path, folder: str | Path) -> Path:
    """Write the model in the GGUF file `path` as a Hugging Face folder, and return the folder.

    The folder appears whole or not at all, with the same bytes every time; one tensor at a time is in memory.
    Raises UserError for a file that is not GGUF, is cut off, lacks a tensor or holds another architecture,
    and for a folder that is already there.
    """
    path, folder = Path(path), Path(folder)
    if _is_taken(folder):
        raise UserError(f"{folder}: is already there; remove it or name another folder")
    file = GgufFile(path)
    layout = layout_of(file)
    config = layout.config(file)
    sources = tensor_sources(file, layout, config)
    tokenizer = layout.tokenizer(file)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as work:
            whole = Path(work) / "model"
            whole.mkdir()
            _write_safetensors(whole / "model.safetensors", sources, file)
            _write_json(whole / "config.json", config)
            _write_json(whole / "generation_config.json", token_ids(file))
            _write_json(whole / "tokenizer_config.json", _tokenizer_config(file, config))
            tokenizer.save(str(whole / "tokenizer.json"))
            _move(whole, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
    return folder


def _is_taken(folder: Path) -> bool:
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def _move(whole: Path, folder: Path) -> None:
    try:
        os.rename(whole, folder)
    except OSError:
        # Another process that converts into the same cache came first; its folder is whole, as this one is.
        if not (folder / "model.safetensors").exists():
            raise


def _write_safetensors(path: Path, sources: dict[str, Source], file: GgufFile) -> None:
    """Tensor by tensor in the safetensors format: length of the header, header as JSON, raw bytes."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, source in sources.items():
        end = offset + 4 * int(np.prod(source.shape))
        header[name] = {"dtype": "F32", "shape": list(source.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        for source in sources.values():
            stream.write(np.ascontiguousarray(source.read(file)))


def _tokenizer_config(file: GgufFile, config: dict) -> dict:
    template = file.get("tokenizer.chat_template", None)
    return {
        # the class that takes tokenizer.json as it is; a model's own class would put its pre-tokenizer back
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        **{f"{name}_token": file.tokens[number] for name, number in file.special_tokens.items()},
        **({"chat_template": template} if template is not None else {}),
    }


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    """The command: 0 done, 2 a mistake that the user can mend, said in one line on stderr."""

    def convert():
        if len(arguments) != 2:
            raise UserError("write python -m cai_jax.models.gguf FILE.gguf FOLDER")
        print(convert_gguf(*arguments))

    return exit_code(convert)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
