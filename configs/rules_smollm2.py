"""Learning from rules whose truth is known: the check of everything behind the labels, on SmolLM2-135M-Instruct."""

from cai_jax import config as c

MODEL = str(c.cache_folder() / "SmolLM2-135M-Instruct")


def config() -> c.Config:
    # Long enough that an answer which is cut off has more words than the rule allows.
    answer = c.Sampling(temperature=1.0, max_new_tokens=48)
    # Full-temperature text of a 135M model has words of many tokens that nobody knows; their number is hard to learn.
    readable = c.Sampling(temperature=0.8, top_p=0.95, max_new_tokens=48)
    return c.Config(
        description="labels by exact rules, reward model, PPO, DPO and best-of-n on SmolLM2-135M-Instruct",
        model=c.Model(MODEL, compute_dtype="bfloat16"),
        lora=c.Lora(rank=16),
        constitution="verifiable",
        # A rule that the model keeps now and then, for what it never does cannot be reinforced, and that a reward
        # model can learn from a few hundred pairs.
        principles=("brief",),
        stages=("preferences", "reward_model", "ppo", "dpo", "best_of_n", "evaluate"),
        prompts=c.Prompts(
            red_team=c.PromptSet("shipped:red_team", split="train", limit=90),
            helpful=c.PromptSet("shipped:helpful", split="train", limit=90),
            eval_red_team=c.PromptSet("shipped:red_team", split="eval", limit=24),
            eval_helpful=c.PromptSet("shipped:helpful", split="eval", limit=24),
            eval_look_alike=c.PromptSet("shipped:look_alike", split="eval", limit=24),
        ),
        sampler=c.Sampler(rows=32, max_length=256),
        preferences=c.Preferences(
            policy=MODEL, labelers=("rule",), principles=0, response=readable, responses_per_prompt=6,
            rows_per_shard=45,
        ),
        reward_model=c.RewardModel(
            start=MODEL, epochs=1, batch_size=8, max_length=160,
            optimizer=c.Optimizer(learning_rate=1e-3), checkpoint_every=10,
        ),
        ppo=c.Ppo(
            policy=MODEL, value_trunk="shared", updates=18, rollouts=24, epochs=1, minibatches=3, max_prompt_tokens=56,
            response=answer, kl_coef=0.02, missing_eos_penalty=0.5, checkpoint_every=4,
            optimizer=c.Optimizer(learning_rate=4e-4, schedule="constant", eps=1e-5),
        ),
        # The rule shortens answers on purpose, so their length is no sign that a reward is being cheated.
        monitor=c.Monitor(
            every=4, probes=12, response=answer, judge="rule", principles="all", kl_budget=20.0, length_factor=0.0
        ),
        dpo=c.Dpo(
            policy=MODEL, epochs=1, batch_size=8, max_length=160,
            optimizer=c.Optimizer(learning_rate=2e-4), checkpoint_every=10,
        ),
        best_of_n=c.BestOfN(policy=MODEL, n=4, response=answer),
        evaluate=c.Evaluate(sft=MODEL, response=answer, rows_per_shard=36),
    )  # fmt: skip
