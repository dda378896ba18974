import json

import pytest

from cai_jax.errors import UserError
from cai_jax.models.families import tiny_hf_config
from cai_jax.models.flops import parameters
from cai_jax.models.known_shapes import known_shape, shape_of

# As their pages on the hub say.
PUBLISHED = {
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Meta-Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_shapes_have_the_published_number_of_parameters(name):
    assert parameters(known_shape(name)) == PUBLISHED[name]


def test_a_folder_speaks_for_itself(tmp_path):
    folder = tmp_path / "Mistral-7B-Instruct-v0.3"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_hf_config("qwen2")))
    config, known = shape_of(str(folder))
    assert (config.family, known) == ("qwen2", "its config.json")


def test_a_folder_that_carries_a_known_name(tmp_path):
    config, known = shape_of(str(tmp_path / "SmolLM2-135M-Instruct"))
    assert (config.d_model, known) == (576, "the list of known shapes")


def test_a_folder_that_is_still_to_be_made(tmp_path):
    base, _ = shape_of("random:llama")
    config, known = shape_of(str(tmp_path / "sft" / "model"), base)
    assert config == base and "not there yet" in known


def test_an_unknown_model_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="its shape is not known here; name a folder with its config.json"):
        shape_of(str(tmp_path / "nothing"))
