"""PPO at 7B, from an SL-CAI checkpoint and a reward model: 512 rollouts of 512 + 512 tokens an update."""

from cai_jax import config as c
from cai_jax import recipes


def config() -> c.Config:
    return c.Config(
        description="PPO on Mistral-7B-Instruct from the SL-CAI and reward models of cai_7b",
        stages=("ppo",),
        model=recipes.mistral_7b(),
        # Four chips share a copy of the rollout weights: on every chip they would leave no room for the cache.
        mesh=c.Mesh(data=1, fsdp=-1, tensor=4),
        sampler=recipes.rollouts(),
        ppo=recipes.ppo(
            policy="runs/cai_7b/sft/model",
            reward_model="runs/cai_7b/reward_model/model",
            learning_rate=1e-6,
            microbatches=8,
        ),
    )
