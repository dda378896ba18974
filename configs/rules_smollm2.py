"""Learning from rules whose truth is known: the check of everything behind the labels, on SmolLM2-135M-Instruct."""

from cai_jax import config as c

MODEL = str(c.cache_folder() / "SmolLM2-135M-Instruct")


def config() -> c.Config:
    answer = c.Sampling(temperature=1.0, max_new_tokens=32)
    return c.Config(
        description="labels by exact rules, reward model, PPO, DPO and best-of-n on SmolLM2-135M-Instruct",
        model=c.Model(MODEL, compute_dtype="bfloat16"),
        lora=c.Lora(rank=16),
        constitution="verifiable",
        # A rule that the model breaks now and then, for what it always or never does cannot be reinforced, and that has
        # nothing to do with length: "at most twenty words" is learnt as well by "the shorter response wins".
        principles=("not_of_itself",),
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
            policy=MODEL, labelers=("rule",), principles=0, response=answer, responses_per_prompt=8,
            rows_per_shard=45,
        ),
        reward_model=c.RewardModel(
            start=MODEL, epochs=1, batch_size=16, max_length=128,
            optimizer=c.Optimizer(learning_rate=1e-3), checkpoint_every=40,
        ),
        ppo=c.Ppo(
            policy=MODEL, value_trunk="shared", updates=18, rollouts=24, epochs=1, minibatches=3, max_prompt_tokens=56,
            response=answer, kl_coef=0.02, missing_eos_penalty=0.0, checkpoint_every=4,
            optimizer=c.Optimizer(learning_rate=4e-4, schedule="constant", eps=1e-5),
        ),
        monitor=c.Monitor(every=4, probes=12, response=answer, judge="rule", principles="all", kl_budget=20.0),
        dpo=c.Dpo(
            policy=MODEL, epochs=1, batch_size=16, max_length=128,
            optimizer=c.Optimizer(learning_rate=2e-4), checkpoint_every=10,
        ),
        best_of_n=c.BestOfN(policy=MODEL, n=4, response=answer),
        evaluate=c.Evaluate(sft=MODEL, response=answer, rows_per_shard=36),
    )  # fmt: skip
