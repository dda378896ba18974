"""What the labelers are worth on gold pairs, before their labels are spent on training.

Every labeler of `preferences`, and those that `judge.also` names, is asked about each gold pair in both orders; those
of `preferences` vote. Temperatures are fitted on the same pairs for the labels to come. Where the vote is not shown to
be right often enough the run ends here (`check_gate`), unless the config says to go on.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cai_jax import judging
from cai_jax.config import Config
from cai_jax.endpoint import EXTERNAL, summary_of
from cai_jax.errors import UserError
from cai_jax.labelers.judge import Judge
from cai_jax.labelers.make import labeler
from cai_jax.labelers.opinion import Labeler, Opinion, Pair
from cai_jax.labelers.pleading import PLEAS
from cai_jax.labelers.rule import Rule
from cai_jax.labelers.vote import agreement, tempered, vote
from cai_jax.provenance import read_json, write_json
from cai_jax.stages import labelling
from cai_jax.stages.inputs import labelers_of

STAGE = "judge"


@dataclass(frozen=True)
class Heard:
    """What one labeler said: of the gold pairs, and of the pairs that plead, `{plea: [opinion]}` by guard."""

    labeler: Labeler
    gold: list[Opinion]
    pleas: dict[bool, tuple[list[Opinion], dict[str, list[Opinion]]]]  # with those of the same pairs without a plea
    asked: list[Opinion]  # all of them


def run(context, folder) -> dict:
    """Measure the labelers, write their temperatures; returns the summary of the stage."""
    settings, source = context.config.preferences, context.config.preferences.judge
    model = context.load(source) if source else context.base
    limit = min(context.config.sampler.max_length, model.config.max_position)
    judge = Judge(model.tokenizer, model.hash, limit, settings.guard)
    names = labelers_of(context.config, STAGE)
    _require_room(context, judge, names)
    driver = labelling.driver_of(context, model)
    heard = {name: _hear(context, folder, judge, name, driver) for name in names}
    summary = summarize(context.config, context.gold, heard)
    if context.config.judge.calibrate:
        found = {name: {"temperature": of["temperature"]} for name, of in summary["labelers"].items()}
        write_json(folder.path / labelling.CALIBRATION, {"labelers": found})
    return summary


def check_gate(config: Config, folder) -> None:
    """Raise UserError where the judge stage is done and its vote not good enough, unless the config says to go on."""
    if folder.done() is None:
        return
    summary, voters = read_json(folder.path / "summary.json"), ", ".join(config.preferences.labelers)
    if (measured := ", ".join(summary["voters"])) != voters:
        raise UserError(f"judge: {measured} was measured, but preferences.labelers is {voters}: "
                        "--fresh --stages=judge measures again")
    minimum = config.judge.minimum_accuracy
    if config.judge.on_failure == "continue" or judging.passes(summary, minimum):
        return
    found, n = summary["vote"]["accuracy"], summary["gold"]["pairs"]
    raise UserError(
        f"judge: the labels of {voters} are right on {round(found['value'] * n)} of {n} gold pairs, "
        f"{found['value']:.1%} with a 95% interval from {found['low']:.1%}; that must be above "
        f"{judging.needed(summary, minimum):.1%} (see report.html). Take another labeler (preferences.labelers) or a "
        "stronger judge (preferences.judge) with --fresh, or go on all the same: --set judge.on_failure=continue"
    )


def _require_room(context, judge: Judge, names: Sequence[str]) -> None:
    """Refuse a judge whose worked examples leave a labeler no room for a gold pair, before one is asked."""
    for name in names:
        asked = _labeler(context, judge, name)
        rows = zip(context.gold.pairs, _principles(context), strict=True)
        if not any(labelling.has_room(asked, pair.messages, under) for pair, under in rows):
            raise UserError(f"judge: not one gold pair fits the judge within sampler.max_length={judge.max_length} for "
                            f"the labeler {name}; raise it or shorten the constitution's few-shots")


def _labeler(context, judge: Judge, name: str) -> Labeler:
    """A labeler as the config has it, but in both orders, where it shows the responses side by side."""
    preferences = replace(context.config.preferences, orders="both", guard=judge.guard)
    config = replace(context.config, preferences=preferences)
    return labeler(name, config, context.constitution, judge, context.endpoint)


def _principles(context) -> list:
    """The principles of each gold pair: its own, or all."""
    of_id = {principle.id: (principle,) for principle in context.constitution.principles}
    everything = context.constitution.principles
    return [everything if context.config.judge.principles == "all" else of_id[pair.principle]
            for pair in context.gold.pairs]  # fmt: skip


# --- asking ------------------------------------------------------------------------------------------------


def _hear(context, folder, judge: Judge, name: str, driver) -> Heard:
    """One pass over the gold pairs and those that plead; without the guard again where it masks something."""
    gold, under = _plain(context.gold), _principles(context)
    places = pleading_places(len(gold), context.config.judge.pleas)
    pleading = [_pleading(context.gold.pairs[place], plea) for plea in PLEAS for place in places]
    pled_under = [under[place] for _ in PLEAS for place in places]
    asked = _labeler(context, judge, name)
    heard = labelling.opinions(context, folder, asked, gold + pleading, under + pled_under, driver)
    said, pled = heard[: len(gold)], heard[len(gold) :]
    pleas = {judge.guard: ([said[place] for place in places], _by_plea(pled, len(places)))} if places else {}
    if any(opinion.detail.get("flags", {}).get("guarded") for opinion in pled):
        before = [gold[place] for place in places]
        bare = _labeler(context, replace(judge, guard=False), name)
        under_bare = [under[place] for place in places] + pled_under
        found = labelling.opinions(context, folder, bare, before + pleading, under_bare, driver, "unguarded")
        pleas[False] = (found[: len(places)], _by_plea(found[len(places) :], len(places)))
        heard = heard + found
    return Heard(asked, said, pleas, heard)


def _plain(gold) -> list[Pair]:
    return [Pair(pair.id, pair.messages, pair.response_a, pair.response_b) for pair in gold.pairs]


def pleading_places(pairs: int, wanted: int) -> list[int]:
    """The places of the gold pairs that plead, spread over the set."""
    count = min(pairs, wanted)
    return [place * pairs // count for place in range(count)]


def _pleading(pair, plea: str) -> Pair:
    """The pair with the plea in its worse response, as a policy may learn to win with one."""
    a, b = pair.response_a, pair.response_b
    a, b = (a, PLEAS[plea](b)) if pair.better == "a" else (PLEAS[plea](a), b)
    return Pair(f"{pair.id}/{plea}", pair.messages, a, b)


def _by_plea(opinions: list[Opinion], count: int) -> dict[str, list[Opinion]]:
    return {plea: opinions[place * count : (place + 1) * count] for place, plea in enumerate(PLEAS)}


# --- numbers -----------------------------------------------------------------------------------------------


def summarize(config: Config, gold, heard: dict[str, Heard]) -> dict:
    """The summary of the stage, from what every labeler said."""
    both, voters = config.preferences.orders == "both", config.preferences.labelers
    as_labels = {name: [_as_label(opinion, both) for opinion in each.gold] for name, each in heard.items()}
    rules = judging.baselines(gold.pairs)
    labelers = {
        name: _measured(config, gold.pairs, each, as_labels[name], rules) | {"votes": name in voters}
        for name, each in heard.items()
    }
    summary = {
        "gold": {"source": gold.source, "hash": gold.hash, "pairs": len(gold.pairs)},
        "voters": list(voters),
        "orders": config.preferences.orders,
        "vote": _vote(config, gold.pairs, {name: (heard[name], as_labels[name]) for name in voters}, rules),
        "labelers": labelers,
        "baselines": rules,
        "agreement": agreement({name: [opinion.logit for opinion in said] for name, said in as_labels.items()}),
        "pleas": [row for name, each in heard.items() for row in _plea_rows(config, gold, name, each)],
        "counters": {
            f"{name}/{failure}": times for name, of in labelers.items() for failure, times in of["failures"].items()
        },
    }
    if EXTERNAL in heard:
        usage = [opinion.detail["usage"] for opinion in heard[EXTERNAL].asked]
        failures = [opinion.failure for opinion in heard[EXTERNAL].asked]
        summary["endpoint"] = summary_of(config.endpoint, *zip(*usage, strict=True), failures)
    return summary


def _as_label(opinion: Opinion, both: bool) -> Opinion:
    """The opinion as a label takes it: where one order is asked for, the one with response_a first."""
    orders = opinion.detail.get("orders")
    return opinion if both or not orders else replace(opinion, logit=orders[0])


def _measured(config: Config, pairs, heard: Heard, said: list[Opinion], rules) -> dict:
    logits = [opinion.logit for opinion in said]
    fitted, unseen = _temperatures(config, pairs, heard, logits)
    labels = [tempered(opinion, 1.0) for opinion in said]
    calibrated = [tempered(opinion, t) for opinion, t in zip(said, unseen, strict=True)]
    found = judging.measure(pairs, logits, _orders(heard.gold))
    failures = Counter(opinion.failure for opinion in said if opinion.failure)
    return found | {
        "hash": heard.labeler.hash,
        "temperature": fitted,
        "calibration_error": judging.calibration_error(pairs, labels),
        "calibration_error_after": judging.calibration_error(pairs, calibrated),
        "failures": dict(sorted(failures.items())),
        "worth": judging.worth(found, rules),
    }


def _temperatures(config: Config, pairs, heard: Heard, logits) -> tuple[float, list[float]]:
    """The temperature of a labeler, and for each pair the one that has not seen it; 1 for a rule, which is exact."""
    if not config.judge.calibrate or isinstance(heard.labeler, Rule):
        return 1.0, [1.0] * len(pairs)
    return judging.temperatures(pairs, logits)


def _orders(said: Sequence[Opinion]) -> list | None:
    """The log-odds of both orders; None of a labeler that does not show the responses side by side."""
    orders = [opinion.detail.get("orders") for opinion in said]
    return orders if any(orders) else None


def _vote(config: Config, pairs, voters: dict[str, tuple[Heard, list[Opinion]]], rules) -> dict:
    """The vote on each pair, every labeler at temperatures that have not seen the pair."""
    columns, orders = [], []
    for heard, said in voters.values():
        _, unseen = _temperatures(config, pairs, heard, [opinion.logit for opinion in said])
        columns.append([tempered(opinion, t) for opinion, t in zip(said, unseen, strict=True)])
        orders.append([_in_orders(opinion, t) for opinion, t in zip(heard.gold, unseen, strict=True)])
    logits = [vote(row) for row in zip(*columns, strict=True)]
    shown = any(_orders(heard.gold) for heard, _ in voters.values())
    by_order = [_vote_in_orders(row) for row in zip(*orders, strict=True)] if shown else None
    found = judging.measure(pairs, logits, by_order)
    return found | {
        "calibration_error_after": judging.calibration_error(pairs, logits),
        "worth": judging.worth(found, rules),
    }


def _in_orders(opinion: Opinion, temperature: float) -> list[float] | None:
    if opinion.logit is None:
        return None
    return [logit / temperature for logit in opinion.detail.get("orders") or [opinion.logit] * 2]


def _vote_in_orders(given) -> tuple[float, float] | None:
    given = [orders for orders in given if orders is not None]
    return tuple(vote(column) for column in zip(*given, strict=True)) if given else None


def _plea_rows(config: Config, gold, name: str, heard: Heard) -> list[dict]:
    """A row a plea, and with the guard and without: how far it moves this labeler."""
    both = config.preferences.orders == "both"
    places = pleading_places(len(gold.pairs), config.judge.pleas)
    for_a = [gold.pairs[place].better == "b" for place in places]
    rows = []
    for guard, (before, pleas) in heard.pleas.items():
        plain = [_as_label(opinion, both).logit for opinion in before]
        for plea, after in pleas.items():
            pled = [_as_label(opinion, both).logit for opinion in after]
            rows.append({"labeler": name, "plea": plea, "guard": guard, **judging.plea_effect(plain, pled, for_a)})
    return rows
