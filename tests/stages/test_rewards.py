"""Where scores come from: rules exactly, judges by row programs, and what has no score stays out of the update."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from cai_jax import Sampler
from cai_jax.chat import completion_ids, turn_end_id
from cai_jax.config import Config, Examples, Grpo, Mesh, Model, Ppo, Preferences, Sampling
from cai_jax.config_rules import validate
from cai_jax.constitution import load_constitution
from cai_jax.errors import UserError
from cai_jax.mesh import make_mesh
from cai_jax.models.pretrained import load_model
from cai_jax.named_runs import load_config
from cai_jax.objectives.ppo import no_scores
from cai_jax.overrides import apply_overrides
from cai_jax.progress import Progress
from cai_jax.provenance import row_seed
from cai_jax.rules import satisfies
from cai_jax.sampler import Score
from cai_jax.stages import grpo, ppo, rewards
from cai_jax.stages.context import prepare
from cai_jax.stages.rollouts import Prompts, Rollouts

TEXTS = ["In short, yes. I hope this helps.", "1. Do it! 2. Do it again!", "", "word " * 30]


def context_of(**settings):
    config = Config(Model("random:llama"), "scores", ppo=Ppo(**settings), grpo=Grpo(rollouts=4, group=2))
    return SimpleNamespace(
        config=config, constitution=load_constitution("verifiable"), row_seed=lambda *parts: row_seed(0, *parts),
        mesh=make_mesh(Mesh(), jax.devices()[:1]), put_rows=lambda batch: batch,
        sampler=lambda model: Sampler(model, max_length=64, rows=2),
    )  # fmt: skip


def rolled(texts=TEXTS, draw="update-0"):
    prompts = [SimpleNamespace(id=f"p{i // 2}", messages=[{"role": "user", "content": "Go."}]) for i in range(4)]
    mask = np.ones((4, 5), np.int32)
    arrays = {
        "tokens": np.random.default_rng(0).integers(3, 200, (4, 9)).astype(np.int32),
        "positions": np.tile(np.arange(9, dtype=np.int32), (4, 1)), "mask": mask,
        "old_logprobs": np.full((4, 5), -5.0, np.float32), "truncated": np.zeros(4, bool),
    }  # fmt: skip
    return Rollouts(draw, prompts, list(texts), arrays)


def test_the_rule_is_the_share_of_checks_that_hold():
    context = context_of(reward="rule", principles="all")
    checks = [principle.check for principle in context.constitution.principles if principle.check]
    want = [np.mean([satisfies(check, text) for check in checks]) for text in TEXTS]
    got = rewards.text_scores(context, "ppo", rewards.Source("rule"), rolled())
    np.testing.assert_allclose(got, np.float32(want))
    assert got.dtype == np.float32 and 0 < min(got) < max(got)


def test_a_drawn_rule_is_one_for_a_prompt_of_a_draw_and_another_later():
    context = context_of(reward="rule")
    drawn = []
    for update in range(20):
        rollouts = rolled(draw=f"update-{update}")
        of_rows = [rewards._principles(context, "ppo", rewards.Source("rule"), rollouts, p) for p in rollouts.prompts]
        assert of_rows[0] == of_rows[1] and of_rows[2] == of_rows[3], "a group is measured by one rule"
        drawn += [of_rows[0][0].id, of_rows[2][0].id]
        scores = rewards.text_scores(context, "ppo", rewards.Source("rule"), rollouts)
        assert scores.tolist() == [satisfies(p.check, t) for (p,), t in zip(of_rows, TEXTS, strict=True)]
    assert len(set(drawn)) == len(context.constitution.principles)


@pytest.fixture(scope="module")
def judge():
    return rewards.Source("judge", load_model("random:llama"))


def length_rater(judge, max_length):
    """Rates by the length of the response; asks the sampler once, as a judge does. Of the empty text it can't say."""

    def rate(messages, response, principles):
        yield Score([*messages, {"role": "assistant", "content": "I rate it "}], ["1", "2"])
        return None if not response else float(len(response))

    return rate


def test_a_judge_is_asked_through_the_sampler(judge, monkeypatch):
    monkeypatch.setattr(rewards, "rater", length_rater)
    scores = rewards.text_scores(context_of(reward="judge"), "ppo", judge, rolled())
    np.testing.assert_array_equal(scores, np.float32([len(TEXTS[0]), len(TEXTS[1]), np.nan, len(TEXTS[3])]))


def test_a_judge_that_can_rate_nothing_is_one_line_to_the_user(judge, monkeypatch):
    monkeypatch.setattr(rewards, "rater", length_rater)
    with pytest.raises(UserError, match="can rate not one of 4 rollouts.*sampler.max_length=64") as refused:
        rewards.text_scores(context_of(reward="judge"), "ppo", judge, rolled([""] * 4))
    assert "\n" not in str(refused.value)


def test_the_shipped_labeler_rates_from_one_to_ten(judge):
    pytest.importorskip("cai_jax.labelers.rating")
    context = context_of(reward="judge")
    context.sampler = lambda model: Sampler(model, max_length=1024, rows=2)
    scores = rewards.text_scores(context, "ppo", judge, rolled())
    assert ((scores >= 1) & (scores <= 10)).all() and len(set(scores.tolist())) > 1


def test_a_rollout_without_a_score_is_left_out_of_the_update(judge, monkeypatch):
    monkeypatch.setattr(rewards, "rater", length_rater)
    reference, prompts = judge.model, Prompts([], 4)
    context = context_of(
        reward="judge", rollouts=4, minibatches=1, response=Sampling(max_new_tokens=5), normalise_scores=True,
    )  # fmt: skip
    value = load_model("random:llama", kind="reward", seed=3)
    frozen = ppo.Frozen(reference, judge, prompts, value.config)
    params = {"policy": reference.params, "value": value.params}
    batch, report, moments = ppo.score_rollouts(context, frozen, params, rolled(), 0.0, 0.1, no_scores())
    assert batch["mask"].sum(axis=1).tolist() == [5, 5, 0, 5]
    assert report["unscored_share"] == 0.25 and float(moments.count) == 3
    assert report["score"] == pytest.approx(np.mean([len(TEXTS[i]) for i in (0, 1, 3)]))
    assert all(np.isfinite(array).all() for array in batch.values())
    assert (batch["advantages"][2] == 0).all() and (batch["advantages"][3] != 0).all()

    batch, report = grpo.score_rollouts(context, grpo.Frozen(reference, judge, prompts), rolled())
    assert batch["mask"].sum(axis=1).tolist() == [5, 5, 0, 5] and report["unscored_share"] == 0.25
    np.testing.assert_allclose(batch["advantages"], [np.sqrt(0.5), -np.sqrt(0.5), 0, 0], atol=1e-3)
    assert np.isfinite(list(report.values())).all()


# what the config may ask for


def prepared(tmp_path, *overrides, stages=("ppo",)):
    common = ["ppo.policy=random:llama", "grpo.policy=random:llama", *overrides]
    config = replace(apply_overrides(load_config("tiny")[1], common), stages=stages)
    validate(config)
    return prepare("tiny", config, tmp_path, False, Progress(tmp_path))


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_rule_needs_a_check_and_no_reward_model(tmp_path, stage):
    context = prepared(tmp_path, f"{stage}.reward=rule", stages=(stage,))
    assert "input.reward_model" not in context.fingerprint(stage)
    with pytest.raises(UserError, match=f"{stage}.reward=rule: no principle .*harmless_helpful.* has a check"):
        prepared(tmp_path, f"{stage}.reward=rule", "constitution=harmless_helpful", stages=(stage,))
    with pytest.raises(UserError, match="needs the artifacts of stage reward_model"):
        prepared(tmp_path, stages=(stage,))


def test_a_judge_is_checked_at_the_door_and_part_of_the_fingerprint(tmp_path):
    own, named = (
        prepared(tmp_path, "ppo.reward=judge", *more).fingerprint("ppo") for more in ((), ("ppo.judge=random:qwen2",))
    )
    assert "input.judge" not in own and named["input.judge"] == load_model("random:qwen2").hash
    with pytest.raises(UserError, match="nowhere"):
        prepared(tmp_path, "ppo.reward=judge", f"ppo.judge={tmp_path}/nowhere")


def aimed_context(*principles, **settings):
    context = context_of(reward="examples", **settings)
    context.constitution = load_constitution("harmless_helpful", principles)
    context.prompts = {"red_team": SimpleNamespace(rows=[SimpleNamespace(id="p0")])}
    context.sampler = lambda model: Sampler(model, max_length=1024, rows=2)
    return context


@pytest.mark.parametrize("per_token", [False, True])
def test_examples_score_by_the_worked_answers_of_the_aim_of_the_prompts_set(judge, per_token, monkeypatch):
    context = aimed_context("no_lecture", "no_scams")  # a worked critique of each aim
    context.config = replace(context.config, preferences=Preferences(examples=Examples(per_token=per_token)))
    monkeypatch.delattr(rewards, "rater")  # no tokenizer need write ratings for it
    scores = rewards.text_scores(context, "ppo", replace(judge, kind="examples"), rolled())
    constitution, tokenizer = context.constitution, judge.model.tokenizer
    shots = {constitution.principle(shot.principle).aim: shot for shot in constitution.critique_few_shots}

    def after(aim, prompt, text):
        shown = (("user", shots[aim].prompt), ("assistant", shots[aim].revision))
        conversation = [*({"role": role, "content": said} for role, said in shown), *prompt.messages]
        return (yield Score(conversation, [completion_ids(tokenizer, text, turn_end_id(tokenizer))]))[0]

    asked = zip(("harmless", "harmless", "helpful", "helpful"), rolled().prompts, TEXTS, strict=True)
    other = {"harmless": "helpful", "helpful": "harmless"}
    pairs = [(after(aim, *rest), after(other[aim], *rest)) for aim, *rest in asked]
    logprobs = iter(Sampler(judge.model, max_length=1024, rows=4).run(itertools.chain(*pairs)))
    want = [(np.mean if per_token else np.sum)(own - against) for own, against in zip(logprobs, logprobs, strict=True)]
    np.testing.assert_allclose(scores, want, atol=1e-3)
    assert len(set(want)) == 4


def test_examples_as_a_reward_are_checked_at_the_door(tmp_path):
    def refused(*overrides, stages=("ppo",)):
        with pytest.raises(UserError) as told:
            prepared(tmp_path, "ppo.reward=examples", "constitution=harmless_helpful", *overrides, stages=stages)
        return str(told.value)

    named = "ppo.reward=examples needs: write one, or take another reward"
    assert f"no principle has the aim helpful, which {named}" in refused("principles=no_scams")
    bare = "principles=true_about_itself"
    assert "needs some: write them, or take examples out of ppo.reward" in refused(bare)
    all_fields = "take examples out of preferences.labelers and judge.also and ppo.reward"
    assert all_fields in refused(bare, "preferences.labelers=examples", stages=("preferences", "ppo"))
    assert "nowhere" in refused(f"ppo.judge={tmp_path}/nowhere")
    watched = ("monitor.every=1", "monitor.judge=rating")  # another judge than the reward, though the same model
    fingerprints = [
        prepared(tmp_path, "ppo.reward=examples", *watched, f"preferences.examples.per_token={each}").fingerprint("ppo")
        for each in (False, True)
    ]
    assert fingerprints[0] != fingerprints[1] and "input.reward_model" not in fingerprints[0]
