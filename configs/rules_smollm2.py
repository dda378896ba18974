"""Learning from rules whose truth is known: the check of everything behind the labels, on SmolLM2-135M-Instruct."""

from cai_jax import config as c

MODEL = str(c.cache_folder() / "SmolLM2-135M-Instruct")


def config() -> c.Config:
    answer = c.Sampling(temperature=1.0, max_new_tokens=48)
    return c.Config(
        description="labels by exact rules, reward model, PPO, DPO and best-of-n on SmolLM2-135M-Instruct",
        model=c.Model(MODEL, compute_dtype="bfloat16"),
        constitution="verifiable",
        # Rules that the model keeps now and then: what it never does cannot be reinforced.
        principles=("brief", "no_digits"),
        stages=("preferences", "reward_model", "ppo", "dpo", "best_of_n", "evaluate"),
        prompts=c.Prompts(
            eval_red_team=c.PromptSet("shipped:red_team", split="eval", limit=24),
            eval_helpful=c.PromptSet("shipped:helpful", split="eval"),
            eval_look_alike=c.PromptSet("shipped:look_alike", split="eval", limit=24),
        ),
        sampler=c.Sampler(rows=32, max_length=512),
        preferences=c.Preferences(
            policy=MODEL, labelers=("rule",), principles=0, response=answer, pairs_per_prompt=4, rows_per_shard=128
        ),
        reward_model=c.RewardModel(
            start=MODEL, epochs=2, batch_size=16, max_length=256, held_out=0.15,
            optimizer=c.Optimizer(learning_rate=5e-5), checkpoint_every=40,
        ),
        ppo=c.Ppo(
            policy=MODEL, updates=40, rollouts=24, epochs=1, minibatches=2, max_prompt_tokens=64, response=answer,
            kl_coef=0.02, missing_eos_penalty=0.5, checkpoint_every=10,
            optimizer=c.Optimizer(learning_rate=1e-5, schedule="constant", eps=1e-5),
        ),
        monitor=c.Monitor(every=5, probes=16, response=answer, judge="rule", principles="all", kl_budget=30.0),
        dpo=c.Dpo(
            policy=MODEL, batch_size=16, max_length=256, held_out=0.15,
            optimizer=c.Optimizer(learning_rate=1e-5), checkpoint_every=40,
        ),
        best_of_n=c.BestOfN(policy=MODEL, n=8, response=answer),
        evaluate=c.Evaluate(sft=MODEL, response=answer, rows_per_shard=64),
    )  # fmt: skip
