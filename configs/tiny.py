"""Every stage in seconds on a CPU, with a random model: for tests, and to see the shape of a run."""

from cai_jax import config as c


def config() -> c.Config:
    few_tokens = c.Sampling(max_new_tokens=8)
    # Steps large enough that a model of random weights visibly changes.
    optimizer = c.Optimizer(learning_rate=1e-3, schedule="constant", warmup_fraction=0.0)
    return c.Config(
        description="every stage with a tiny random model, in seconds on a CPU",
        model=c.Model("random:llama"),
        constitution="verifiable",
        prompts=c.Prompts(
            red_team=c.PromptSet("shipped:red_team", split="train", limit=4),
            helpful=c.PromptSet("shipped:helpful", split="train", limit=4),
            eval_red_team=c.PromptSet("shipped:red_team", split="eval", limit=2),
            eval_helpful=c.PromptSet("shipped:helpful", split="eval", limit=2),
            eval_look_alike=c.PromptSet("shipped:look_alike", split="eval", limit=2),
        ),
        sampler=c.Sampler(rows=8, max_length=1024),
        critique_revision=c.CritiqueRevision(
            rounds=2,
            response=few_tokens,
            critique=c.Sampling(max_new_tokens=4),
            revision=few_tokens,
            rows_per_shard=2,
        ),
        sft=c.Sft(
            drop=(),  # all that a random model writes is degenerate
            epochs=3,
            batch_size=2,
            sequence_length=256,
            helpful=few_tokens,
            rows_per_shard=2,
            optimizer=optimizer,
            checkpoint_every=2,
        ),
        preferences=c.Preferences(response=few_tokens, rows_per_shard=2),
        reward_model=c.RewardModel(
            epochs=2, batch_size=2, max_length=256, held_out=0.25, optimizer=optimizer, checkpoint_every=2
        ),
        ppo=c.Ppo(
            updates=2,
            rollouts=4,
            max_prompt_tokens=256,
            response=few_tokens,
            optimizer=optimizer,
            checkpoint_every=1,
        ),
        dpo=c.Dpo(
            epochs=2,
            batch_size=2,
            max_length=256,
            held_out=0.25,
            rows_per_shard=2,
            optimizer=optimizer,
            checkpoint_every=1,
        ),
        best_of_n=c.BestOfN(
            n=3,
            response=few_tokens,
            rows_per_shard=2,
            batch_size=2,
            sequence_length=256,
            optimizer=optimizer,
            checkpoint_every=1,
        ),
        grpo=c.Grpo(
            updates=2,
            rollouts=4,
            group=2,
            max_prompt_tokens=256,
            response=few_tokens,
            optimizer=optimizer,
            checkpoint_every=1,
        ),
        evaluate=c.Evaluate(response=c.Sampling(temperature=0.0, max_new_tokens=8), rows_per_shard=4),
    )
