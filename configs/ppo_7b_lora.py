"""PPO with adapters at 7B on one machine with 8 x H100: policy and reference are one copy in memory."""

from cai_jax import config as c


def config() -> c.Config:
    return c.Config(
        description="PPO with LoRA on Mistral-7B-Instruct, for one machine with eight H100",
        stages=("ppo",),
        model=c.Model("mistralai/Mistral-7B-Instruct-v0.3", dtype="bfloat16", compute_dtype="bfloat16", remat="full"),
        mesh=c.Mesh(data=1, fsdp=-1),
        sampler=c.Sampler(rows=512, max_length=1024, prefill_tokens=8192),
        lora=c.Lora(rank=64, alpha=128.0),
        ppo=c.Ppo(
            policy="runs/cai_7b_lora/sft/model",
            reward_model="runs/cai_7b_lora/reward_model/model",
            updates=200,
            rollouts=512,
            epochs=1,
            minibatches=4,
            microbatches=4,
            max_prompt_tokens=512,
            response=c.Sampling(max_new_tokens=512),
            optimizer=c.Optimizer(learning_rate=1e-5, schedule="linear", eps=1e-5),
        ),
    )
