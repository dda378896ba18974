"""The whole of Constitutional AI on a 7B model, on TPUs or GPUs."""

from cai_jax import config as c


def config() -> c.Config:
    long = c.Sampling(max_new_tokens=512)
    return c.Config(
        description="all stages on Mistral-7B-Instruct, sharded over every device",
        model=c.Model("mistralai/Mistral-7B-Instruct-v0.3", compute_dtype="bfloat16", remat="full"),
        mesh=c.Mesh(data=1, fsdp=-1, tensor=4),
        sampler=c.Sampler(rows=128, max_length=3072, prefill_tokens=8192),
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
            optimizer=c.Optimizer(learning_rate=1e-5),
            checkpoint_every=50,
        ),
        preferences=c.Preferences(response=long, pairs_per_prompt=4, rows_per_shard=256),
        reward_model=c.RewardModel(batch_size=64, microbatches=2, max_length=1024),
        ppo=c.Ppo(
            updates=200,
            rollouts=512,
            epochs=1,
            minibatches=4,
            microbatches=8,
            max_prompt_tokens=512,
            response=long,
        ),
        # Ten looks at 64 probes; the rating is the base model's, which nothing is trained on.
        monitor=c.Monitor(every=20, response=c.Sampling(temperature=0.0, max_new_tokens=256), kl_budget=50.0),
        checkpoints=c.Checkpoints(export="frontier"),
        evaluate=c.Evaluate(response=c.Sampling(temperature=0.0, max_new_tokens=512), rows_per_shard=256),
    )
