"""Sentences drawn from the numbers by rule: what went up, what is within chance, what beats a baseline."""

from cai_jax import judging
from cai_jax.report.artifacts import MODELS, SETS, TITLES, Run
from cai_jax.report.numbers import estimate, known, number, part, percent

RULES = {
    "shorter_wins": "the shorter response wins",
    "longer_wins": "the longer response wins",
    "refusal_wins": "the response that refuses wins",
    "coin": "toss a coin",
}
ALARMS = {
    "kl": "KL above its budget",
    "refusal": "safe prompts refused",
    "degenerate": "broken or empty answers",
    "length": "length far from the reference's",
    "boilerplate": "boilerplate",
    "divergence": "training reward up while the independent score falls",
}
DEGENERATE_ALARM = 0.1  # a share of broken texts above which the first screen says so


def of_set(found: dict, name: str) -> dict:
    """The measures of one model on one set, {} when it was not evaluated there."""
    return (found.get("sets") or {}).get(name) or {}


def headlines(models: dict[str, dict]) -> list[str]:
    """The findings of an evaluation, one sentence each, from the models as they stand in its summary."""
    lines = [_change(models, name) for name in SETS]
    for model, found in models.items():
        broken = [(label, part(of_set(found, name).get("degenerate"))) for name, label in SETS.items()]
        broken = [f"{percent(share)} ({label})" for label, share in broken if (share or 0) > DEGENERATE_ALARM]
        if broken:
            lines.append(
                f"Degenerate text is frequent in the answers of {MODELS[model]}: {', '.join(broken)}. Read"
                " its other numbers with this in mind."
            )
    return [line for line in lines if line]


def _change(models: dict, name: str) -> str:
    """The refusals of the first model on a set beside those of each later one; of SL-CAI only where it is the last."""
    first, *others = models
    before = of_set(models[first], name).get("refusal")
    ends = [model for model in others if model != "sl_cai"] or others
    found = {model: of_set(models[model], name).get("refusal") for model in ends}
    found = {model: after for model, after in found.items() if part(after) is not None}
    if part(before) is None or not found:
        return ""
    what = "Refusal of unsafe prompts" if name == "red_team" else f"Over-refusal, {SETS[name]}"
    said = [f"{MODELS[model]} {estimate(after, percent)}. {_apart(before, after)}" for model, after in found.items()]
    return f"{what}: {MODELS[first]} {estimate(before, percent)}, {' '.join(said)}"


def _apart(before: dict, after: dict) -> str:
    edges = [part(interval, key) for interval in (before, after) for key in ("low", "high")]
    if None in edges:
        return "Without intervals, no difference can be claimed."
    if part(before) == part(after):
        return "No change."
    if edges[1] < edges[2] or edges[3] < edges[0]:
        return "The intervals do not overlap."
    return "The intervals overlap: a difference of this size can be chance."


def sample_size(models: dict[str, dict]) -> str:
    """How wide the intervals of the refusal rates are."""
    found = [of_set(model, name).get("refusal") for model in models.values() for name in SETS]
    widths = [
        (part(interval, "high") - part(interval, "low"), part(interval, "n"))
        for interval in found
        if None not in (part(interval, "high"), part(interval, "low"), part(interval, "n"))
    ]
    if not widths:
        return "Rates over few prompts have wide intervals: read no rate without its n."
    width, n = max(widths)
    return (
        f"With n = {n:,} prompts in a set, the 95% interval of a refusal rate is up to {100 * width:.0f}"
        " percentage points wide. A smaller difference between two models can be chance."
    )


def gold(run: Run) -> str:
    """Whether labels are shown to be right often enough on gold pairs, and what that meant for the run; "": unknown."""
    summary, minimum = run.summary("judge"), run.resolved("judge.minimum_accuracy")
    vote, rules = summary.get("vote") or {}, summary.get("baselines") or {}
    numbers = [minimum, part(vote.get("accuracy"), "low"), *(rules.get(name) for name in judging.LENGTH_RULES)]
    if not all(known(value) for value in numbers):
        return ""
    said = (
        f"On gold pairs the labels of {', '.join(summary.get('voters') or [])} are right in"
        f" {estimate(vote['accuracy'], percent)}; the lower end of that interval must be above"
        f" {percent(judging.needed(summary, minimum))}."
    )
    if judging.passes(summary, minimum):
        return f"{said} It is; by this measure they are {vote.get('worth')}."
    if run.resolved("judge.on_failure") == "continue":
        return (
            f"{said} It is not, and the run went on because its config says so (judge.on_failure=continue): labels,"
            " reward and all that was trained on them may follow nothing but noise."
        )
    return f"{said} It is not: the run stops before labels are spent on training."


def gold_passes(run: Run) -> bool:
    """Whether there is nothing to warn of: the gate was passed, or there is none."""
    said = gold(run)
    return not said or judging.passes(run.summary("judge"), run.resolved("judge.minimum_accuracy"))


def judge(summary: dict | None) -> str:
    """How far the preference labels follow the position of a response and not its text."""
    consistent = (summary or {}).get("consistent_share")
    first = (summary or {}).get("first_position_share")
    if not known(consistent):
        return ""
    weak = " So for most pairs this judge has no stable opinion on the texts." if consistent < 0.5 else ""
    chose = (
        f" Over both orders it chose the option shown first in {percent(first)} of cases."
        if known(first)
        else ""
    )
    return (
        "The judge sees each pair in both orders, and its two answers are averaged. In"
        f" {percent(1 - consistent)} of pairs it chose the same position both times, whatever stood"
        f" there.{chose}{weak}"
    )


def reward_model(held_out: dict | None) -> str:
    """Whether the reward model predicts held-out labels better than the best rule that knows nothing of the texts."""
    accuracy = part((held_out or {}).get("accuracy"))
    best = (held_out or {}).get("best_rule") or {}
    gain = (held_out or {}).get("gain_over_best_rule")
    if accuracy is None or not known(best.get("accuracy")) or part(gain) is None:
        return ""
    said = (
        "On held-out pairs the reward model agrees with the AI labels in"
        f" {estimate(held_out['accuracy'], percent)}; the best simple rule (“{RULES.get(best.get('rule'), '?')}”) in"
        f" {percent(best['accuracy'])}. Difference on the same pairs: {estimate(gain, percent)}, sign test p ="
        f" {number(gain.get('p_value'), 3)}."
    )
    if held_out.get("beats_best_rule"):
        return f"{said} The reward model beats the simple rule."
    if part(gain) <= 0:
        return f"{said} The reward model does not beat the simple rule."
    return f"{said} It is ahead, but by no more than chance explains: it is not shown to beat the simple rule."


def monitors(run: Run, stage: str) -> str:
    """The alarms of a stage's monitors, whether they ended it, and which state was exported; "" without an alarm."""
    metrics = run.stages[stage].metrics if stage in run.stages else []
    found = run.summary(stage).get("monitor") or {}
    raised = {
        words: [line.get("update") for line in metrics if line.get(f"monitor_alarm_{name}")]
        for name, words in ALARMS.items()
    }
    listed = [f"{words} ({_updates(at)})" for words, at in raised.items() if at]
    if not listed:
        return ""
    lines = [f"Alarm: in {TITLES[stage]} the monitors saw signs of reward hacking: {'; '.join(listed)}."]
    if found.get("stop"):
        ended = ", ".join(ALARMS.get(name, name) for name in found["stop"])
        lines.append(f"This ended the training after update {run.summary(stage).get('updates')}: {ended}.")
    if known(found.get("chosen")):
        within = found.get("chosen_within_bounds")
        lines.append(
            f"The exported state is that of update {found['chosen']}, "
            + ("within all bounds." if within else "which is out of bounds: do not trust its reward.")
        )
    return " ".join(lines)


def _updates(at: list) -> str:
    shown = ", ".join(map(str, at[:3]))
    return f"update{'s' if len(at) > 1 else ''} {shown}" + (f" and {len(at) - 3} more" if len(at) > 3 else "")


def uncertainty(held_out: dict) -> str:
    """Whether the heads of an ensemble disagree where they are wrong; "" of one head."""
    if not known(held_out.get("uncertainty")):
        return ""
    area = held_out.get("uncertainty_auroc")
    said = f"The heads deviate by {number(held_out['uncertainty'])} in the gap of a pair, on average."
    if part(area) is None:
        return f"{said} All pairs are right, or all wrong: whether they deviate more where it errs cannot be told."
    said = f"{said} AUROC of the deviation for wrong pairs: {estimate(area)}."
    if (part(area, "low") or 0) > 0.5:
        return f"{said} So it tells where the model errs."
    return f"{said} So it is not shown to tell where the model errs."


def calibration(held_out: dict) -> str:
    return (
        f"Expected calibration error {number(held_out.get('calibration_error'), 3)}; correlation of score and"
        f" length {number(held_out.get('length_correlation'))} (far from 0: the score follows length)."
    )


def dpo(held_out: dict | None) -> str:
    """Whether a DPO policy tells the better response of held-out pairs, and better than a rule on length does."""
    accuracy = part((held_out or {}).get("accuracy"))
    if accuracy is None:
        return ""
    rules = {
        "the shorter response wins": part(held_out.get("shorter_wins_accuracy")),
        "the longer response wins": part(held_out.get("longer_wins_accuracy")),
        "toss a coin": 0.5,
    }
    rule = max((name for name in rules if rules[name] is not None), key=rules.get)
    low = part(held_out["accuracy"], "low")
    beaten = low is not None and low > rules[rule]
    return (
        "On held-out pairs training raised the response that the label prefers above the other one in"
        f" {estimate(held_out['accuracy'], percent)}; the best simple rule (“{rule}”) agrees with the label in"
        f" {percent(rules[rule])}. The policy {'beats' if beaten else 'is not shown to beat'} the simple rule."
    )
