"""SL-CAI of a 7B model with adapters, on one machine with 8 x H100."""

from cai_jax import config as c


def config() -> c.Config:
    long = c.Sampling(max_new_tokens=512)
    return c.Config(
        description="SL-CAI with LoRA on Mistral-7B-Instruct, for one machine with eight H100",
        stages=("critique_revision", "sft"),
        model=c.Model("mistralai/Mistral-7B-Instruct-v0.3", dtype="bfloat16", compute_dtype="bfloat16", remat="full"),
        mesh=c.Mesh(data=1, fsdp=-1),
        sampler=c.Sampler(rows=128, max_length=3072, prefill_tokens=8192),
        lora=c.Lora(rank=64, alpha=128.0),
        critique_revision=c.CritiqueRevision(
            rounds=4,
            response=long,
            critique=c.Sampling(max_new_tokens=256),
            revision=long,
            rows_per_shard=256,
        ),
        sft=c.Sft(
            batch_size=32,
            sequence_length=2048,
            helpful=long,
            rows_per_shard=256,
            optimizer=c.Optimizer(learning_rate=1e-4),
            checkpoint_every=50,
        ),
    )
