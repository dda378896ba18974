"""Preference labels and DPO at 7B, from the SL-CAI model of cai_7b: no reward model, no rollouts."""

from cai_jax import config as c


def config() -> c.Config:
    sl_cai = "runs/cai_7b/sft/model"
    return c.Config(
        description="preference labels and DPO on Mistral-7B-Instruct, from the SL-CAI model of cai_7b",
        stages=("preferences", "dpo"),
        model=c.Model("mistralai/Mistral-7B-Instruct-v0.3", compute_dtype="bfloat16", remat="full"),
        # Two chips share a copy of the sampler's weights: making one on every chip needs more than a v4 has.
        mesh=c.Mesh(data=1, fsdp=-1, tensor=2),
        sampler=c.Sampler(rows=128, max_length=3072, prefill_tokens=8192),
        preferences=c.Preferences(
            policy=sl_cai, response=c.Sampling(max_new_tokens=512), responses_per_prompt=4, rows_per_shard=256
        ),
        dpo=c.Dpo(
            policy=sl_cai, batch_size=64, microbatches=2, max_length=1024, optimizer=c.Optimizer(learning_rate=5e-7)
        ),
    )
