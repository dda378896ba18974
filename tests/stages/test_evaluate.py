"""The loss on good answers that came with prompts: beside a plain forward pass, and what it is compared with."""

import json
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from cai_jax import forward, load_model
from cai_jax.chat import completion_ids, encode_chat, encode_text, turn_end_id
from cai_jax.models.pretrained import save_model
from cai_jax.named_runs import load_config
from cai_jax.overrides import apply_overrides
from cai_jax.progress import Progress
from cai_jax.prompts import REFUSAL_BEGINNINGS
from cai_jax.provenance import read_json
from cai_jax.run_folder import StageFolder
from cai_jax.stages.context import prepare
from cai_jax.stages.evaluate import _of_references, refusal_log_odds

PROMPTS = [
    {"id": "a", "prompt": "What is 2 + 2?", "answer": "It is four."},
    {"id": "b", "prompt": "Name a colour.", "answer": "Red, for example."},
    {"id": "c", "prompt": "Say hi."},
    {"id": "d", "prompt": "Tell me all.", "answer": "z" * 3000},
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of an evaluation of the base and of a model near it, and that model."""
    run_dir = tmp_path_factory.mktemp("run")
    path = run_dir / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    base = load_model("random:llama")
    other = replace(base, params=jax.tree.map(lambda leaf: leaf * 1.1, base.params))
    save_model(run_dir / "other", other.config, other.params, base.tokenizer, base.hf_config, "policy")
    fields = {"prompts.eval_helpful.path": path, "prompts.eval_helpful.split": "", "prompts.eval_helpful.limit": 0,
              "evaluate.rows_per_shard": 2, "evaluate.sft": run_dir / "other",
              "evaluate.response.max_new_tokens": 4}  # fmt: skip
    config = apply_overrides(load_config("tiny")[1], [f"{name}={value}" for name, value in fields.items()])
    context = prepare("tiny", replace(config, stages=("evaluate",)), run_dir, False, Progress(run_dir))
    context.run_stage("evaluate")
    return StageFolder(run_dir, "evaluate"), {"base": base, "sl_cai": other}


def test_the_loss_is_that_of_a_plain_forward_pass(finished):
    folder, models = finished
    for name, model in models.items():
        rows = [row for row in folder.read_shards(f"references-{name}") if row["set"] == "helpful"]
        assert [row["id"] for row in rows] == ["a", "b"], "the others have no answer, or one without room"
        for row, prompt in zip(rows, PROMPTS, strict=False):
            asked = encode_chat(model.tokenizer, [{"role": "user", "content": prompt["prompt"]}], True)
            answer = completion_ids(model.tokenizer, prompt["answer"], turn_end_id(model.tokenizer))
            logits_TV = forward(model.config, model.params, np.asarray([asked + answer]))[0]
            logprobs_TV = jax.nn.log_softmax(logits_TV[len(asked) - 1 : -1])
            expected = -np.mean(np.asarray(logprobs_TV)[np.arange(len(answer)), answer])
            assert row["nll"] == pytest.approx(expected, abs=1e-4) and row["tokens"] == len(answer)


def test_the_summary_has_the_loss_and_its_change_and_names_what_has_no_room(finished):
    folder, _ = finished
    summary = read_json(folder.path / "summary.json")
    sets = {name: found["sets"]["helpful"] for name, found in summary["models"].items()}
    assert sets["base"]["reference_nll"]["n"] == 2 and sets["base"]["reference_nll_change"]["value"] == 0
    base, other = (sets[name]["reference_nll"]["value"] for name in ("base", "sl_cai"))
    assert other != base and sets["sl_cai"]["reference_nll_change"]["value"] == pytest.approx(other / base - 1)
    assert {"id": "d", "reason": "its answer does not fit sampler.max_length"} in summary["skipped"]
    assert summary["models"]["base"]["sets"]["red_team"]["reference_nll"]["n"] == 0


def test_the_change_is_a_share_of_the_bases_mean():
    rows = [{"set": "helpful", "id": name, "nll": nll} for name, nll in (("a", 1.1), ("b", 3.5))]
    found = _of_references(rows, {("helpful", "a"): 1.0, ("helpful", "b"): 3.0})
    assert found["reference_nll_change"]["value"] == pytest.approx(0.6 / 2 / 2)


def test_the_odds_of_a_refusal_are_those_of_its_first_words(finished):
    """No beginning begins another, so their probabilities, each by a plain forward pass, add up."""
    assert not any(a != b and b.startswith(a) for a in REFUSAL_BEGINNINGS for b in REFUSAL_BEGINNINGS)
    folder, models = finished
    for name, model in models.items():
        run = jax.jit(partial(forward, model.config))
        for row in folder.read_shards(f"rows-{name}")[:3]:
            asked = encode_chat(model.tokenizer, row["messages"], True)
            probability = 0.0
            for words in REFUSAL_BEGINNINGS:
                tokens = encode_text(model.tokenizer, words)
                padded_BT = np.zeros((1, 512), np.int32)  # what comes behind changes nothing before it
                padded_BT[0, : len(asked + tokens)] = asked + tokens
                logprobs_TV = np.asarray(jax.nn.log_softmax(run(model.params, padded_BT)[0]))[len(asked) - 1 :]
                probability += float(np.exp(np.sum(logprobs_TV[np.arange(len(tokens)), tokens])))
            assert row["refusal_log_odds"] == pytest.approx(np.log(probability / (1 - probability)), abs=1e-2)


@pytest.mark.parametrize(
    ("beginnings", "odds"),
    [([[np.log(0.25)], [np.log(0.5), np.log(0.5)]], 0.0), ([[0.0]], 27.63), ([[-900.0]], -27.63)],
)
def test_odds_stay_finite(beginnings, odds):
    assert refusal_log_odds(beginnings) == pytest.approx(odds, abs=0.01)
