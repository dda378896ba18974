"""Sections of what stands beside PPO on the same data: DPO and best-of-n."""

from cai_jax.report import plots, verdicts
from cai_jax.report.artifacts import Run
from cai_jax.report.markup import Html, el, facts, paragraph, table
from cai_jax.report.numbers import count, estimate, estimate_cell, number, part, percent, small
from cai_jax.report.overview import PLAIN_DRAWS

DPO_RULES = [
    ("policy: the response whose likelihood rose more", "accuracy"),
    ("rule: the shorter response wins", "shorter_wins_accuracy"),
    ("rule: the longer response wins", "longer_wins_accuracy"),
]
DPO_PANELS = [
    ("loss", "Loss; with sigmoid it starts at 0.693, and dpo.nll_coef times the next plot", {"loss": "loss"}, False),
    ("nll", "Negative log-prob of a token of the chosen response, nats", {"nll": "nll"}, False),
    (
        "accuracy",
        "Share of the pairs of a step whose chosen response has the higher reward",
        {"accuracy": "accuracy"},
        True,
    ),
    ("margin", "Margin: reward of the chosen response less that of the rejected one", {"margin": "margin"}, False),
    (
        "rewards",
        "Rewards, beta times the log-ratio to the reference. Below 0: less likely than under it",
        {"chosen_reward": "chosen", "rejected_reward": "rejected"},
        False,
    ),
    ("norm", "Gradient norm before clipping", {"grad_norm": "gradient norm"}, False),
]


def dpo(run: Run, titles: dict[str, str]) -> list:
    """Training curves, and what the policy has learnt on held-out pairs."""
    stage = run.stages["dpo"]
    summary = stage.summary or {}
    held_out = summary.get("held_out") or {}
    return [
        paragraph(
            "The SL-CAI model learns from the labelled pairs without a reward model: it is trained to raise the"
            " likelihood of the response that the judge prefers above that of the other one, each against the"
            f" SL-CAI model as the reference ({_loss_of(run)})."
        ),
        facts(
            [
                ("training pairs", count(summary.get("train_pairs"))),
                ("steps", count(summary.get("steps"))),
                ("first loss", number(summary.get("first_loss"), 3)),
                ("last loss", number(summary.get("last_loss"), 3)),
                ("held-out pairs", count(held_out.get("n"))),
                ("of them ties, which decide nothing", count(held_out.get("ties"))),
                ("held-out loss", estimate(held_out.get("loss"), number)),
                ("held-out margin", estimate(held_out.get("margin"), number)),
                ("change of a chosen token's negative log-prob", estimate(held_out.get("nll_change"), number)),
            ]
        ),
        el("p", verdicts.dpo(held_out) or "Held-out accuracy: not measured.", class_="verdict"),
        _dpo_table(held_out) if held_out else None,
        paragraph(_moved(run, held_out)) if held_out else None,
        el(
            "div",
            [
                plots.curves(f"dpo-{name}", caption, stage.metrics, "step", metrics, share)
                for name, caption, metrics, share in DPO_PANELS
            ],
            class_="figures",
        ),
    ]


def _loss_of(run: Run) -> str:
    soft = ", soft labels" if run.resolved("dpo.soft_labels") else ""
    smoothing = run.resolved("dpo.smoothing")
    smoothed = f", smoothing {small(smoothing)}" if smoothing else ""
    coef = run.resolved("dpo.nll_coef")
    held = f", with {small(coef)} times the negative log-prob of a chosen token" if coef else ""
    kind, beta = run.resolved("dpo.kind", "not recorded"), small(run.resolved("dpo.beta"))
    return f"loss {kind}, beta {beta}{smoothed}{soft}{held}"


def _dpo_table(held_out: dict) -> Html:
    rows = [
        [name, estimate_cell(held_out.get(key), percent), count(part(held_out.get(key), "n"))]
        for name, key in DPO_RULES
    ]
    return table(["on held-out pairs", "agrees with the label", "n"], rows)


def _moved(run: Run, held_out: dict) -> str:
    """How far the policy has gone from the reference, and which way."""
    kl = estimate(held_out.get("kl"))
    said = f"Log-prob of a held-out response under the reference less that under the policy: {kl} nats, mean; " + (
        "as the SL-CAI model wrote these responses, that estimates the KL of the policy from it, KL(SL-CAI || policy)."
        if _reference_wrote_the_pairs(run)
        else "no estimate of a KL, as the responses are not plain draws of the reference."
    )
    chosen = part(held_out.get("chosen_reward"))
    if chosen is not None and chosen < 0:
        said += (
            " Even the chosen responses have become less likely than under the reference: the margin comes from"
            " the rejected ones, which fell further."
        )
    return said


def _reference_wrote_the_pairs(run: Run) -> bool:
    sampling = run.resolved("preferences.response")
    if not isinstance(sampling, dict) or run.resolved("preferences.policy", "") != run.resolved("dpo.policy", ""):
        return False
    if run.resolved("preferences.contrasted", False):  # they are draws of it with worked answers before the prompt
        return False
    return all(sampling.get(name, plain) == plain for name, plain in PLAIN_DRAWS.items())


def best_of_n(run: Run, titles: dict[str, str]) -> list:
    """The score against the number of answers and the KL that choosing costs."""
    summary = run.stages["best_of_n"].summary or {}
    n, curve = summary.get("n"), summary.get("curve") or []
    lines = [
        {"n": point.get("n"), **{key: part(point.get("score"), key) for key in ("value", "low", "high")}}
        for point in curve
    ]
    return [
        paragraph(
            f"The SL-CAI model answers each prompt {count(n)} times, and the reward model's favourite counts. It takes"
            " no training, and choosing moves the answers away from the model by a KL of at most log n − (n − 1) / n: a"
            " trained policy is worth its training where it reaches a higher score at the same KL."
        ),
        facts(
            [
                ("prompts", count(summary.get("prompts"))),
                ("answers a prompt", count(n)),
                ("KL, at most, nats", number(summary.get("kl_bound"))),
                ("score of the first answer", estimate(summary.get("first"))),
                ("of the best", estimate(summary.get("best"))),
                ("gain", estimate(summary.get("gain"))),
                ("length of an answer, tokens", estimate(summary.get("length"), _tokens)),
                ("of a chosen one", estimate(summary.get("chosen_length"), _tokens)),
            ]
        ),
        paragraph(
            "The score is the reward model's own, which also chooses: that it rises with n proves nothing about"
            " harmlessness or helpfulness. Estimated without bias from all answers to a prompt; intervals over prompts."
        ),
        _curve_table(curve) if curve else None,
        el(
            "div",
            plots.curves(
                "bon-score",
                "Score of the best of n answers, mean over prompts, with its 95% interval",
                lines,
                "n",
                {"value": "score", "low": "low", "high": "high"},
            ),
            _distillation_curve(run),
            class_="figures",
        ),
        _distilled(run, summary.get("distillation")),
    ]


def _tokens(value) -> str:
    return number(value, 0)


def _curve_table(curve: list[dict]) -> Html:
    rows = [
        [count(point.get("n")), number(point.get("kl_bound")), estimate_cell(point.get("score"))] for point in curve
    ]
    return table(["n", "KL, at most, nats", "score of the best"], rows)


def _distillation_curve(run: Run) -> Html:
    return plots.curves(
        "bon-loss", "Distillation: loss a token, nats", run.stages["best_of_n"].metrics, "step", {"loss": "loss"}
    )


def _distilled(run: Run, distillation: dict | None) -> Html | None:
    if not distillation:
        return paragraph("Not distilled: the evaluation draws and chooses anew for its own prompts.")
    return Html(
        paragraph("Distilled: the SL-CAI model was fine-tuned on the best answers; the evaluation has that model.")
        + facts(
            [
                ("examples", count(distillation.get("examples"))),
                ("steps", count(distillation.get("steps"))),
                ("first loss", number(distillation.get("first_loss"), 3)),
                ("last loss", number(distillation.get("last_loss"), 3)),
            ]
        )
    )
