"""The demo: the whole of Constitutional AI on SmolLM2-135M-Instruct, on two CPU cores."""

from cai_jax import config as c


def config() -> c.Config:
    short = c.Sampling(max_new_tokens=48)
    return c.Config(
        description="the demo: all stages on SmolLM2-135M-Instruct, about 20 minutes on two CPU cores",
        model=c.Model(str(c.cache_folder() / "SmolLM2-135M-Instruct"), compute_dtype="bfloat16"),
        prompts=c.Prompts(
            red_team=c.PromptSet("shipped:red_team", split="train", limit=48),
            helpful=c.PromptSet("shipped:helpful", split="train", limit=48),
            eval_red_team=c.PromptSet("shipped:red_team", split="eval", limit=24),
            eval_helpful=c.PromptSet("shipped:helpful", split="eval", limit=24),
            eval_look_alike=c.PromptSet("shipped:look_alike", split="eval", limit=24),
        ),
        sampler=c.Sampler(rows=16, max_length=1024),
        critique_revision=c.CritiqueRevision(
            rounds=2,
            response=short,
            critique=c.Sampling(max_new_tokens=40),
            revision=short,
            rows_per_shard=16,
        ),
        sft=c.Sft(
            batch_size=4,
            sequence_length=512,
            helpful=short,
            rows_per_shard=16,
            optimizer=c.Optimizer(learning_rate=2e-5),
            checkpoint_every=10,
        ),
        preferences=c.Preferences(response=short, rows_per_shard=16),
        reward_model=c.RewardModel(
            batch_size=8, max_length=256, optimizer=c.Optimizer(learning_rate=2e-5), checkpoint_every=5
        ),
        ppo=c.Ppo(
            updates=6, rollouts=16, epochs=1, max_prompt_tokens=128, response=short, checkpoint_every=2
        ),
        evaluate=c.Evaluate(response=c.Sampling(temperature=0.0, max_new_tokens=48), rows_per_shard=24),
    )
