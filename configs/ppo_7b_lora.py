"""PPO with adapters at 7B on one machine with 8 x H100: policy and reference are one copy in memory."""

from cai_jax import config as c
from cai_jax import recipes


def config() -> c.Config:
    return c.Config(
        description="PPO with LoRA on Mistral-7B-Instruct, for one machine with eight H100",
        stages=("ppo",),
        model=recipes.frozen_mistral_7b(),
        mesh=c.Mesh(data=1, fsdp=-1),
        sampler=recipes.rollouts(),
        lora=recipes.adapters(),
        ppo=recipes.ppo(
            policy="runs/cai_7b_lora/sft/model",
            reward_model="runs/cai_7b_lora/reward_model/model",
            learning_rate=1e-5,
            microbatches=4,
        ),
    )
