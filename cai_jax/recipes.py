"""Stages as the named runs at 7B have them, whole and with adapters: plain functions, one a part of a Config."""

from cai_jax import config as c

ANSWER = c.Sampling(max_new_tokens=512)


def mistral_7b() -> c.Model:
    """Mistral-7B-Instruct, every parameter trained: float32 state, bfloat16 products."""
    return c.Model("mistralai/Mistral-7B-Instruct-v0.3", compute_dtype="bfloat16", remat="full")


def frozen_mistral_7b() -> c.Model:
    """Mistral-7B-Instruct under adapters, which alone are trained: it stands in bfloat16."""
    return c.Model("mistralai/Mistral-7B-Instruct-v0.3", dtype="bfloat16", compute_dtype="bfloat16", remat="full")


def adapters() -> c.Lora:
    """Adapters on every projection."""
    return c.Lora(rank=64, alpha=128.0)


def conversations() -> c.Sampler:
    """Slots with room for worked examples, a prompt, and the rounds of critique and revision."""
    return c.Sampler(rows=128, max_length=3072, prefill_tokens=8192)


def rollouts() -> c.Sampler:
    """A slot for each rollout of an update: 512 tokens of prompt, 512 of answer."""
    return c.Sampler(rows=512, max_length=1024, prefill_tokens=8192)


def critique_revision() -> c.CritiqueRevision:
    """Four rounds a prompt, as in the paper."""
    return c.CritiqueRevision(
        rounds=4, response=ANSWER, critique=c.Sampling(max_new_tokens=256), revision=ANSWER, rows_per_shard=256
    )


def sft(learning_rate: float) -> c.Sft:
    """Fine-tuning on the revisions of every round and on the model's own helpful answers."""
    return c.Sft(
        batch_size=32,
        sequence_length=2048,
        helpful=ANSWER,
        rows_per_shard=256,
        optimizer=c.Optimizer(learning_rate=learning_rate),
        checkpoint_every=50,
    )


def preferences(policy: str = "") -> c.Preferences:
    """Labels of the six pairs among four responses to a prompt, by the base model."""
    return c.Preferences(policy=policy, response=ANSWER, responses_per_prompt=4, rows_per_shard=256)


def reward_model(learning_rate: float, start: str = "") -> c.RewardModel:
    """Bradley-Terry on the labels."""
    return c.RewardModel(
        start=start,
        batch_size=64,
        microbatches=2,
        max_length=1024,
        optimizer=c.Optimizer(learning_rate=learning_rate),
    )


def ppo(learning_rate: float, microbatches: int, policy: str = "", reward_model: str = "") -> c.Ppo:
    """512 rollouts of 512 + 512 tokens an update, one pass over them in four steps."""
    return c.Ppo(
        policy=policy,
        reward_model=reward_model,
        updates=200,
        rollouts=512,
        epochs=1,
        minibatches=4,
        microbatches=microbatches,
        max_prompt_tokens=512,
        response=ANSWER,
        optimizer=c.Optimizer(learning_rate=learning_rate, schedule="linear", eps=1e-5),
    )


def evaluate() -> c.Evaluate:
    """The likeliest answer to every held-out prompt."""
    return c.Evaluate(response=c.Sampling(temperature=0.0, max_new_tokens=512), rows_per_shard=256)
