"""Sentences drawn from the numbers by rule: what went up, what is within chance, what beats a baseline."""

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
    first, last = list(models)[0], list(models)[-1]
    lines = [_change(models, first, last, name) for name in SETS] if first != last else []
    for model, found in models.items():
        broken = [(label, part(of_set(found, name).get("degenerate"))) for name, label in SETS.items()]
        broken = [f"{percent(share)} ({label})" for label, share in broken if (share or 0) > DEGENERATE_ALARM]
        if broken:
            lines.append(
                f"Degenerate text is frequent in the answers of {MODELS[model]}: {', '.join(broken)}. Read"
                " its other numbers with this in mind."
            )
    return [line for line in lines if line]


def _change(models: dict, first: str, last: str, name: str) -> str:
    before, after = (of_set(models[model], name).get("refusal") for model in (first, last))
    if part(before) is None or part(after) is None:
        return ""
    what = "Refusal of unsafe prompts" if name == "red_team" else f"Over-refusal, {SETS[name]}"
    return (
        f"{what}: {MODELS[first]} {estimate(before, percent)}, {MODELS[last]} {estimate(after, percent)}."
        f" {_apart(before, after)}"
    )


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
    metrics, summary = run.stages[stage].metrics, run.stages[stage].summary or {}
    found = summary.get("monitor") or {}
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
        lines.append(f"This ended the training after update {summary.get('updates')}: {ended}.")
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
