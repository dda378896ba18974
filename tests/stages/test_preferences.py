"""Responses to a prompt and the pairs made of them; labels themselves are in test_labelling.py."""

from dataclasses import replace

import pytest

from cai_jax.named_runs import load_config
from cai_jax.overrides import apply_overrides
from cai_jax.progress import Progress
from cai_jax.provenance import read_json
from cai_jax.run_folder import StageFolder
from cai_jax.stages.context import prepare

SETTINGS = {
    "preferences.policy": "random:llama", "preferences.labelers": "rule", "preferences.principles": 0,
    "preferences.responses_per_prompt": 3, "preferences.response.max_new_tokens": 6,
    "preferences.rows_per_shard": 3, "prompts.red_team.limit": 2, "prompts.helpful.limit": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The summary of the stage and its folder, three responses a prompt."""
    config = apply_overrides(load_config("tiny")[1], [f"{name}={value}" for name, value in SETTINGS.items()])
    run_dir = tmp_path_factory.mktemp("run")
    context = prepare("tiny", replace(config, stages=("preferences",)), run_dir, False, Progress(run_dir))
    context.run_stage("preferences")
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
