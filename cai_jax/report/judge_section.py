"""The section of the judge stage: what the labelers are worth on gold pairs, and what moves them."""

from cai_jax.report import verdicts
from cai_jax.report.artifacts import Run
from cai_jax.report.data_sections import endpoint, tally
from cai_jax.report.markup import el, facts, paragraph, table
from cai_jax.report.numbers import bounds, count, estimate_cell, number, part, percent


def judge(run: Run, titles: dict[str, str]) -> list:
    """Accuracy, bias and calibration of every labeler; pleas; by category."""
    summary = run.stages["judge"].summary or {}
    gold, labelers = summary.get("gold") or {}, summary.get("labelers") or {}
    vote = summary.get("vote") or {}
    return [
        paragraph(
            "Before labels are spent on training, the labelers are asked about gold pairs: of each it is known which"
            " answer is better under the principle at hand. A tie, or no opinion, is not right."
        ),
        facts(
            [
                ("gold pairs", count(gold.get("pairs"))),
                ("gold set", gold.get("source")),
                ("labelers that vote", ", ".join(summary.get("voters") or []) or None),
                ("the vote is right", estimate_cell(vote.get("accuracy"), percent)),
                ("orders of a label", summary.get("orders")),
            ]
        ),
        paragraph(verdicts.gold(run)),
        endpoint(run.stages["judge"]),
        _accuracy(labelers, vote, summary.get("baselines") or {}),
        _bias(labelers),
        _calibration(labelers),
        _categories(labelers),
        _pleas(summary.get("pleas") or []),
    ]


def _accuracy(labelers: dict[str, dict], vote: dict, rules: dict[str, float]) -> list:
    rows = [_accuracy_row(name + ("" if found.get("votes") else " (measured only)"), found)
            for name, found in labelers.items()]  # fmt: skip
    simple = [[verdicts.RULES.get(name, name), percent(share), *[""] * 5] for name, share in rules.items()]
    return [
        el("h3", "Accuracy"),
        table(
            ["labeler", "right", "right of those decided", "one order only", "ties", "failures", "shown to be"],
            [*rows, *([_accuracy_row(el("b", "vote"), vote)] if len(labelers) > 1 and vote else []), *simple],
        ),
        paragraph(
            "The last rows are rules that know nothing of principles, half right where they have no side. “One order"
            " only”: as if the answers had been shown in one order instead of two."
        ),
    ]


def _accuracy_row(name, found: dict) -> list:
    decided = found.get("decided_accuracy")
    return [
        name,
        estimate_cell(found.get("accuracy"), percent),
        estimate_cell(decided, percent, with_n=True),
        estimate_cell(found.get("first_order_accuracy"), percent),
        count(found.get("ties")),
        tally(found.get("failures")) if "failures" in found else "",
        found.get("worth"),
    ]


def _bias(labelers: dict[str, dict]) -> list:
    columns = ("same_position", "first_position", "chose_longer", "accuracy_better_longer", "accuracy_better_shorter")
    return [
        el("h3", "Position and length"),
        paragraph(
            "Same place twice: after the answers have swapped places, the same place wins again, so that the text did"
            " not decide. Without favour for a place or a length, the next two are near half."
        ),
        table(
            ["labeler", "same place twice", "chose the first", "chose the longer", "right, better is longer",
             "right, better is shorter"],
            [[name, *(estimate_cell(found.get(column), percent) for column in columns)]
             for name, found in labelers.items()],
        ),
    ]  # fmt: skip


def _calibration(labelers: dict[str, dict]) -> list:
    return [
        el("h3", "Calibration"),
        paragraph(
            "Expected calibration error: how far the probability of the preferred answer is from how often it is right."
            " Labels divide a labeler's log-odds by its temperature; the error after that is measured on pairs that"
            " the temperature was not fitted on. It stays 1 where a fit does not help there; a very high one says that"
            " the log-odds tell nothing."
        ),
        table(
            ["labeler", "error before", "error after", "temperature"],
            [
                [
                    name, number(found.get("calibration_error"), 3), number(found.get("calibration_error_after"), 3),
                    number(found.get("temperature")),
                ]
                for name, found in labelers.items()
            ],
        ),
    ]  # fmt: skip


def _categories(labelers: dict[str, dict]) -> list | None:
    names = list(dict.fromkeys(name for found in labelers.values() for name in found.get("categories") or {}))
    if not names:
        return None
    return [
        el("h3", "Accuracy by category"),
        table(
            ["category", *labelers],
            [
                [name or "(none)", *(estimate_cell((found.get("categories") or {}).get(name), percent, with_n=True)
                                     for found in labelers.values())]
                for name in names
            ],
        ),
    ]  # fmt: skip


def _pleas(found: list[dict]) -> list | None:
    """A row a plea, a column for each labeler with and without the guard."""
    if not found:
        return None
    columns = list(dict.fromkeys((row.get("labeler"), row.get("guard")) for row in found))
    cells = {(row.get("labeler"), row.get("guard"), row.get("plea")): row for row in found}
    return [
        el("h3", "Answers that plead for themselves"),
        paragraph(
            "In some gold pairs the worse answer ends with a plea. Each cell: the mean shift of the log-odds towards it"
            " in nats with its 95% interval, and how many of the verdicts that were not for it flipped to it. The guard"
            " masks what imitates a verdict before a judge reads it; a labeler that has nothing masked is asked once."
            " The plea “none” pleads for nothing: what any added sentence does."
        ),
        table(
            ["plea", *(f"{labeler}, guard {'on' if guard else 'off'}" for labeler, guard in columns)],
            [
                [str(plea).replace("_", " "), *(_moved(cells.get((*column, plea)) or {}) for column in columns)]
                for plea in dict.fromkeys(row.get("plea") for row in found)
            ],
        ),
    ]


def _moved(row: dict):
    shift, flipped = row.get("shift"), row.get("flipped")
    share, n = part(flipped), part(flipped, "n")
    flips = f"; {round((share or 0) * n)} of {n} flipped" if n is not None else ""
    return [el("span", number(part(shift)), class_="value"), el("span", bounds(shift) + flips, class_="range")]
