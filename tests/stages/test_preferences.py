"""Responses to a prompt and the pairs made of them; labels themselves are in test_labelling.py."""

import shutil
from dataclasses import replace

import pytest

from cai_jax.config import Sampling
from cai_jax.constitution import AIMS, load_constitution
from cai_jax.models.pretrained import load_model
from cai_jax.named_runs import load_config
from cai_jax.overrides import apply_overrides
from cai_jax.progress import Progress
from cai_jax.prompts import worked_answers
from cai_jax.provenance import read_json, row_seed
from cai_jax.run_folder import StageFolder
from cai_jax.sampler import Generate, Sampler
from cai_jax.stages.context import prepare

SETTINGS = {
    "preferences.policy": "random:llama", "preferences.labelers": "rule", "preferences.principles": 0,
    "preferences.responses_per_prompt": 3, "preferences.response.max_new_tokens": 6,
    "preferences.rows_per_shard": 3, "prompts.red_team.limit": 2, "prompts.helpful.limit": 2,
}  # fmt: skip


# One worked critique of each aim, and a labeler that goes by them.
CONTRASTED = {
    "constitution": "harmless_helpful", "principles": "no_lecture,no_scams", "preferences.contrasted": "true",
    "preferences.labelers": "examples", "preferences.matched": "true", "preferences.principles": 1,
    "sampler.max_length": 1024,
}  # fmt: skip


def run_in(run_dir, **settings) -> None:
    changes = [f"{name}={value}" for name, value in (SETTINGS | settings).items()]
    config = apply_overrides(load_config("tiny")[1], changes)
    context = prepare("tiny", replace(config, stages=("preferences",)), run_dir, False, Progress(run_dir))
    context.run_stage("preferences")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The summary of the stage and its folder, three responses a prompt."""
    run_dir = tmp_path_factory.mktemp("run")
    run_in(run_dir)
    return read_json(run_dir / "preferences" / "summary.json"), StageFolder(run_dir, "preferences")


def test_each_two_responses_to_a_prompt_are_a_pair(made):
    summary, folder = made
    rows = folder.read_shards()
    assert summary["pairs"] == len(rows) == 4 * 3
    by_prompt = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    for prompt_id, pairs in by_prompt.items():
        assert [row["id"] for row in pairs] == [f"{prompt_id}/{ab}" for ab in ("0-1", "0-2", "1-2")]
        (first, second), (again, third), (*last,) = [(row["response_a"], row["response_b"]) for row in pairs]
        assert again == first and last == [second, third]
        assert len({response["text"] for response in (first, second, third)}) == 3, "each has a seed of its own"


def test_a_shard_holds_the_pairs_of_so_many_prompts(made):
    _, folder = made
    shards = sorted(folder.path.glob("pairs-*.jsonl"))
    assert [len(path.read_text().splitlines()) for path in shards] == [9, 3]


@pytest.fixture(scope="module")
def contrasted(tmp_path_factory):
    """The same, of contrasted responses."""
    run_dir = tmp_path_factory.mktemp("contrasted")
    run_in(run_dir, **CONTRASTED)
    return read_json(run_dir / "preferences" / "summary.json"), StageFolder(run_dir, "preferences")


def test_contrasted_responses_are_those_of_the_whole_conversation_sampled_alone(contrasted):
    summary, folder = contrasted
    constitution = load_constitution("harmless_helpful", CONTRASTED["principles"].split(","))
    alone = Sampler(load_model("random:llama"), max_length=1024, rows=1, reuse=False)
    aims = set()
    for row in folder.read_shards("pairs"):
        places = map(int, row["id"].split("/")[-1].split("-"))
        for n, response in zip(places, (row["response_a"], row["response_b"]), strict=True):
            worked = worked_answers(constitution, constitution.matching("", response["aim"]))
            seed = row_seed(0, "preferences", row["prompt_id"], n)
            (whole,) = alone.run([one(Generate([*worked, *row["messages"]], Sampling(max_new_tokens=6), seed))])
            assert whole.text == response["text"]
            aims.add(response["aim"])
    assert aims == set(AIMS) and set(summary["contrasted"]) == {"red_team", "helpful"}


def one(request):
    return (yield request)


@pytest.mark.parametrize(("of", "settings"), [("made", {}), ("contrasted", CONTRASTED)])
def test_a_stage_that_lost_a_shard_makes_the_same_bytes_again(of, settings, request, tmp_path):
    _, folder = request.getfixturevalue(of)
    stage = tmp_path / "preferences"
    shutil.copytree(folder.path, stage)
    for path in (*stage.glob("pairs-00001-*"), *stage.glob("opinions-*"), *stage.glob("rows-*"), stage / "done.json"):
        path.unlink()
    run_in(tmp_path, **settings)
    done = read_json(folder.path / "done.json")["artifacts"]
    assert any(name.startswith("pairs-00001") for name in done)
    assert read_json(stage / "done.json")["artifacts"] == done
