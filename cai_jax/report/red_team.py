"""Section of the stage that writes red-team prompts."""

from cai_jax.report.artifacts import Run, order
from cai_jax.report.markup import Html, bar_list, details, el, facts, paragraph, table, text_block
from cai_jax.report.numbers import count, estimate, estimate_cell, number, percent

SHOWN = 12  # prompts
DROPPED = {
    "near_eval": "near a prompt of an eval set",
    "near_train": "near a prompt that is trained on",
    "near_written": "near one written before",
    "too_short": "too short",
    "too_long": "too long",
    "degenerate": "broken text",
    "refusal": "the writer refused",
}


def section(run: Run, titles: dict[str, str]) -> list:
    """From lists to kept prompts, the classifier, diversity beside the given prompts, and samples."""
    summary = run.stages["red_team"].summary or {}
    counters, classifier = summary.get("counters") or {}, summary.get("classifier") or {}
    return [
        paragraph(
            "A model was shown red-team prompts of one category at a time and went on with the list. What it wrote"
            " was compared with every prompt of the run and with itself, then put to the target model; prompts that"
            " pass the filter are used by the later stages beside the given ones."
        ),
        facts(
            [
                ("lists asked for", count(summary.get("lists"))),
                ("without a single item", count(counters.get("lists_unparsable"))),
                ("items", count(counters.get("items"))),
                ("new prompts", count(summary.get("candidates"))),
                ("tried on the target", count(summary.get("tried"))),
                ("refused by it", count(counters.get("target_refusal"))),
                ("kept", count(summary.get("kept"))),
            ]
        ),
        el("h3", "Items that were dropped") if counters else None,
        bar_list([(words, counters.get(name) or 0) for name, words in DROPPED.items()]) if counters else None,
        paragraph(
            "The model also says which category a prompt is of. On the given prompts, whose category is known, it is"
            f" right in {estimate(classifier.get('right_on_given'), percent)}; on the new ones it names the category"
            f" that was asked for in {estimate(classifier.get('agrees_with_request'), percent)}."
        ),
        _categories(summary.get("categories") or {}),
        _diversity(summary.get("diversity") or {}),
        _samples(run),
    ]


def _categories(found: dict) -> Html | None:
    if not found:
        return None
    rows = [
        [
            name or "(none)", count(own.get("given")), count(own.get("candidates")), count(own.get("kept")),
            estimate_cell(own.get("refused"), percent),
        ]
        for name, own in found.items()
    ]  # fmt: skip
    return table(["category", "given", "new", "kept", "refused by the target"], rows)


def _diversity(found: dict) -> Html | None:
    """The same measures of given and kept prompts, on as many of each."""
    given, kept = found.get("given") or {}, found.get("kept") or {}
    if not kept.get("texts"):
        return None
    rows = [
        [label, number(given.get(key)), number(kept.get(key))]
        for label, key in (
            ("distinct words over all words", "distinct_1"),
            ("distinct pairs of words over all pairs", "distinct_2"),
            ("overlap of two prompts, mean", "mean_similarity"),
            ("overlap with the most similar other prompt, mean", "nearest_similarity"),
        )
    ]
    return table([f"diversity of {count(kept.get('texts'))} prompts each", "given", "kept"], rows)


def _samples(run: Run) -> Html | None:
    """Kept prompts in the order of a hash of their ids, so that none was picked for what it says."""
    kept = sorted(run.lines("red_team/prompts.jsonl"), key=lambda row: order(row.get("id")))[:SHOWN]
    if not kept:
        return None
    return details(
        f"Kept prompts: {len(kept)}, drawn by a hash of their ids",
        [
            el(
                "div",
                el("p", f"{row.get('id')} · asked for {row.get('category') or '(none)'} · classified as"
                        f" {row.get('classified') or '(none)'} · target: {row.get('kind')}"),
                text_block(row.get("prompt")),
            )
            for row in kept
        ],
    )  # fmt: skip
