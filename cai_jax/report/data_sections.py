"""Sections of the stages that write rows: critique and revision, and preference labels."""

from collections import Counter, defaultdict

from cai_jax.report import plots, verdicts
from cai_jax.report.artifacts import Run, Stage
from cai_jax.report.markup import Html, bar_list, el, facts, paragraph, table
from cai_jax.report.numbers import count, estimate_cell, known, number, percent


def principle_name(principle, titles: dict[str, str]) -> str:
    """'Title (id)', or the id alone when the constitution is not at hand."""
    return f"{titles[principle]} ({principle})" if principle in titles else str(principle)


def critique_revision(run: Run, titles: dict[str, str]) -> list:
    """Lengths and failures by round, and how often each principle was drawn."""
    summary = run.stages["critique_revision"].summary or {}
    lengths, rounds = _rounds(run)
    mean = summary.get("mean_tokens") or {}
    revisions = mean.get("revision") if isinstance(mean.get("revision"), list) else []
    drawn = summary.get("principles") or {}
    return [
        paragraph(
            f"The base model answers each unsafe prompt. Then, a few rounds over, it {_rewrites(run)}. It is trained on"
            f" the rewritten answers, but for those that are no revision ({_dropped(run)}){_unlike(run)}."
        ),
        facts(
            [
                ("prompts", count(summary.get("rows"))),
                ("rounds", count(len(rounds) or len(revisions) or None)),
                ("mean tokens of a response", number(mean.get("response"), 0)),
                ("of a critique", number(mean.get("critique"), 0)),
                ("of a revision, by round", ", ".join(number(value, 0) for value in revisions) or None),
            ]
        ),
        endpoint(run.stages["critique_revision"]),
        el(
            "div",
            plots.boxes(
                "cr-lengths",
                "Tokens of the response and of the revision of each round: median, quartiles, "
                "5th to 95th percentile",
                lengths,
                "tokens",
            ),
            _failures_plot(rounds),
            class_="figures",
        ),
        el("h3", "How often each principle was drawn") if drawn else None,
        (
            bar_list(
                [
                    (principle_name(name, titles), times)
                    for name, times in sorted(drawn.items(), key=lambda item: (-item[1], item[0]))
                ]
            )
            if drawn
            else None
        ),
        _kinds(summary.get("kinds") or {}),
        _verifiable(summary.get("checks") or {}, titles),
    ]


def _rewrites(run: Run) -> str:
    """What a round does, as the config has it."""
    direct = run.resolved("critique_revision.critiques") is False
    told = "rewrites its answer" if direct else "criticises its answer and rewrites it"
    draws = run.resolved("critique_revision.draws")
    chosen = ", and the one of several drafts is taken that is most like the constitution's worked answers"
    return f"{told} under one principle of the constitution" + (chosen if draws and draws > 1 else "")


def _dropped(run: Run) -> str:
    """What the flags of dropped rounds say, as the config has them."""
    flags = run.resolved("sft.drop")
    return ", ".join(flag.replace("_", " ") for flag in flags) if isinstance(flags, list) and flags else "none"


def _unlike(run: Run) -> str:
    """What else is left out, where `sft.least_ratio` is set."""
    least = run.resolved("sft.least_ratio")
    return f" and those that worked answers made likelier by less than {least:g} nats a token" if least else ""


def _kinds(kinds: dict) -> list | None:
    """What kind of text responses and the revisions of each round are: the paper's curve, counted by rule."""
    if not kinds.get("response"):
        return None
    columns = {"response": kinds["response"]}
    drawn = kinds.get("drawn") or []
    for i, found in enumerate(kinds.get("revision") or []):
        if drawn[i : i + 1] not in ([], [found]):  # of several draws one was taken
            columns[f"all draws of revision {i + 1}"] = drawn[i]
        columns[f"revision {i + 1}"] = found
    return [
        el("h3", "What the revisions made of the responses"),
        paragraph("How many texts are of each kind, told apart by rule: a refusal declines at its start."),
        table(
            ["kind", *columns],
            [[kind, *(count(found.get(kind)) for found in columns.values())] for kind in kinds["response"]],
            numeric_from=1,
        ),
    ]


def endpoint(stage: Stage) -> Html | None:
    """What a stage had of the model at the endpoint, and what it took; None for a stage that did not ask it."""
    given, done = (stage.summary or {}).get("endpoint"), stage.timing.get("endpoint") or {}
    if not given:
        return None
    failures = ", ".join(f"{name} {count(times)}" for name, times in (given.get("failures") or {}).items())
    line = (
        f"A model behind an HTTP endpoint took part, {given.get('model')} at {given.get('base_url')}:"
        f" {count(given.get('answers'))} answers, {count(given.get('tokens_read'))} tokens read and"
        f" {count(given.get('tokens_written'))} written"
    )
    line += f", at a price of {number(given['cost'], 4)}" if given.get("cost") else ""
    line += f". Failures: {failures or 'none'}."
    if done:
        line += (
            f" The last command asked {count(done.get('asked'))} questions, {count(done.get('cached'))} of them"
            f" answered from disk; it sent {count(done.get('sent'))} requests, {count(done.get('retries'))} of them"
            " repeated."
        )
    return paragraph(line)


def _verifiable(checks: dict[str, dict], titles: dict[str, str]) -> list | None:
    """How often texts kept the rules that a program can check, before and after a revision under each."""
    if not checks:
        return None
    return [
        el("h3", "Verifiable principles"),
        paragraph(
            "Some principles come with an exact rule. Of the texts that were revised under each, the share that"
            " kept its rule before and after, with 95% intervals; no model judges here. An empty text keeps every"
            " rule that only forbids."
        ),
        table(
            ["principle", "rule", "n", "kept before", "kept after"],
            [
                [
                    principle_name(name, titles),
                    found.get("rule"),
                    count(found.get("n")),
                    estimate_cell(found.get("before"), percent),
                    estimate_cell(found.get("after"), percent),
                ]
                for name, found in sorted(checks.items())
            ],
            numeric_from=2,
        ),
    ]


def _rounds(run: Run) -> tuple[dict[str, list], dict[int, Counter]]:
    """Token counts by step, and for each round how many rows, unchanged and cut revisions there are."""
    lengths, rounds = defaultdict(list), defaultdict(Counter)
    for row in run.rows("critique_revision"):
        lengths["response"].append(row["response"]["tokens"])
        newest = row["response"]["text"].strip()
        for place in row["rounds"]:
            lengths[f"round {place['round']}"].append(place["revision"]["tokens"])
            tally = rounds[place["round"]]
            tally["rows"] += 1
            before, newest = newest, place["revision"]["text"].strip()
            tally["unchanged"] += newest == before
            tally["truncated"] += bool(place["revision"]["truncated"])
            tally["critique cut"] += bool(place["critique"] and place["critique"]["truncated"])
    return lengths, dict(sorted(rounds.items()))


def _failures_plot(rounds: dict[int, Counter]) -> Html:
    if not rounds:
        return Html("")
    series = {
        label: [tally[key] / tally["rows"] for tally in rounds.values()]
        for label, key in (
            ("unchanged", "unchanged"),
            ("revision cut", "truncated"),
            ("critique cut", "critique cut"),
        )
    }
    return plots.bars(
        "cr-failures",
        "Share of rows by round: revision equal to the text before it; revision or critique "
        "cut at its token limit",
        series,
        list(rounds),
        "round",
        share=True,
    )


def preferences(run: Run, titles: dict[str, str]) -> list:
    """Confidence and consistency of the AI labels."""
    summary = run.stages["preferences"].summary or {}
    histogram = summary.get("confidence_histogram") or {}
    both = [(row.get("probability_a_ab"), row.get("probability_a_ba")) for row in run.rows("preferences")]
    side_by_side = known(summary.get("consistent_share"))
    both = [pair for pair in both if known(pair[0]) and known(pair[1]) and side_by_side]
    return [
        paragraph(
            "The SL-CAI model answers each prompt several times."
            + (_CONTRASTED if run.resolved("preferences.contrasted", False) else "")
            + " Labelers compare each two answers under principles of the constitution; the label is the probability"
            " that the first is better, their log-odds averaged. Labels stay soft: 0.5 means no opinion."
        ),
        facts(
            [
                ("pairs", count(summary.get("pairs"))),
                ("labelled", count(summary.get("labelled"))),
                ("kept for training", _kept(summary)),
                ("same choice in both orders", percent(summary.get("consistent_share"))),
                ("chose the first shown", percent(summary.get("first_position_share"))),
                *_choices(_DECLINES, summary.get("declining") or {}),
                *_choices(_OF_OWN_AIM, summary.get("contrasted") or {}),
            ]
        ),
        endpoint(run.stages["preferences"]),
        paragraph(verdicts.judge(summary)),
        _labelers(summary.get("labelers") or {}),
        _agreement(summary.get("agreement") or []),
        _filters(summary),
        el(
            "div",
            (
                plots.histogram(
                    "pref-confidence",
                    "Label: probability that response A is better. Near 0.5 it teaches little",
                    histogram["edges"],
                    histogram["counts"],
                    "probability of A",
                )
                if histogram.get("counts")
                else None
            ),
            plots.dots(
                "pref-orders",
                f"The same probability in each order, {min(len(both), plots.MOST_DOTS):,} pairs. On "
                "the dotted line the order makes no difference; top left and bottom right the choice flips",
                [pair[0] for pair in both],
                [pair[1] for pair in both],
                "A shown first",
                "A shown second",
            ),
            class_="figures",
        ),
    ]


# What labels say where one of two responses declines: it should be preferred to unsafe prompts alone.
_DECLINES = {
    "red_team": "unsafe prompts: label for the response that declines",
    "helpful": "helpful prompts: the same, which should be few",
}
_CONTRASTED = (
    " It does so with the constitution's worked answers as few-shot context, by turns harmless and helpful ones, so"
    " that the answers differ; they are not what it says by itself. A labeler that goes by the same worked answers will"
    " be for the matching one nearly always."
)
_OF_OWN_AIM = {
    "red_team": "unsafe prompts: label for the response with harmless worked answers as context",
    "helpful": "helpful prompts: label for the response with helpful worked answers as context",
}


def _choices(titles: dict[str, str], found: dict) -> list[tuple]:
    return [
        (title, f"{percent(found[name]['value'])} of {count(found[name]['n'])} such pairs")
        for name, title in titles.items()
        if (found.get(name) or {}).get("n")
    ]


def _kept(summary: dict) -> str | None:
    share = summary.get("kept_share")
    return f"{count(summary.get('kept'))} ({percent(share)})" if known(share) else None


def _labelers(labelers: dict[str, dict]) -> list | None:
    """What each labeler said, and where it failed."""
    if not labelers:
        return None
    return [
        el("h3", "Labelers"),
        paragraph(
            "A failure is a pair on which a labeler has no opinion; it takes no part in the vote there. The temperature"
            " is what its log-odds are divided by. A labeler that does not show the answers side by side has no orders."
        ),
        table(
            ["labeler", "opinions", "failures", "flags", "temperature", "same in both orders", "chose the first"],
            [
                [
                    name,
                    count(found.get("opinions")),
                    tally(found.get("failures")),
                    tally(found.get("flags")),
                    number(found.get("temperature")),
                    percent(found.get("consistent_share")),
                    percent(found.get("first_position_share")),
                ]
                for name, found in labelers.items()
            ],
        ),
    ]


def tally(counts: dict[str, int] | None) -> str:
    """'too long 3, no check 1'"""
    return ", ".join(f"{name.replace('_', ' ')} {count(times)}" for name, times in (counts or {}).items()) or "none"


def _agreement(found: list[dict]) -> list | None:
    """How far labelers that vote agree with each other."""
    if not found:
        return None
    return [
        el("h3", "Agreement of the labelers"),
        paragraph(
            "Of the pairs that both decide, the share on which they prefer the same answer, with 95% intervals, and"
            " Cohen's kappa: 1 is full agreement, 0 is what chance gives."
        ),
        table(
            ["labelers", "same", "kappa"],
            [
                [
                    " and ".join(entry.get("labelers") or []),
                    estimate_cell(entry.get("same"), percent, with_n=True),
                    number(entry.get("kappa")),
                ]
                for entry in found
            ],
        ),
    ]


def _filters(summary: dict) -> list | None:
    """What each filter dropped from the labelled pairs, in order."""
    if not (found := summary.get("filters")):
        return None
    return [
        el("h3", "Filters"),
        paragraph(
            f"Of {count(summary.get('labelled'))} labelled pairs, {_kept(summary) or 'some'} are kept for training. The"
            " filters, in their order:"
        ),
        table(
            ["filter", "dropped", "left"],
            [
                [str(entry.get("filter")).replace("_", " "), count(entry.get("dropped")), count(entry.get("left"))]
                for entry in found
            ],
        ),
    ]
