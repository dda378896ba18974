"""Preference labels and the reward model at 7B, from the SL-CAI model of cai_7b."""

from cai_jax import config as c
from cai_jax import recipes


def config() -> c.Config:
    sl_cai = "runs/cai_7b/sft/model"
    return c.Config(
        description="AI preference labels and a reward model at 7B, from the SL-CAI model of cai_7b",
        stages=("preferences", "reward_model"),
        model=recipes.mistral_7b(),
        # Two chips share a copy of the sampler's weights: making one on every chip needs more than a v4 has.
        mesh=c.Mesh(data=1, fsdp=-1, tensor=2),
        sampler=recipes.conversations(),
        preferences=recipes.preferences(policy=sl_cai),
        reward_model=recipes.reward_model(learning_rate=1e-5, start=sl_cai),
    )
