"""SL-CAI of a 7B model with adapters, on one machine with 8 x H100."""

from cai_jax import config as c
from cai_jax import recipes


def config() -> c.Config:
    return c.Config(
        description="SL-CAI with LoRA on Mistral-7B-Instruct, for one machine with eight H100",
        stages=("critique_revision", "sft"),
        model=recipes.frozen_mistral_7b(),
        mesh=c.Mesh(data=1, fsdp=-1),
        sampler=recipes.conversations(),
        lora=recipes.adapters(),
        critique_revision=recipes.critique_revision(),
        sft=recipes.sft(learning_rate=1e-4),
    )
