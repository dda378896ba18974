"""SL-CAI of a 7B model: critiques and revisions, then fine-tuning on them."""

from cai_jax import config as c
from cai_jax import recipes


def config() -> c.Config:
    return c.Config(
        description="SL-CAI on Mistral-7B-Instruct: critiques, revisions and fine-tuning on them",
        stages=("critique_revision", "sft"),
        model=recipes.mistral_7b(),
        mesh=c.Mesh(data=1, fsdp=-1),
        sampler=recipes.conversations(),
        critique_revision=recipes.critique_revision(),
        sft=recipes.sft(learning_rate=1e-5),
    )
