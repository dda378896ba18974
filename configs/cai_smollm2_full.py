"""Constitutional AI on SmolLM2-135M-Instruct and all shipped prompts: the demo at full size."""

from cai_jax import config as c


def config() -> c.Config:
    revision = c.Sampling(temperature=0.5, max_new_tokens=48)
    answer = c.Sampling(temperature=0.7, top_p=0.9, max_new_tokens=64)
    rollout = c.Sampling(temperature=1.0, max_new_tokens=40)
    return c.Config(
        description="all shipped prompts and DPO beside PPO, SmolLM2-135M-Instruct, hours on two CPU cores",
        model=c.Model(str(c.cache_folder() / "SmolLM2-135M-Instruct"), compute_dtype="bfloat16"),
        lora=c.Lora(rank=16),
        stages=("critique_revision", "sft", "judge", "preferences", "reward_model", "ppo", "dpo", "evaluate"),
        prompts=c.Prompts(
            helpful=c.PromptSet("shipped:helpful", split="train", more=("shipped:look_alike:train",)),
            eval_look_alike=c.PromptSet("shipped:look_alike", split="eval"),
        ),
        sampler=c.Sampler(rows=32, max_length=2048),
        # A 135M model takes up the form of the worked revisions more often where no critique stands between; and of
        # several drafts the best is far better than one: docs/results.md.
        critique_revision=c.CritiqueRevision(
            rounds=1, critiques=False, draws=8, principles="matched", response=answer, revision=revision,
            rows_per_shard=64,
        ),
        sft=c.Sft(
            epochs=2, batch_size=8, sequence_length=256, helpful=answer, rows_per_shard=64,
            optimizer=c.Optimizer(learning_rate=5e-4), checkpoint_every=20,
        ),
        preferences=c.Preferences(labelers=("examples",), response=rollout, rows_per_shard=64),
        reward_model=c.RewardModel(
            epochs=2, batch_size=16, max_length=192, optimizer=c.Optimizer(learning_rate=1e-3), checkpoint_every=20
        ),
        ppo=c.Ppo(
            value_trunk="shared", updates=24, rollouts=24, epochs=1, minibatches=2, max_prompt_tokens=64,
            response=rollout, kl_coef=0.05, checkpoint_every=4,
            optimizer=c.Optimizer(learning_rate=1e-4, schedule="linear", eps=1e-5),
        ),
        dpo=c.Dpo(
            epochs=1, batch_size=16, max_length=192, optimizer=c.Optimizer(learning_rate=1e-4), checkpoint_every=20
        ),
        checkpoints=c.Checkpoints(export="frontier"),
        monitor=c.Monitor(every=4, probes=12, response=c.Sampling(temperature=0.0, max_new_tokens=40)),
        evaluate=c.Evaluate(response=c.Sampling(temperature=0.0, max_new_tokens=64), rows_per_shard=64),
    )  # fmt: skip
