"""What a model is, told without its weights: kind, shapes, and a tokenizer whose every token has an embedding."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from cai_jax.errors import UserError
from cai_jax.models import safetensors_files
from cai_jax.models.byte_tokenizer import byte_tokenizer
from cai_jax.models.pretrained import check_model, load_model, save_model, written_ids


@pytest.fixture
def small(tmp_path):
    """A folder with a tokenizer; `retokenize` puts a changed one into it."""
    model = load_model("random:llama")
    save_model(tmp_path / "small", model.config, model.params, model.tokenizer, model.hf_config, "policy")
    return tmp_path / "small"


def retokenize(folder, special="", plain=""):
    tokenizer = byte_tokenizer()
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": [special]})
    if plain:
        tokenizer.add_tokens([plain])
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_check_finds_what_loading_finds_and_reads_no_weights(small, monkeypatch):
    loaded = load_model(small)
    monkeypatch.setattr(safetensors_files.Checkpoint, "read", lambda *_: pytest.fail("weights are read"))
    info = check_model(small)
    assert (info.config, info.kind, info.hf_config) == (loaded.config, "policy", loaded.hf_config)
    assert info.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    assert check_model(small, "reward", new_head=True).kind == "reward"
    with pytest.raises(UserError, match="no score head"):
        check_model(small, "reward")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        check_model("./nowhere")
    assert check_model("random:qwen3", "reward").kind == "reward"
    save_file({"x": np.ones(2, "f4")}, small / "model.safetensors")
    with pytest.raises(UserError, match="'model.embed_tokens.weight' of shape .320, 64. is missing"):
        check_model(small)


def test_a_token_without_an_embedding_is_refused(small):
    """A gather would read the last row in its place."""
    retokenize(small, plain="beyond")
    for check in (check_model, load_model):
        with pytest.raises(UserError, match="'beyond' with id 320, but the model has only 320 embeddings"):
            check(small)


def test_a_special_token_that_no_conversation_holds_needs_no_embedding(small):
    """Gemma 3's tokenizer has one for images behind the embedding of its text models."""
    tokenizer = retokenize(small, special="<image>")
    assert load_model(small).tokenizer.convert_tokens_to_ids("<image>") == 320
    assert tokenizer.get_vocab().keys() - written_ids(tokenizer).keys() == {"<image>", "<|pad|>"}
    tokenizer.chat_template += "<image>"
    tokenizer.save_pretrained(small)
    with pytest.raises(UserError, match="'<image>' with id 320"):
        load_model(small)
