"""Sections of the stages that train: SFT, reward model, PPO, GRPO."""

from cai_jax.report import plots, verdicts
from cai_jax.report.artifacts import Run
from cai_jax.report.markup import Html, details, el, facts, paragraph, table
from cai_jax.report.monitor_section import monitor
from cai_jax.report.numbers import count, estimate_cell, known, number, part, percent, small


def _dropped(summary: dict) -> dict[str, int]:
    """How many revisions were left out of the fine-tuning, by the reason."""
    counters = summary.get("counters") or {}
    return {name: times for name, times in counters.items() if name.startswith("dropped/") and known(times)}


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
                ("revisions left out", count(sum(_dropped(summary).values()))),
                ("first loss", number(summary.get("first_loss"), 3)),
                ("last loss", number(summary.get("last_loss"), 3)),
                ("packing: real tokens in a batch", percent(summary.get("packing_efficiency"))),
                ("packing: the most that these examples allow", percent(summary.get("packing_limit"))),
            ]
        ),
        el(
            "div",
            plots.curves(
                "sft-loss", "Nats a token", stage.metrics, "step",
                {"loss": "loss", "anchor_kl": "KL of its own helpful answers to those before"},
            ),
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


ROWS_SHOWN = 40  # of a table by principle or category


def reward_model(run: Run, titles: dict[str, str]) -> list:
    """Training curves, and what the model is worth on held-out pairs beside rules that know nothing of the texts."""
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
                ("heads; their mean is the score", count(summary.get("heads"))),
            ]
        ),
        el("p", verdicts.reward_model(held_out) or "Beside simple rules: not measured.", class_="verdict"),
        _held_out_table(held_out) if held_out else None,
        paragraph(verdicts.calibration(held_out), " ", verdicts.uncertainty(held_out)) if held_out else None,
        _accuracy_by("principle", held_out.get("principles"), titles),
        _accuracy_by("category", held_out.get("categories"), {}),
        _reward_figures(stage.metrics, held_out),
    ]


def _held_out_table(held_out: dict) -> Html:
    named = {"accuracy": "reward model"} | {
        f"{rule}_accuracy": f"rule: {words}" for rule, words in verdicts.RULES.items() if rule != "coin"
    }
    rows = [
        [name, estimate_cell(held_out.get(key), percent), count((held_out.get(key) or {}).get("n"))]
        for key, name in named.items()
    ]
    return table(["on held-out pairs", "agrees with the label", "pairs that it tells apart"], rows)


def _accuracy_by(what: str, found: dict | None, titles: dict[str, str]) -> Html | None:
    """Held-out accuracy under each principle or category, those with most pairs first."""
    if not found:
        return None
    order = sorted(found, key=lambda name: (-(part(found[name], "n") or 0), name))
    rows = [
        [titles.get(name, name or "(none)"), estimate_cell(found[name], percent), count(part(found[name], "n"))]
        for name in order[:ROWS_SHOWN]
    ]
    cut = f"; the {ROWS_SHOWN} with most pairs of {len(order)}" if len(order) > ROWS_SHOWN else ""
    return details(f"Held-out accuracy by {what}{cut}", table([what, "agrees with the label", "n"], rows))


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


SCORED_BY = {
    "judge": "a judge model, which rates each answer from 1 to 10",
    "examples": "a judge model, by how much likelier worked answers of the prompt's aim make each answer",
    "rule": "the checks of the constitution",
}
ROLLOUT_PANELS = [
    ("score", "Score, and reward after the KL penalty", {"score": "score", "reward": "reward"}, False),
    (
        "kl",
        "KL to the SL-CAI model, nats a response: k1, and k3 as a monitor",
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
]
PPO_PANELS = [
    *ROLLOUT_PANELS,
    ("policy-loss", "Policy loss", {"policy_loss": "policy loss"}, False),
    ("value-loss", "Value loss", {"value_loss": "value loss"}, False),
    ("norm", "Gradient norm before clipping", {"grad_norm": "gradient norm"}, False),
    ("coefficient", "Coefficient of the KL penalty", {"kl_coef": "coefficient"}, False),
]
GRPO_PANELS = [
    *ROLLOUT_PANELS,
    (
        "spread",
        "Deviation of the scores within a group; at 0 there is nothing to learn from",
        {"group_deviation": "deviation"},
        False,
    ),
    ("norm", "Gradient norm before clipping", {"grad_norm": "gradient norm"}, False),
]


def ppo(run: Run, titles: dict[str, str]) -> list:
    """One small panel a quantity, over the updates."""
    target = run.resolved("ppo.kl_target")
    penalty = f"coefficient {small(run.resolved('ppo.kl_coef'))}"
    if target:
        penalty = f"its coefficient steers to {small(target)} nats a response"
    text = (
        f"The SL-CAI model is trained to raise the score of {_scorer(run, 'ppo')}, held near where it started by a"
        f" KL penalty ({penalty}). A score that rises while KL grows fast or entropy falls towards 0 is a warning: the"
        " policy may be gaming the score."
    )
    return [paragraph(text), *_rollouts(run, "ppo", PPO_PANELS), *monitor(run, "ppo")]


def grpo(run: Run, titles: dict[str, str]) -> list:
    """The same for GRPO."""
    text = (
        f"{count(run.resolved('grpo.group'))} answers to each prompt are scored by {_scorer(run, 'grpo')}; those above"
        " the mean of their group are made likelier, without a value model. The KL to the SL-CAI model stands in the"
        f" loss (coefficient {small(run.resolved('grpo.kl_coef'))})."
    )
    return [paragraph(text), *_rollouts(run, "grpo", GRPO_PANELS), *monitor(run, "grpo")]


def _scorer(run: Run, stage: str) -> str:
    return SCORED_BY.get(run.resolved(f"{stage}.reward"), "the reward model")


def _rollouts(run: Run, name: str, panels: list) -> list:
    """Counts, first and last update, and a panel a quantity."""
    stage = run.stages[name]
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
        facts(
            [
                ("updates", count(summary.get("updates"))),
                ("rollouts", count(summary.get("rollouts"))),
                *([("stopped", summary["stopped"])] if summary.get("stopped") else []),
            ]
        ),
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
                plots.curves(f"{name}-{part}", caption, stage.metrics, "update", metrics, share)
                for part, caption, metrics, share in panels
            ],
            class_="figures",
        ),
    ]
