"""The bounds of every field of a config that has some: a test, and the words for it."""

from cai_jax import config as c
from cai_jax.config import Config


def _at_least(low):
    return (lambda value: value >= low), f"at least {low}"


def _one_of(*choices):
    return (lambda value: value in choices), "one of " + ", ".join(choices)


_POSITIVE = (lambda value: value > 0), "above 0"
_FROM_0_BELOW_1 = (lambda value: 0 <= value < 1), "from 0 to below 1"
_BETWEEN_0_AND_1 = (lambda value: 0 < value < 1), "between 0 and 1, both left out"
_ABOVE_0_TO_1 = (lambda value: 0 < value <= 1), "above 0 and at most 1"
_FROM_0_TO_1 = (lambda value: 0 <= value <= 1), "from 0 to 1"
_ABOVE_HALF = (lambda value: 0.5 < value <= 1), "above 0.5 and at most 1"
_NOT_EMPTY = (lambda value: bool(value.strip())), "a text that is not empty"
_ONE_LINE = (lambda value: bool(value.strip()) and len(value.splitlines()) == 1), "one line of text"
_AXIS = (lambda value: value == -1 or value >= 1), "at least 1, or -1 for whatever is left"
_OURS_OR_EXTERNAL = (lambda value: value in ("", "external")), "empty (the model itself) or external"
_DTYPE = _one_of("float32", "bfloat16")
_OF_ROLLOUTS = {
    "reward": _one_of("model", "judge", "examples", "rule"),
    "principles": _one_of("drawn", "all"),
    "updates": _at_least(1),
    "rollouts": _at_least(1),
    "red_team_share": ((lambda value: 0 <= value <= 1), "from 0 to 1"),
    "epochs": _at_least(1),
    "minibatches": _at_least(1),
    "microbatches": _at_least(1),
    "max_update_kl": _at_least(0),
    "max_prompt_tokens": _at_least(1),
    "kl_coef": _at_least(0),
    "clip": _POSITIVE,
    "missing_eos_penalty": _at_least(0),
    "uncertainty_penalty": _at_least(0),
    "frozen_dtype": ((lambda value: value in ("", "bfloat16", "int8")), "empty (as model.dtype), bfloat16 or int8"),
    "checkpoint_every": _at_least(1),
}

BOUNDS = {
    c.Model: {
        "source": _NOT_EMPTY,
        "dtype": _DTYPE,
        "compute_dtype": _DTYPE,
        "remat": _one_of("none", "dots", "full"),
        "attention": _one_of("auto", "xla", "splash", "cudnn"),
    },
    c.Logging: {"wandb": ((lambda name: not set(name) & set("/\\#?%: ")), "a name without / \\ # ? % : and spaces")},
    c.Mesh: {"data": _AXIS, "fsdp": _AXIS, "tensor": _AXIS},
    c.PromptSet: {"path": _NOT_EMPTY, "prompt": _NOT_EMPTY, "limit": _at_least(0)},
    c.Sampling: {
        "temperature": _at_least(0),
        "top_k": _at_least(0),
        "top_p": _ABOVE_0_TO_1,
        "min_p": _FROM_0_BELOW_1,
        "repetition_penalty": _POSITIVE,
        "max_new_tokens": _at_least(1),
    },
    c.Sampler: {"rows": _at_least(1), "max_length": _at_least(2), "prefill_tokens": _at_least(16)},
    c.Lora: {
        "rank": _at_least(0),
        "alpha": _POSITIVE,
        "targets": (
            (lambda value: 0 < len(value) == len(set(value)) and set(value) <= set(c.PROJECTIONS)),
            "some of " + ", ".join(c.PROJECTIONS) + ", each once",
        ),
    },
    c.Optimizer: {
        "learning_rate": _POSITIVE,
        "schedule": _one_of("cosine", "linear", "constant"),
        "warmup_fraction": _FROM_0_BELOW_1,
        "weight_decay": _at_least(0),
        "b1": _FROM_0_BELOW_1,
        "b2": _FROM_0_BELOW_1,
        "eps": _POSITIVE,
        "clip_norm": _POSITIVE,
    },
    c.Endpoint: {
        "limit_field": _one_of("max_tokens", "max_completion_tokens"),
        "requests_at_once": _at_least(1),
        "requests_per_minute": _at_least(0),
        "timeout": _POSITIVE,
        "retries": _at_least(0),
        "max_requests": _at_least(0),
        "max_tokens_total": _at_least(0),
        "max_cost": _at_least(0),
        "price_read": _at_least(0),
        "price_written": _at_least(0),
        "logprobs": ((lambda value: 0 <= value <= 20), "from 0 to 20"),
        "samples": _at_least(1),
        "verdict_tokens": _at_least(1),
    },
    c.RedTeam: {
        "draws": _at_least(1),
        "examples": _at_least(1),
        "most_similar": _ABOVE_0_TO_1,
        "keep": _one_of("answer", "margin", "all"),
        "easiest": _ABOVE_0_TO_1,
        "rows_per_shard": _at_least(1),
    },
    c.CritiqueRevision: {
        "rounds": _at_least(1), "draws": _at_least(1), "sentences": _at_least(0),
        "principles": _one_of("drawn", "matched"),
        "copy_overlap": _ABOVE_0_TO_1, "critic": _OURS_OR_EXTERNAL, "reviser": _OURS_OR_EXTERNAL,
        "rows_per_shard": _at_least(1),
    },  # fmt: skip
    c.Sft: {
        "drop": ((lambda value: set(value) <= set(c.ROUND_FLAGS)), "some of " + ", ".join(c.ROUND_FLAGS)),
        "epochs": _at_least(1),
        "batch_size": _at_least(1),
        "microbatches": _at_least(1),
        "sequence_length": _at_least(2),
        "least_ratio": _at_least(0),
        "anchor": _at_least(0),
        "rows_per_shard": _at_least(1),
        "checkpoint_every": _at_least(1),
    },
    c.Judge: {
        "principles": _one_of("own", "all"),
        "pleas": _at_least(0),
        "minimum_accuracy": ((lambda value: 0.5 <= value < 1), "from 0.5 to below 1"),
        "on_failure": _one_of("stop", "continue"),
    },
    c.Thought: {"most": _ABOVE_HALF},
    c.Contrast: {"scale": _POSITIVE},
    c.Examples: {"scale": _POSITIVE},
    c.Rating: {"scale": _POSITIVE},
    c.Rule: {"probability": _ABOVE_HALF},
    c.Filters: {"least_confidence": ((lambda value: 0.5 <= value < 1), "from 0.5 to below 1")},
    c.Preferences: {
        "principles": _at_least(0),
        "orders": _one_of("both", "first"),
        "share": ((lambda value: 0 < value <= 1), "above 0 and at most 1"),
        "responses_per_prompt": _at_least(2),
        "rows_per_shard": _at_least(1),
    },
    c.RewardModel: {
        "epochs": _at_least(1),
        "batch_size": _at_least(1),
        "microbatches": _at_least(1),
        "max_length": _at_least(2),
        "held_out": _BETWEEN_0_AND_1,
        "heads": _at_least(1),
        "margin": _at_least(0),
        "center": _at_least(0),
        "checkpoint_every": _at_least(1),
    },
    c.Ppo: {
        **_OF_ROLLOUTS,
        "value_trunk": _one_of("separate", "shared"),
        "kl_target": _at_least(0),
        "kl_horizon": _at_least(1),
        "kl_per": _one_of("token", "sequence"),
        "kl_estimator": _one_of("k1", "k2", "k3"),
        "score_clip": _at_least(0),
        "gamma": _FROM_0_TO_1,
        "lam": _FROM_0_TO_1,
        "value_clip": _POSITIVE,
        "value_coef": _at_least(0),
    },
    c.Dpo: {
        "kind": _one_of("sigmoid", "ipo", "hinge", "robust"),
        "beta": _POSITIVE,
        "smoothing": ((lambda value: 0 <= value < 0.5), "from 0 to below 0.5"),
        "nll_coef": _at_least(0),
        "epochs": _at_least(1),
        "batch_size": _at_least(1),
        "microbatches": _at_least(1),
        "max_length": _at_least(2),
        "held_out": _BETWEEN_0_AND_1,
        "rows_per_shard": _at_least(1),
        "checkpoint_every": _at_least(1),
    },
    c.BestOfN: {
        "n": _at_least(2),
        "rows_per_shard": _at_least(1),
        "epochs": _at_least(1),
        "batch_size": _at_least(1),
        "microbatches": _at_least(1),
        "sequence_length": _at_least(2),
        "checkpoint_every": _at_least(1),
    },
    c.Grpo: {**_OF_ROLLOUTS, "group": _at_least(2), "length_norm": _one_of("response", "limit")},
    c.Monitor: {
        "every": _at_least(0),
        "probes": _at_least(1),
        "judge": _one_of("rule", "rating", "contrast", "external", "model"),
        "principles": _one_of("drawn", "all"),
        "kl_budget": _at_least(0),
        "refusal_bound": _FROM_0_TO_1,
        "degenerate_bound": _FROM_0_TO_1,
        "length_factor": ((lambda value: value == 0 or value > 1), "above 1, or 0 for any length"),
        "boilerplate_bound": _FROM_0_TO_1,
        "stop": (
            (lambda value: len(value) == len(set(value)) and set(value) <= set(c.ALARMS)),
            "some of " + ", ".join(c.ALARMS) + ", each once",
        ),
        "patience": _at_least(1),
    },
    c.Checkpoints: {"keep": _at_least(1), "export": _one_of("last", "best", "frontier")},
    c.Evaluate: {"rows_per_shard": _at_least(1)},
    Config: {
        "description": _ONE_LINE,
        "constitution": _NOT_EMPTY,
        "seed": ((lambda value: 0 <= value < 2**32), "from 0 to 4294967295"),
    },
}
