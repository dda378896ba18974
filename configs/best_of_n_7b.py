"""Best of 16 answers at 7B, from the SL-CAI and reward models of cai_7b, and SFT on the best."""

from cai_jax import config as c


def config() -> c.Config:
    return c.Config(
        description="best of 16 answers of Mistral-7B-Instruct by the reward model of cai_7b, distilled by SFT",
        stages=("best_of_n",),
        model=c.Model("mistralai/Mistral-7B-Instruct-v0.3", compute_dtype="bfloat16", remat="full"),
        # Four chips share a copy of the sampler's weights: on every chip they would leave no room for the cache.
        mesh=c.Mesh(data=1, fsdp=-1, tensor=4),
        sampler=c.Sampler(rows=256, max_length=1024, prefill_tokens=8192),
        best_of_n=c.BestOfN(
            policy="runs/cai_7b/sft/model",
            reward_model="runs/cai_7b/reward_model/model",
            n=16,
            response=c.Sampling(max_new_tokens=512),
            rows_per_shard=256,
            distill=True,
            batch_size=32,
            sequence_length=2048,
        ),
    )
