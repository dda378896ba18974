"""The demo: the whole of Constitutional AI on SmolLM2-135M-Instruct, on two CPU cores."""

from cai_jax import config as c


def config() -> c.Config:
    # Whether to decline is settled in an answer's first words, so that short answers do; those that anchor are to be
    # the model's own, hence temperature 1, less the tail of broken text.
    answer = c.Sampling(temperature=1.0, top_p=0.95, max_new_tokens=16)
    revision = c.Sampling(temperature=0.5, max_new_tokens=32)
    rollout = c.Sampling(temperature=1.0, max_new_tokens=16)
    return c.Config(
        description="the demo: all stages on SmolLM2-135M-Instruct, 15 to 25 minutes on two CPU cores",
        model=c.Model(str(c.cache_folder() / "SmolLM2-135M-Instruct")),
        lora=c.Lora(rank=32, alpha=32.0),
        stages=("critique_revision", "sft", "judge", "preferences", "reward_model", "ppo", "evaluate"),
        prompts=c.Prompts(
            red_team=c.PromptSet("shipped:red_team", split="train", limit=96),
            helpful=c.PromptSet("shipped:helpful", split="train", limit=192, more=("shipped:look_alike:train",)),
            eval_red_team=c.PromptSet("shipped:red_team", split="eval", limit=16),
            eval_helpful=c.PromptSet("shipped:helpful", split="eval", limit=16),
            eval_look_alike=c.PromptSet("shipped:look_alike", split="eval", limit=16),
        ),
        sampler=c.Sampler(rows=24, max_length=1792),
        # A model this small takes up the form of the worked revisions more often where no critique stands between, and
        # what it writes after its first sentence is noise (docs/results.md).
        critique_revision=c.CritiqueRevision(
            rounds=1, critiques=False, draws=2, sentences=1, principles="matched", response=answer, revision=revision,
            rows_per_shard=48,
        ),
        # Anchored to what the model would say to safe prompts, adapters may learn fast and forget little. The anchor is
        # heavy, as an answer has many beginnings and a refusal one.
        sft=c.Sft(
            least_ratio=0.8, epochs=2, batch_size=4, sequence_length=256, share_start=True, anchor=4.0, helpful=answer,
            rows_per_shard=48, optimizer=c.Optimizer(learning_rate=2e-3), checkpoint_every=10,
        ),
        # The one labeler of a judge this small that beats a coin (docs/learning.md). Where another machine's rounding
        # puts it below the gate the demo goes on all the same, and the report says so first.
        judge=c.Judge(on_failure="continue", pleas=4),
        # Of two answers that both decline, or both comply, this judge cannot tell the better one, and is unsure.
        preferences=c.Preferences(
            labelers=("examples",), matched=True, response=rollout, filters=c.Filters(least_confidence=0.9),
            rows_per_shard=48,
        ),
        reward_model=c.RewardModel(
            batch_size=8, max_length=160, optimizer=c.Optimizer(learning_rate=5e-4), checkpoint_every=5
        ),
        # Rollouts are cut short on purpose: a penalty for that would pay for refusals, which are short.
        ppo=c.Ppo(
            value_trunk="shared", updates=4, rollouts=24, epochs=1, minibatches=2, max_prompt_tokens=64,
            response=rollout, kl_coef=0.05, missing_eos_penalty=0.0, normalise_scores=True,
            checkpoint_every=2, optimizer=c.Optimizer(learning_rate=3e-4, schedule="linear", eps=1e-5),
        ),
        checkpoints=c.Checkpoints(export="frontier"),
        monitor=c.Monitor(every=2, probes=8, response=c.Sampling(temperature=0.0, max_new_tokens=32)),
        evaluate=c.Evaluate(response=c.Sampling(temperature=0.0, max_new_tokens=32), rows_per_shard=48),
    )  # fmt: skip
