"""PPO at 7B, from an SL-CAI checkpoint and a reward model: 512 rollouts of 512 + 512 tokens an update."""

from cai_jax import config as c


def config() -> c.Config:
    return c.Config(
        description="PPO on Mistral-7B-Instruct from the SL-CAI and reward models of cai_7b",
        stages=("ppo",),
        model=c.Model("mistralai/Mistral-7B-Instruct-v0.3", compute_dtype="bfloat16", remat="full"),
        # Four chips share a copy of the rollout weights: on every chip they would leave no room for the cache.
        mesh=c.Mesh(data=1, fsdp=-1, tensor=4),
        sampler=c.Sampler(rows=512, max_length=1024, prefill_tokens=8192),
        ppo=c.Ppo(
            policy="runs/cai_7b/sft/model",
            reward_model="runs/cai_7b/reward_model/model",
            updates=200,
            rollouts=512,
            epochs=1,
            minibatches=4,
            microbatches=8,
            max_prompt_tokens=512,
            response=c.Sampling(max_new_tokens=512),
        ),
    )
