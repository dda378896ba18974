"""Peer: the sampler of Tunix, plain decoding only. Its Llama ignores rope_theta: other texts, the same work."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from chain import arguments, plain_points, report
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama
from tunix.models.llama3.params import create_model_from_safe_tensors


class Ids:
    """A tokenizer for prompts that are token ids already, written as text."""

    def encode(self, text):
        return [int(number) for number in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def bos_id(self):
        return None

    def eos_id(self):
        return -1

    def pad_id(self):
        return 0  # in no prompt here; the model's own pad token ends every turn and would be masked


def main():
    work, options = arguments()
    config = json.loads(Path(work["model"], "config.json").read_text())
    shape = llama.ModelConfig(
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        head_dim=config["head_dim"],
        num_kv_heads=config["num_key_value_heads"],
        rope_theta=int(config["rope_theta"]),
        norm_eps=config["rms_norm_eps"],
        weight_tying=config["tie_word_embeddings"],
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with mesh:
        model = create_model_from_safe_tensors(work["model"], shape, mesh, dtype=jnp.dtype(options.precision))
        samplers = {}

        def decode(prompts, new_tokens):
            length = len(prompts["ids"][0])
            size = length + max(point["new_tokens"] for point in work["plain"])
            if size not in samplers:
                samplers[size] = Sampler(
                    model, Ids(), CacheConfig(size, shape.num_layers, shape.num_kv_heads, shape.head_dim)
                )
            output = samplers[size](
                [" ".join(map(str, ids)) for ids in prompts["ids"]], max_generation_steps=new_tokens,
                max_prompt_length=length, temperature=1.0, top_p=1.0, seed=0, eos_tokens=[-1],
            )  # fmt: skip
            assert all(len(tokens) == new_tokens for tokens in output.tokens)

        report({"version": f"google-tunix, jax {jax.__version__}"} | plain_points(work, decode))


if __name__ == "__main__":
    main()
