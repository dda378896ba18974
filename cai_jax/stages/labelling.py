"""Labels of pairs: the opinions of one labeler after the other, and their vote."""

import functools
import json
import math
from collections.abc import Callable, Sequence

from cai_jax.constitution import Principle
from cai_jax.filters import TIE
from cai_jax.labelers.judge import TOO_LONG, Judge
from cai_jax.labelers.make import labeler
from cai_jax.labelers.opinion import Labeler, Opinion, Pair
from cai_jax.labelers.vote import tempered, vote
from cai_jax.provenance import content_hash, read_json
from cai_jax.sampler import Sampler, WithoutModel
from cai_jax.stages.rows import make_rows, unfinished, watch

CALIBRATION = "calibration.json"  # of the judge stage: {"labelers": {NAME: {"temperature": t}}}


def labelers_of(context, judge: Judge) -> list[Labeler]:
    """The labelers that the config names."""
    settings = context.config.preferences
    inputs = context.config, context.constitution, judge, context.endpoint
    return [labeler(name, *inputs) for name in settings.labelers]


def driver_of(context, model) -> Callable[[Labeler], Sampler | WithoutModel]:
    """What runs the rows of a labeler: the model's sampler, made when first needed, or none where it asks no model."""
    sampler = functools.cache(lambda: context.sampler(model))
    return lambda labeler: sampler() if labeler.judge else WithoutModel(context.config.sampler.rows)


def opinions(
    context,
    folder,
    labeler: Labeler,
    pairs: Sequence[Pair],
    principles: Sequence[Sequence[Principle]],
    driver: Callable[[Labeler], Sampler | WithoutModel],
    prefix: str = "opinions",
) -> list[Opinion]:
    """What a labeler says of every pair under its principles; kept in the shards `PREFIX-NAME`.

    A finished shard is read, not made again; `driver` is called only if there is work. The stage that asks is
    `folder.stage`; seeds come from it and from the ids of the pairs, which must differ.
    """
    prefix, per_shard = f"{prefix}-{labeler.name}", context.config.preferences.rows_per_shard

    def ask(item):
        pair, under = item
        seed = context.row_seed(folder.stage, pair.id, "label", labeler.name)
        opinion = yield from labeler.compare(pair, under, seed)
        return _to_row(pair, under, labeler, opinion)

    items = list(zip(pairs, principles, strict=True))
    starts = labeler.starts(principles) if hasattr(labeler, "starts") else [labeler.preamble]
    left = unfinished(folder, prefix, len(items), per_shard)
    title = f"{folder.stage}: labels, {labeler.name}"
    with context.progress.task(title, len(pairs), "pairs", done=len(pairs) - left) as task:
        rows = make_rows(folder, prefix, items, per_shard, lambda: watch(driver(labeler), task), ask, starts)
    return list(map(_from_row, rows))


def _to_row(pair: Pair, principles: Sequence[Principle], labeler: Labeler, opinion: Opinion) -> dict:
    # As a text: details differ from labeler to labeler and are missing where one fails, columns must not.
    limit = opinion.limit if math.isfinite(opinion.limit) else None
    said = {"logit": opinion.logit, "limit": limit, "detail": opinion.detail}
    return {
        "id": pair.id,
        "labeler": labeler.name,
        "labeler_hash": labeler.hash,
        "principles": [principle.id for principle in principles],
        "failure": opinion.failure,
        "opinion": json.dumps(said, sort_keys=True),
    }


def _from_row(row: dict) -> Opinion:
    said = json.loads(row["opinion"])
    limit = math.inf if said["limit"] is None else said["limit"]
    return Opinion(said["logit"], row["failure"], said["detail"], limit)


def has_room(labeler: Labeler, messages: Sequence[dict], principles: Sequence[Principle]) -> bool:
    """Whether the labeler's context holds a pair of empty responses to a conversation."""
    try:
        next(labeler.compare(Pair("", messages, "", ""), principles, 0))
    except StopIteration as end:
        return end.value.failure != TOO_LONG
    return True


def principles_of(
    context, labelers: Sequence[Labeler], stage: str, row_id: str, among: Sequence[Principle] = ()
) -> list[Principle]:
    """The principles behind the label of a pair: drawn ones, or those that all its labelers go by instead of them.

    They are drawn of `among`, or without these of the constitution.
    """
    own = [getattr(each, "own_principles", ()) for each in labelers]
    if not all(own):
        return draw_principles(context, stage, row_id, among)
    return list({principle.id: principle for principles in own for principle in principles}.values())


def draw_principles(context, stage: str, row_id: str, among: Sequence[Principle] = ()) -> list[Principle]:
    """The principles of a pair: as many as the config asks for, drawn with the key of the pair; all in their order."""
    left, count = list(among or context.constitution.principles), context.config.preferences.principles
    if count == 0 or count >= len(left):
        return left
    seeds = [context.row_seed(stage, row_id, "principle", *rest) for rest in [(), *((n,) for n in range(1, count))]]
    return [left.pop(seed % len(left)) for seed in seeds]


def temperature_of(context, name: str) -> float:
    """What the judge stage found that a labeler's log-odds are to be divided by; 1 where it has not run."""
    file = context.folder("judge").path / CALIBRATION
    return read_json(file)["labelers"].get(name, {}).get("temperature", 1.0) if file.exists() else 1.0


def label(
    labelers: Sequence[Labeler], opinions: Sequence[Opinion], temperatures: Sequence[float], both_orders: bool = True
) -> dict | None:
    """The vote on one pair as columns of its row; None where no labeler has an opinion.

    probability_a is the vote; with `both_orders`, probability_a_ab and probability_a_ba are those with response_a shown
    first and second, where a labeler that does not show responses side by side says the same in both.
    """
    logits = [tempered(opinion, t) for opinion, t in zip(opinions, temperatures, strict=True)]
    if (logit := vote(logits)) is None:
        return None
    columns = {"probability_a": sigmoid(logit), "tie": abs(sigmoid(logit) - 0.5) < TIE}
    if both_orders:
        given = [(opinion, t) for opinion, t in zip(opinions, temperatures, strict=True) if opinion.logit is not None]
        orders = [[x / t for x in opinion.detail.get("orders", [opinion.logit] * 2)] for opinion, t in given]
        ab, ba = (vote(column) for column in zip(*orders, strict=True))
        columns |= {"probability_a_ab": sigmoid(ab), "probability_a_ba": sigmoid(ba)}
        columns["consistent"] = (ab > 0) == (ba > 0)
    votes = [
        {"labeler": labeler.name, "labeler_hash": labeler.hash, "logit": x, "temperature": t}
        for labeler, x, t in zip(labelers, logits, temperatures, strict=True)
        if x is not None
    ]
    failures = {labeler.name: opinion.failure for labeler, opinion in zip(labelers, opinions, strict=True)}
    return columns | {"opinions": votes, "failures": failures}


def principle_columns(principles: Sequence[Principle]) -> dict:
    """Which principles a row was labelled under; `principle` is "several" where there are more than one."""
    hashes = [principle.hash for principle in principles]
    alone = len(principles) == 1
    return {
        "principle": principles[0].id if alone else "several",
        "principle_hash": hashes[0] if alone else content_hash(hashes),
        "principles": [principle.id for principle in principles],
    }


def sigmoid(x: float) -> float:
    """The probability of log-odds."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
