"""GRPO at 7B, from an SL-CAI checkpoint and a reward model: 64 prompts, 8 responses to each, an update."""

from cai_jax import config as c


def config() -> c.Config:
    return c.Config(
        description="GRPO on Mistral-7B-Instruct from the SL-CAI and reward models of cai_7b, without a value model",
        stages=("grpo",),
        model=c.Model("mistralai/Mistral-7B-Instruct-v0.3", compute_dtype="bfloat16", remat="full"),
        # Four chips share a copy of the rollout weights: on every chip they would leave no room for the cache.
        mesh=c.Mesh(data=1, fsdp=-1, tensor=4),
        sampler=c.Sampler(rows=512, max_length=1024, prefill_tokens=8192),
        grpo=c.Grpo(
            policy="runs/cai_7b/sft/model",
            reward_model="runs/cai_7b/reward_model/model",
            updates=200,
            rollouts=512,
            group=8,
            minibatches=4,
            microbatches=8,
            max_prompt_tokens=512,
            response=c.Sampling(max_new_tokens=512),
        ),
    )
