import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_jax import named_runs
from cai_jax.config import OPTIONAL, STAGES, Config, Mesh, Model, Ppo
from cai_jax.config_rules import validate
from cai_jax.errors import UserError
from cai_jax.named_runs import load_config
from cai_jax.overrides import apply_overrides, flatten, format_value, to_dict


def base() -> Config:
    return Config(Model("random:llama"), description="a test")


def error_of(function, *args) -> str:
    with pytest.raises(UserError) as raised:
        function(*args)
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    return message


def write_run(folder: Path, text: str, name: str = "mine.py") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


# ---------------------------------------------------------------- overrides

_VALUES = {
    bool: st.booleans(),
    int: st.integers(),
    float: st.floats(allow_nan=False),
    str: st.text(),
    list: st.lists(st.from_regex(r"[a-z_]+", fullmatch=True)),
}


@settings(max_examples=20, deadline=None)  # an example draws more than a hundred fields
@given(st.data())
def test_overrides_undo_flatten_for_every_field(data):
    values = {name: data.draw(_VALUES[type(value)], label=name) for name, value in flatten(base()).items()}
    config = apply_overrides(base(), [f"{name}={format_value(value)}" for name, value in values.items()])
    assert flatten(config) == values


def test_overrides_have_the_type_of_the_field():
    config = apply_overrides(base(), [
        "ppo.kl_coef=1", "sft.optimizer.learning_rate=1e-5", "ppo.whiten_advantages=False", "stages=sft, ppo",
        "constitution=a=b", "mesh.fsdp=-1",
    ])
    assert config.ppo.kl_coef == 1.0 and isinstance(config.ppo.kl_coef, float)
    assert config.sft.optimizer.learning_rate == 1e-5
    assert config.reward_model.optimizer == base().reward_model.optimizer
    assert config.ppo.whiten_advantages is False
    assert config.stages == ("sft", "ppo")
    assert config.constitution == "a=b"
    assert config.mesh == Mesh(fsdp=-1)


def test_the_last_override_of_a_field_stands():
    assert apply_overrides(base(), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("override, told", [
    ("ppo.kl_coeff=1", "did you mean ppo.kl_coef?"),
    ("kl_coef=1", "did you mean ppo.kl_coef?"),
    ("pop.gamma=1", "did you mean ppo.gamma?"),
    ("sead=1", "did you mean seed?"),
    ("b1=1", "did you mean sft.optimizer.b1?"),
    ("ppo=1", "ppo.policy"),
    ("ppo.optimizer=x", "ppo.optimizer.learning_rate"),
    ("ppo.updates.x=1", "no such field"),
    ("=1", "name=value"),
    ("ppo.updates", "name=value"),
    ("ppo.updates=1.5", "a whole number"),
    ("ppo.updates=", "a whole number"),
    ("ppo.kl_coef=small", "a number"),
    ("ppo.whiten_advantages=1", "true or false"),
])
def test_a_wrong_override_is_refused_by_name(override, told):
    message = error_of(apply_overrides, base(), [override])
    assert told in message
    assert override.partition("=")[0] in message


def test_nested_and_flat_forms_say_the_same():
    flat = {}

    def walk(node, prefix):
        for name, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            else:
                flat[prefix + name] = value

    walk(json.loads(json.dumps(to_dict(base()))), "")
    assert flat == flatten(base())


# ---------------------------------------------------------------- validate


@pytest.mark.parametrize("override", [
    "model.source=", "model.dtype=float31", "model.compute_dtype=fp32", "model.remat=some", "constitution= ",
    "description=", "seed=-1", "seed=4294967296", "mesh.data=0", "mesh.fsdp=-2", "mesh.tensor=0",
    "prompts.red_team.path=", "prompts.helpful.prompt=", "prompts.eval_look_alike.limit=-1",
    "sampler.rows=0", "sampler.max_length=1", "critique_revision.rounds=0",
    "critique_revision.rows_per_shard=0", "critique_revision.response.temperature=-0.1",
    "critique_revision.response.temperature=nan", "critique_revision.critique.top_k=-1",
    "critique_revision.critique.top_p=0", "critique_revision.revision.top_p=1.01", "sft.helpful.min_p=1",
    "sft.helpful.repetition_penalty=0", "sft.helpful.max_new_tokens=0", "sft.epochs=0", "sft.batch_size=0",
    "sft.microbatches=0", "sft.sequence_length=1", "sft.checkpoint_every=0", "sft.optimizer.learning_rate=0",
    "sft.optimizer.learning_rate=inf", "sft.optimizer.schedule=cosin", "sft.optimizer.warmup_fraction=1",
    "sft.optimizer.weight_decay=-1", "sft.optimizer.b1=1", "sft.optimizer.b2=-0.1", "sft.optimizer.eps=0",
    "sft.optimizer.clip_norm=0", "preferences.responses_per_prompt=1", "sft.drop=revision_long",
    "critique_revision.principles=all", "critique_revision.copy_overlap=0", "preferences.examples.scale=0",
    "preferences.response.temperature=0", "ppo.red_team_share=1.1", "grpo.red_team_share=-0.1",
    "preferences.labelers=", "preferences.labelers=options,options", "preferences.labelers=opinions",
    "judge.also=options", "judge.also=rating,rating", "judge.also=rater", "judge.minimum_accuracy=0.49",
    "judge.minimum_accuracy=1", "judge.pleas=-1", "judge.principles=some", "judge.on_failure=warn",
    "preferences.principles=-1", "preferences.orders=second", "preferences.thought.most=0.5",
    "preferences.thought.most=1.1", "preferences.thought.reasoning.max_new_tokens=2048", "preferences.contrast.scale=0",
    "preferences.rating.scale=0", "preferences.rule.probability=0.5", "preferences.filters.least_confidence=0.4",
    "preferences.filters.least_confidence=1", "reward_model.held_out=0", "reward_model.held_out=1",
    "reward_model.center=-1",
    "reward_model.max_length=1", "ppo.updates=0", "ppo.epochs=0", "ppo.minibatches=0", "ppo.kl_coef=-1",
    "ppo.kl_estimator=k4", "ppo.gamma=1.1", "ppo.lam=-0.1", "ppo.clip=0", "ppo.value_clip=0",
    "ppo.value_coef=-1", "ppo.missing_eos_penalty=-1", "ppo.max_prompt_tokens=0",
    "ppo.response.temperature=0", "ppo.response.top_p=0.9", "ppo.response.top_k=5", "ppo.response.min_p=0.1",
    "ppo.response.repetition_penalty=1.1", "evaluate.rows_per_shard=0",
    "ppo.reward=oracle", "ppo.principles=some", "ppo.value_trunk=half", "ppo.max_update_kl=-1", "ppo.kl_target=-1",
    "ppo.kl_horizon=0", "ppo.kl_per=row", "ppo.score_clip=-1", "grpo.group=1", "grpo.group=7", "grpo.length_norm=none",
    "grpo.reward=none", "grpo.clip=0", "grpo.rollouts=0", "grpo.minibatches=3", "grpo.response.temperature=0",
    "grpo.response.top_p=0.9", "grpo.frozen_dtype=int4",
    "evaluate.response.max_new_tokens=2048", "critique_revision.critique.max_new_tokens=5000",
    "sft.microbatches=3", "reward_model.microbatches=5", "ppo.rollouts=63", "ppo.minibatches=3",
    "ppo.max_prompt_tokens=2000", "constitution=a\0b", "ppo.frozen_dtype=int4", "lora.alpha=0",
    "lora.targets=", "lora.targets=q,embed", "lora.targets=q,q", "dpo.kind=sigmod", "dpo.beta=0", "dpo.smoothing=0.5",
    "dpo.microbatches=3", "dpo.held_out=1", "best_of_n.n=1", "best_of_n.response.temperature=0",
    "best_of_n.microbatches=3",
])
def test_a_value_out_of_range_is_refused_by_field(override):
    config = apply_overrides(base(), [override])
    assert override.partition("=")[0] in error_of(validate, config)


@pytest.mark.parametrize("override", [
    "model.dtype=bfloat16", "model.remat=full", "seed=4294967295", "mesh.tensor=1", "ppo.kl_coef=0",
    "critique_revision.response.temperature=0", "critique_revision.response.top_p=0.01",
    "critique_revision.response.min_p=0", "sft.optimizer.warmup_fraction=0", "ppo.gamma=1", "ppo.lam=0",
    "ppo.max_prompt_tokens=896", "evaluate.response.max_new_tokens=1023", "sft.microbatches=8",
    "preferences.labelers=options,thought,contrast,rating,rule", "preferences.principles=0",
    "preferences.thought.most=1",
    "preferences.rule.probability=1", "preferences.filters.least_confidence=0.5", "stages=evaluate",
    "ppo.reward=judge", "ppo.reward=rule", "ppo.principles=all", "ppo.value_trunk=shared", "ppo.kl_per=sequence",
    "ppo.kl_target=6", "ppo.max_update_kl=0.1", "ppo.score_clip=3", "ppo.normalise_scores=true", "grpo.group=2",
    "grpo.length_norm=limit", "grpo.scale_advantages=false", "grpo.kl_coef=0", "grpo.reward=examples", "stages=grpo",
    "stages=ppo,grpo",
    "dpo.smoothing=0.499", "best_of_n.n=2", "stages=dpo,best_of_n", "stages=evaluate", "stages=sft,ppo", "lora.rank=1",
    "lora.targets=v", "ppo.frozen_dtype=int8",
])
def test_a_value_on_the_edge_of_its_range_is_taken(override):
    validate(apply_overrides(base(), [override]))


@pytest.mark.parametrize(("overrides", "told"), [
    (["sft.anchor=1", "sft.mixer=revisions=1"], "sft.anchor (1) .* sft.mixer must have helpful and one more set"),
    (["sft.anchor=1", "sft.mixer=helpful=1"], "sft.anchor (1) .* sft.mixer must have helpful and one more set"),
])
def test_settings_of_sft_that_would_do_nothing_are_refused(overrides, told):
    start, end = told.split(".*")
    error = error_of(validate, apply_overrides(base(), overrides))
    assert error.startswith(start) and error.endswith(end)


@pytest.mark.parametrize(("overrides", "prompts"), [
    (["ppo.red_team_share=0.001"], 64),
    (["grpo.rollouts=8", "grpo.group=4", "grpo.red_team_share=0.2"], 2),
    (["grpo.rollouts=8", "grpo.group=4", "grpo.red_team_share=0.9"], 2),
])
def test_a_share_that_leaves_a_set_no_prompt_is_refused(overrides, prompts):
    told = error_of(validate, apply_overrides(base(), overrides))
    assert f"leaves one of the sets no prompt of the {prompts} of an update: raise the rollouts" in told


@pytest.mark.parametrize("name", [
    name for name, value in flatten(base()).items() if isinstance(value, (int, float)) and not isinstance(value, bool)])
def test_no_number_goes_unchecked(name):
    assert name in error_of(validate, apply_overrides(base(), [f"{name}=-2"]))


@pytest.mark.parametrize("overrides, told", [
    (["dpo.kind=ipo", "dpo.smoothing=0.1"], "dpo.smoothing (0.1) must be 0 with dpo.kind=ipo"),
    (["dpo.kind=hinge", "dpo.soft_labels=true"], "dpo.soft_labels goes with dpo.kind=sigmoid"),
    (["dpo.kind=robust", "dpo.soft_labels=true"], "dpo.soft_labels goes with dpo.kind=sigmoid"),
    (["dpo.smoothing=0.1", "dpo.soft_labels=true"], "dpo.smoothing=0"),
    (["dpo.nll_coef=1", "dpo.soft_labels=true"], "dpo.nll_coef (1) must be 0 with dpo.soft_labels"),
])
def test_labels_of_dpo_are_smoothed_in_one_way_where_the_loss_has_it(overrides, told):
    assert told in error_of(validate, apply_overrides(base(), overrides))
    validate(apply_overrides(base(), ["dpo.kind=robust", "dpo.smoothing=0.1"]))
    validate(apply_overrides(base(), ["dpo.soft_labels=true"]))


@pytest.mark.parametrize("stages, told", [
    ((), "names no stage"),
    (("stf",), "did you mean sft?"),
    (("ppo", "sft"), "sft,ppo"),
    (("sft", "sft"), "each named once"),
])
def test_stages_are_known_and_in_order(stages, told):
    assert told in error_of(validate, dataclasses.replace(base(), stages=stages))


def test_lengths_of_stages_that_do_not_run_do_not_matter():
    validate(apply_overrides(base(), ["stages=sft", "evaluate.response.max_new_tokens=5000",
                                      "ppo.max_prompt_tokens=5000"]))


def test_a_labeler_that_does_not_exist_brings_the_nearest_to_mind():
    config = apply_overrides(base(), ["preferences.labelers=options,thougt"])
    assert "no labeler 'thougt'; did you mean thought?" in error_of(validate, config)


def test_consistency_needs_both_orders():
    config = apply_overrides(base(), ["preferences.orders=first", "preferences.filters.consistent=true"])
    assert "preferences.filters.consistent needs both orders" in error_of(validate, config)


def test_frozen_models_have_no_dtype_of_their_own_under_adapters():
    config = apply_overrides(base(), ["lora.rank=4", "ppo.frozen_dtype=int8"])
    assert "ppo.frozen_dtype (int8) must be empty" in error_of(validate, config)
    config = apply_overrides(base(), ["lora.rank=4", "grpo.frozen_dtype=bfloat16"])
    assert "grpo.frozen_dtype (bfloat16) must be empty" in error_of(validate, config)


def test_an_adaptive_kl_coefficient_cannot_start_at_nothing():
    config = apply_overrides(base(), ["ppo.kl_target=6", "ppo.kl_coef=0"])
    assert "ppo.kl_coef must be above 0 with ppo.kl_target=6.0" in error_of(validate, config)


def test_the_optional_stages_run_where_they_are_named():
    assert not set(base().stages) & set(OPTIONAL) and set(base().stages) | set(OPTIONAL) == set(STAGES)


def test_only_one_mesh_axis_takes_what_is_left():
    assert "only one of" in error_of(validate, dataclasses.replace(base(), mesh=Mesh(data=-1, fsdp=-1)))


@pytest.mark.parametrize("config, told", [
    (dataclasses.replace(base(), seed="1"), "seed must be of type int"),
    (dataclasses.replace(base(), seed=True), "seed must be of type int"),
    (dataclasses.replace(base(), stages=["sft"]), "stages must be a tuple of str"),
    (dataclasses.replace(base(), mesh=None), "mesh must be a Mesh"),
    (dataclasses.replace(base(), ppo=Ppo(kl_coef="0.1")), "ppo.kl_coef must be of type float"),
    (dataclasses.replace(base(), ppo=Ppo(whiten_advantages=1)), "ppo.whiten_advantages must be of type bool"),
])
def test_a_value_of_the_wrong_type_in_a_file_is_refused(config, told):
    assert told in error_of(validate, config)


def test_a_whole_number_is_a_number():
    validate(dataclasses.replace(base(), ppo=Ppo(kl_coef=1)))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", [name for name, _ in named_runs.named_runs()])
def test_every_named_run_is_valid(name):
    loaded_name, config = load_config(name)
    validate(config)
    assert loaded_name == name


def test_the_named_runs_of_the_readme_are_there():
    names = {name for name, _ in named_runs.named_runs()}
    assert {"tiny", "cai_smollm2", "cai_7b", "sft_7b", "rm_7b", "ppo_7b"} <= names


def test_the_demo_looks_for_its_model_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CAI_JAX_CACHE", str(tmp_path))
    assert load_config("cai_smollm2")[1].model.source == str(tmp_path / "SmolLM2-135M-Instruct")


def test_a_config_outside_of_the_checkout_is_named_after_its_file(tmp_path):
    text = "from cai_jax import config as c\ndef config():\n    return c.Config(c.Model('m'), 'my run')\n"
    assert load_config(write_run(tmp_path, text)) == ("mine", Config(Model("m"), "my run"))


def test_a_run_named_like_a_module_does_not_stand_in_its_way(tmp_path):
    text = "import json\nfrom cai_jax import config as c\njson.dumps(1)\n" \
           "def config():\n    return c.Config(c.Model('m'), 'my run')\n"
    assert load_config(write_run(tmp_path, text, "json.py"))[0] == "json"
    assert json.dumps(1) == "1"


def test_loading_leaves_no_files_behind(tmp_path):
    write_run(tmp_path, "def config(): pass")
    error_of(load_config, str(tmp_path / "mine.py"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


@pytest.mark.parametrize("text, told", [
    ("x = 1\ndef config(:\n", "mine.py:2: "),
    ("x = 1\n", "has no function config()"),
    ("config = 3\n", "has no function config()"),
    ("def config(): return {}\n", "not dict"),
    ("import no_such_module\n", "mine.py:1: ModuleNotFoundError"),
    ("def config():\n    y = 1\n    return 1 / 0\n", "mine.py:3: ZeroDivisionError"),
    ("def config(a): pass\n", "TypeError"),
    ("import sys\ndef config():\n    sys.exit('bye')\n", "mine.py:3: SystemExit"),
    ("def config():\n    raise ValueError('a\\nb')\n", "ValueError: a b"),
    ("from cai_jax import config as c\ndef config():\n    return c.Ppo(kl_coeff=1)\n", "did you mean kl_coef?"),
    ("\0", "mine.py"),
])
def test_a_broken_config_file_is_one_line_with_its_place(tmp_path, text, told):
    message = error_of(load_config, write_run(tmp_path, text))
    assert told in message
    assert str(tmp_path / "mine.py") in message


def test_a_config_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "mine.py").write_bytes(b"x = '\xff'")
    assert "mine.py" in error_of(load_config, str(tmp_path / "mine.py"))


@pytest.mark.parametrize("asked, told", [
    ("tyni", "did you mean tiny?"),
    ("ppo7b", "did you mean ppo_7b?"),
    ("zzzzzz", "named runs: best_of_n_7b, cai_7b, "),
    ("configs/no/tiny.py", "no config file configs/no/tiny.py; did you mean tiny?"),
])
def test_a_missing_config_names_the_nearest_and_the_rest(asked, told):
    assert told in error_of(load_config, asked)


def test_an_installed_package_brings_its_configs(monkeypatch, tmp_path):
    package = tmp_path / "cai_jax"
    (package / "configs").mkdir(parents=True)
    monkeypatch.setattr(named_runs, "__file__", str(package / "named_runs.py"))
    assert named_runs.configs_folder() == package / "configs"


def test_a_broken_file_does_not_hide_the_other_runs(monkeypatch, tmp_path):
    write_run(tmp_path, "def config(:", "broken.py")
    write_run(tmp_path, "from cai_jax import config as c\n"
                        "def config(): return c.Config(c.Model('m'), 'my run')\n", "good.py")
    monkeypatch.setattr(named_runs, "configs_folder", lambda: tmp_path)
    runs = dict(named_runs.named_runs())
    assert runs["good"] == "my run"
    assert "broken.py:1" in runs["broken"]
