"""Constitutional AI on SmolLM2-135M-Instruct and all shipped prompts: the demo at full size."""

from cai_jax import config as c


def config() -> c.Config:
    # Whether to decline is settled in an answer's first words, so that short answers do; those that anchor are to be
    # the model's own, hence temperature 1, less the tail of broken text.
    answer = c.Sampling(temperature=1.0, top_p=0.95, max_new_tokens=16)
    revision = c.Sampling(temperature=0.5, max_new_tokens=32)
    rollout = c.Sampling(temperature=1.0, max_new_tokens=16)
    return c.Config(
        description="all shipped prompts and DPO beside PPO, SmolLM2-135M-Instruct, hours on two CPU cores",
        model=c.Model(str(c.cache_folder() / "SmolLM2-135M-Instruct"), compute_dtype="bfloat16"),
        lora=c.Lora(rank=32, alpha=32.0),
        stages=("critique_revision", "sft", "judge", "preferences", "reward_model", "ppo", "dpo", "evaluate"),
        prompts=c.Prompts(
            red_team=c.PromptSet("shipped:red_team", split="train", more=("shipped:red_team_more",)),
            helpful=c.PromptSet(
                "shipped:helpful",
                split="train",
                more=("shipped:helpful_more", "shipped:look_alike:train", "shipped:look_alike_more"),
            ),
            eval_look_alike=c.PromptSet("shipped:look_alike", split="eval"),
        ),
        sampler=c.Sampler(rows=32, max_length=2048),
        # A 135M model takes up the form of the worked revisions more often where no critique stands between, and what
        # it writes after its first sentence is noise. The time that more drafts would take goes into more prompts:
        # docs/results.md.
        critique_revision=c.CritiqueRevision(
            rounds=1, critiques=False, sentences=1, principles="matched", response=answer, revision=revision,
            rows_per_shard=64,
        ),
        # The anchor is heavy, as an answer has many beginnings and a refusal one: greedy answers decline long before
        # the model mostly does. What the settings beside these do: docs/results.md.
        sft=c.Sft(
            least_ratio=0.8, epochs=2, batch_size=4, sequence_length=256, share_start=True, anchor=8.0,
            helpful=answer, rows_per_shard=64, optimizer=c.Optimizer(learning_rate=2e-3), checkpoint_every=50,
        ),
        # Of two answers that both decline, or both comply, this judge cannot tell the better one, and is unsure. So
        # they are drawn to differ: a reward model of this size learns the few that do so by chance by heart.
        preferences=c.Preferences(
            labelers=("examples",), matched=True, contrasted=True, share=0.25, rows_per_shard=64,
            response=c.Sampling(temperature=0.8, top_p=0.95, max_new_tokens=16),
            filters=c.Filters(least_confidence=0.9),
        ),
        reward_model=c.RewardModel(
            epochs=2, batch_size=16, max_length=96, optimizer=c.Optimizer(learning_rate=1e-3), checkpoint_every=20
        ),
        # Rollouts are cut short on purpose: a penalty for that would pay for refusals, which are short.
        ppo=c.Ppo(
            value_trunk="shared", updates=24, rollouts=48, epochs=1, minibatches=2, max_prompt_tokens=64,
            red_team_share=0.3, response=rollout, kl_coef=0.05, missing_eos_penalty=0.0, normalise_scores=True,
            checkpoint_every=4, optimizer=c.Optimizer(learning_rate=3e-4, schedule="linear", eps=1e-5),
        ),
        # Without the chosen responses' own likelihood in the loss, both of a pair become less likely (docs/results.md).
        dpo=c.Dpo(
            batch_size=16, max_length=96, nll_coef=1.0, optimizer=c.Optimizer(learning_rate=3e-4), checkpoint_every=20
        ),
        checkpoints=c.Checkpoints(export="last"),
        monitor=c.Monitor(every=4, probes=12, response=c.Sampling(temperature=0.0, max_new_tokens=40)),
        evaluate=c.Evaluate(response=c.Sampling(temperature=0.0, max_new_tokens=32), rows_per_shard=64),
    )  # fmt: skip
