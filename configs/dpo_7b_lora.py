"""DPO with adapters at 7B on one machine with 8 x H100: policy and reference are one copy in memory."""

from cai_jax import config as c


def config() -> c.Config:
    sl_cai = "runs/cai_7b_lora/sft/model"
    return c.Config(
        description="preference labels and DPO with LoRA on Mistral-7B-Instruct, for one machine with eight H100",
        stages=("preferences", "dpo"),
        model=c.Model("mistralai/Mistral-7B-Instruct-v0.3", dtype="bfloat16", compute_dtype="bfloat16", remat="full"),
        mesh=c.Mesh(data=1, fsdp=-1),
        sampler=c.Sampler(rows=128, max_length=3072, prefill_tokens=8192),
        lora=c.Lora(rank=64, alpha=128.0),
        preferences=c.Preferences(
            policy=sl_cai, response=c.Sampling(max_new_tokens=512), responses_per_prompt=4, rows_per_shard=256
        ),
        dpo=c.Dpo(
            policy=sl_cai, batch_size=64, microbatches=2, max_length=1024, optimizer=c.Optimizer(learning_rate=5e-6)
        ),
    )
