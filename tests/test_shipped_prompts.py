"""Shipped prompts keep their promises: size, splits, categories, and nothing to train on that is evaluated on."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

import cai_jax
from cai_jax import config
from cai_jax.prompt_sets import check_disjoint, load_prompts

SHIPPED = {"red_team": (256, 0.3), "helpful": (256, 0.3), "look_alike": (256, 0.24)}  # rows at least, eval share
MORE = {"red_team_more": 2200, "look_alike_more": 2700, "helpful_more": 470}  # to train on alone
PROMPTS = Path(cai_jax.__file__).parent / "data" / "prompts"


def load(path, **fields):
    return load_prompts(config.PromptSet(path, **fields), "mine")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_set_is_large_enough_and_split_in_every_category(name):
    at_least, eval_share = SHIPPED[name]
    everything, train, evaluation = (load(f"shipped:{name}", split=split) for split in ("", "train", "eval"))
    assert len(everything.rows) >= at_least and not everything.skipped
    assert len(train.rows) + len(evaluation.rows) == len(everything.rows)
    total, held_out = (Counter(prompt.category for prompt in part.rows) for part in (everything, evaluation))
    for category, count in total.items():
        assert held_out[category] / count == pytest.approx(eval_share, abs=0.06), category


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_first_rows_of_a_shipped_split_cover_all_categories(name, split):
    rows = load(f"shipped:{name}", split=split).rows
    categories = {prompt.category for prompt in rows}
    assert {prompt.category for prompt in rows[: len(categories)]} == categories


@pytest.mark.parametrize("name", MORE)
def test_further_prompts_are_for_training_alone(name):
    found = load(f"shipped:{name}")
    assert len(found.rows) >= MORE[name] and not found.skipped
    assert len(load(f"shipped:{name}", split="train").rows) == len(found.rows)
    categories = Counter(prompt.category for prompt in found.rows)
    assert len(categories) >= 12 and min(categories.values()) >= 12
    assert min(len(prompt.messages[0]["content"]) for prompt in found.rows) >= 12  # none was cut off
    assert {prompt.category for prompt in found.rows[: len(categories)]} == set(categories)


def test_red_team_covers_its_harms():
    counts = Counter(prompt.category for prompt in load("shipped:red_team").rows)
    assert set(counts) == set(
        "violence weapons self_harm crime cyber privacy hate sexual drugs fraud misinformation medical".split()
    )
    assert min(counts.values()) >= 16


def test_no_near_duplicates_between_any_two_shipped_prompts():
    rows = everything()
    words_RW = bags([set(re.findall(r"\w+", row["prompt"].casefold())) for row in rows])
    count_R = words_RW.sum(1)
    both = scipy.sparse.triu(words_RW @ words_RW.T, k=1).tocoo()
    near = both.data >= 0.6 * (count_R[both.row] + count_R[both.col] - both.data)
    assert not [(rows[i]["id"], rows[j]["id"]) for i, j in zip(both.row[near], both.col[near], strict=True)]


def test_further_prompts_are_no_paraphrases_of_eval_prompts():
    rows = everything()
    words_RW = bags([stems(row["prompt"]) for row in rows])
    # Rare words count for more, so that two prompts about one rare thing are near whatever else they say.
    weighted_RW = words_RW @ scipy.sparse.diags_array(np.log(len(rows) / words_RW.sum(0)))
    units_RW = (scipy.sparse.diags_array(1 / np.sqrt((weighted_RW * weighted_RW).sum(1))) @ weighted_RW).tocsr()
    held = [i for i, row in enumerate(rows) if row["split"] == "eval"]
    more = [i for i, row in enumerate(rows) if row["set"] in MORE]
    cosine = (units_RW[held] @ units_RW[more].T).tocoo()
    near = cosine.data >= 0.38
    pairs = zip(cosine.row[near], cosine.col[near], strict=True)
    assert not [(rows[held[i]]["prompt"], rows[more[j]]["prompt"]) for i, j in pairs]


def everything() -> list[dict]:
    """The rows of all shipped sets, each with the name of its set."""
    texts = {name: (PROMPTS / f"{name}.jsonl").read_text("utf-8") for name in (*SHIPPED, *MORE)}
    return [json.loads(line) | {"set": name} for name, text in texts.items() for line in text.splitlines()]


def bags(words: list[set[str]]) -> scipy.sparse.csr_array:
    """1 where a row has a word, `[rows, different words]`."""
    column = {word: index for index, word in enumerate(sorted(set().union(*words)))}
    places = [column[word] for those in words for word in sorted(those)]
    starts = np.cumsum([0, *map(len, words)])
    return scipy.sparse.csr_array((np.ones(len(places)), places, starts), shape=(len(words), len(column)))


def stems(text: str) -> set[str]:
    """The words without their endings, roughly."""
    words = re.findall(r"\w+", text.casefold().replace("'", ""))
    return {re.sub("(ing|edly|ed|es|s|ly)$", "", word)[:6] if len(word) > 4 else word for word in words}


def test_default_config_trains_on_nothing_that_it_evaluates_on():
    sets = config.Prompts()
    train = {name: load_prompts(getattr(sets, name), name) for name in ("red_team", "helpful")}
    held_out = ("eval_red_team", "eval_helpful", "eval_look_alike")
    check_disjoint(train, {name: load_prompts(getattr(sets, name), name) for name in held_out})
