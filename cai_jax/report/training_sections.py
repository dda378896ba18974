"""Sections of the stages that train: SFT, reward model, PPO."""

from cai_jax.report import plots, verdicts
from cai_jax.report.artifacts import Run
from cai_jax.report.markup import Html, el, facts, paragraph, table
from cai_jax.report.numbers import count, estimate_cell, number, percent, small


def sft(run: Run, titles: dict[str, str]) -> list:
    """Loss, packing and examples of the fine-tuning."""
    stage = run.stages["sft"]
    summary = stage.summary or {}
    examples = summary.get("examples") or {}
    return [
        paragraph(
            "The base model is fine-tuned on the revisions of every round, and on its own answers to helpful"
            " prompts so that it does not unlearn being helpful. The loss counts the answer's tokens only."
        ),
        facts(
            [
                ("revisions", count(examples.get("revisions"))),
                ("helpful answers", count(examples.get("helpful"))),
                *((name, count(n)) for name, n in examples.items() if name not in ("revisions", "helpful")),
                ("steps", count(summary.get("steps"))),
                ("first loss", number(summary.get("first_loss"), 3)),
                ("last loss", number(summary.get("last_loss"), 3)),
                ("packing: real tokens in a batch", percent(summary.get("packing_efficiency"))),
                ("packing: the most that these examples allow", percent(summary.get("packing_limit"))),
            ]
        ),
        el(
            "div",
            plots.curves("sft-loss", "Loss a token, nats", stage.metrics, "step", {"loss": "loss"}),
            plots.curves(
                "sft-rate", "Learning rate", stage.metrics, "step", {"learning_rate": "learning rate"}
            ),
            plots.curves(
                "sft-norm",
                "Gradient norm before clipping",
                stage.metrics,
                "step",
                {"grad_norm": "gradient norm"},
            ),
            class_="figures",
        ),
    ]


RULES = [
    ("reward model", "accuracy"),
    ("rule: the shorter response wins", "shorter_wins_accuracy"),
    ("rule: the longer response wins", "longer_wins_accuracy"),
]


def reward_model(run: Run, titles: dict[str, str]) -> list:
    """Training curves, and what the model is worth on held-out pairs beside rules on length."""
    stage = run.stages["reward_model"]
    summary = stage.summary or {}
    held_out = summary.get("held_out") or {}
    return [
        paragraph(
            "A copy of the SL-CAI model with one scalar output learns to score the answer that the judge"
            " prefers higher (Bradley-Terry loss with soft labels). Some prompts are held out to see what it"
            " has learned."
        ),
        facts(
            [
                ("training pairs", count(summary.get("train_pairs"))),
                ("steps", count(summary.get("steps"))),
                ("first loss", number(summary.get("first_loss"), 3)),
                ("last loss", number(summary.get("last_loss"), 3)),
                ("held-out pairs", count(held_out.get("n"))),
                ("of them ties, which decide nothing", count(held_out.get("ties"))),
                (
                    "scores, mean ± deviation",
                    f"{number(summary.get('score_mean'))} ± {number(summary.get('score_std'))}",
                ),
            ]
        ),
        el("p", verdicts.reward_model(held_out) or "Held-out accuracy: not measured.", class_="verdict"),
        _held_out_table(held_out) if held_out else None,
        paragraph(verdicts.calibration(held_out)) if held_out else None,
        _reward_figures(stage.metrics, held_out),
    ]


def _held_out_table(held_out: dict) -> Html:
    rows = [
        [name, estimate_cell(held_out.get(key), percent), count((held_out.get(key) or {}).get("n"))]
        for name, key in RULES
    ]
    return table(["on held-out pairs", "agrees with the label", "n"], rows)


def _reward_figures(metrics: list[dict], held_out: dict) -> Html:
    return el(
        "div",
        plots.curves("rm-loss", "Loss; 0.693 is a coin toss on hard labels", metrics, "step", {"loss": "loss"}),
        plots.curves(
            "rm-accuracy",
            "Accuracy on the training pairs of a step, ties left out",
            metrics,
            "step",
            {"accuracy": "accuracy"},
            share=True,
        ),
        plots.curves(
            "rm-margin",
            "Margin: how far the two scores of a pair lie apart",
            metrics,
            "step",
            {"margin": "margin"},
        ),
        plots.reliability(
            "rm-reliability",
            "Held-out calibration: predicted probability against the observed share. On the dotted line the two agree",
            held_out.get("calibration_bins") or [],
        ),
        class_="figures",
    )


PPO_PANELS = [
    (
        "score",
        "Score of the reward model, and reward after the KL penalty",
        {"score": "score", "reward": "reward"},
        False,
    ),
    (
        "kl",
        "KL to the SL-CAI model: the estimate in the reward, and k3 as a monitor",
        {"kl": "KL", "kl_k3": "k3"},
        False,
    ),
    ("entropy", "Entropy of the policy, nats a token", {"entropy": "entropy"}, False),
    ("length", "Mean length of a response, tokens", {"length": "length"}, False),
    ("truncated", "Share of responses cut at the token limit", {"truncated_share": "truncated"}, True),
    (
        "clip",
        "Share of tokens where the clip was active",
        {"policy_clip_fraction": "policy", "value_clip_fraction": "value"},
        True,
    ),
    ("approx", "KL of the updated policy to the one that sampled", {"approx_kl": "approx. KL"}, False),
    ("policy-loss", "Policy loss", {"policy_loss": "policy loss"}, False),
    ("value-loss", "Value loss", {"value_loss": "value loss"}, False),
    ("norm", "Gradient norm before clipping", {"grad_norm": "gradient norm"}, False),
]


def ppo(run: Run, titles: dict[str, str]) -> list:
    """One small panel a quantity, over the updates."""
    stage = run.stages["ppo"]
    summary = stage.summary or {}
    first, last = summary.get("first") or {}, summary.get("last") or {}
    keys = [
        ("score", "score"),
        ("reward", "reward"),
        ("KL to SL-CAI", "kl"),
        ("entropy", "entropy"),
        ("length", "length"),
        ("truncated share", "truncated_share"),
    ]
    return [
        paragraph(
            "The SL-CAI model is trained to raise the reward model's score, held near where it started by a"
            f" KL penalty (coefficient {small(run.resolved('ppo.kl_coef'))}). A score that rises while KL"
            " grows fast or entropy falls towards 0 is a warning: the policy may be gaming the score."
        ),
        facts([("updates", count(summary.get("updates"))), ("rollouts", count(summary.get("rollouts")))]),
        (
            table(
                ["", "first update", "last update"],
                [[label, small(first.get(key)), small(last.get(key))] for label, key in keys],
            )
            if first and last
            else None
        ),
        el(
            "div",
            [
                plots.curves(f"ppo-{name}", caption, stage.metrics, "update", metrics, share)
                for name, caption, metrics, share in PPO_PANELS
            ],
            class_="figures",
        ),
    ]
