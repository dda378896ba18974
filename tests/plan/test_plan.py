"""Plans by arithmetic: what a run needs, what is refused, and that a change that is named does fit."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import pytest

from cai_jax.accelerators import ACCELERATORS, GIB, Accelerator, Slice, parse_slice
from cai_jax.config import STAGES, Mesh, Model
from cai_jax.errors import UserError
from cai_jax.mesh import make_mesh
from cai_jax.models.flops import parameters
from cai_jax.named_runs import load_config
from cai_jax.overrides import apply_overrides
from cai_jax.plan import command, topology
from cai_jax.plan.measure import Measurer, _used, by_arithmetic
from cai_jax.plan.plan import find_change, make_plan, planned_run, smallest_plan
from cai_jax.plan.stages import programs_of
from cai_jax.plan.table import as_json, as_text, refusal
from cai_jax.plan.workload import workload_of
from cai_jax.stages import context

H100 = parse_slice("h100x8")
ARITHMETIC = Measurer(compiles=False)


@pytest.fixture(scope="module")
def ppo():
    return load_config("ppo_7b")[1]


@pytest.fixture(scope="module")
def plan(ppo):
    return make_plan(ppo, H100, ARITHMETIC)


def line(plan, name):
    return next(line for line in plan.lines if line.program.name == name)


def test_a_plan_names_every_program_of_ppo(plan):
    names = [line.program.name for line in plan.lines]
    assert names == ["prepare weights", "share prefix", "prefill", "decode, a step", "score rollouts", "train step"]


def test_arguments_are_the_arrays_of_a_chip(plan, ppo):
    config = plan.models["model.source"][0]
    policy, value = parameters(config), parameters(config, "reward")
    train = line(plan, "train step")
    state = 12 * (policy + value) / H100.chips  # float32 parameters and two moments
    assert train.memory.arguments == pytest.approx(state, rel=0.01)
    # Beside it stand the reference and the reward model.
    assert train.program.resident == pytest.approx(4 * (policy + value) / H100.chips, rel=0.01)
    score = line(plan, "score rollouts")
    held = [each.program.resident + each.memory.arguments for each in (train, score)]
    assert held[0] == pytest.approx(held[1], rel=0.01)  # the same arrays, passed or not
    prepare = line(plan, "prepare weights")
    assert prepare.memory.outputs == pytest.approx(2 * policy / ppo.mesh.tensor, rel=0.01)


def test_work_of_ppo(plan, ppo):
    settings = ppo.ppo
    tokens = settings.rollouts * 1024
    train = line(plan, "train step")
    # Two models, four passes (one of them for full rematerialisation), two FLOPs a parameter and token.
    passes = 2 * 4 * 2 * 7.1e9 * tokens / settings.minibatches
    assert train.program.work.flops == pytest.approx(passes, rel=0.1)
    assert train.program.calls == settings.updates * settings.minibatches
    decode = line(plan, "decode, a step")
    assert decode.bound == "memory"
    waves = settings.rollouts // ppo.sampler.rows
    assert decode.program.calls == (settings.updates + 1) * waves * settings.response.max_new_tokens
    assert sum(plan.shares().values()) == pytest.approx(1)


def test_more_chips_take_less_time_and_memory(ppo, plan):
    half = make_plan(ppo, parse_slice("h100x4"), ARITHMETIC)
    assert line(plan, "train step").memory.arguments < 0.6 * line(half, "train step").memory.arguments
    assert plan.seconds() < half.seconds()


def test_what_a_plan_of_ppo_holds_follows_from_the_choice_of_reward_and_value(ppo, plan):
    """A shared trunk trains one model, a rule has no reward model, a judge has a sampler of its own."""

    def planned(*overrides):
        return make_plan(apply_overrides(ppo, overrides), H100, ARITHMETIC)

    one = 4 * parameters(plan.models["model.source"][0]) / H100.chips
    both, rule = line(plan, "train step"), planned("ppo.reward=rule")
    shared = line(planned("ppo.value_trunk=shared"), "train step")
    assert shared.memory.arguments == pytest.approx(both.memory.arguments / 2, rel=0.02)
    assert shared.program.work.flops < 0.6 * both.program.work.flops
    assert line(rule, "train step").program.resident == pytest.approx(one, rel=0.02), "the reference alone"
    assert line(rule, "score rollouts").program.work.flops < 0.7 * line(plan, "score rollouts").program.work.flops
    assert "ppo.reward_model" not in rule.models
    for reward in ("judge", "examples"):
        judged = planned(f"ppo.reward={reward}")
        assert [each.program.name for each in judged.lines].count("prefill") == 2
        assert line(judged, "train step").program.resident == pytest.approx(2 * one, rel=0.02), "reference and judge"


@pytest.mark.parametrize("judge, programs", [("rule", 0), ("rating", 3), ("contrast", 3), ("model", 1)])
def test_a_plan_counts_what_the_monitors_do(ppo, plan, judge, programs):
    named = ["monitor.model=random:llama"] if judge == "model" else []
    every = max(1, ppo.ppo.updates // 10)
    config = apply_overrides(ppo, [f"monitor.every={every}", f"monitor.judge={judge}", *named])
    watched = make_plan(config, H100, ARITHMETIC)
    answers, rewards = 4, 1
    assert len(watched.lines) == len(plan.lines) + answers + rewards + programs
    assert plan.seconds() < watched.seconds() < 1.5 * plan.seconds()
    policy = parameters(plan.models["model.source"][0])
    beside = line(watched, "train step").program.resident - line(plan, "train step").program.resident
    whole = 4 * policy / H100.chips if judge in ("rating", "contrast") else 0
    assert beside == pytest.approx(whole, abs=0.01 * 4 * policy / H100.chips)
    sparse = apply_overrides(config, [f"monitor.every={2 * every}"])
    assert make_plan(sparse, H100, ARITHMETIC).seconds() < watched.seconds()
    assert ("monitor.model" in watched.models) == (judge != "rule")


def test_a_plan_of_grpo_has_no_value_model(plan):
    grpo = load_config("grpo_7b")[1]
    of_grpo = make_plan(grpo, H100, ARITHMETIC)
    assert [each.program.name for each in of_grpo.lines] == [each.program.name for each in plan.lines]
    train = line(of_grpo, "train step")
    policy = parameters(of_grpo.models["model.source"][0])
    assert train.memory.arguments == pytest.approx(12 * policy / H100.chips, rel=0.01)
    assert train.program.calls == grpo.grpo.updates * grpo.grpo.minibatches
    assert of_grpo.seconds() < plan.seconds()


@pytest.mark.parametrize("name, overrides", [
    ("ppo_7b", []), ("ppo_7b", ["ppo.value_trunk=shared"]), ("ppo_7b", ["ppo.reward=judge", "ppo.frozen_dtype=int8"]),
    ("ppo_7b", ["ppo.reward=rule", "lora.rank=2"]), ("grpo_7b", []), ("grpo_7b", ["grpo.reward=rule", "lora.rank=2"]),
])  # fmt: skip
def test_what_is_planned_can_be_lowered(name, overrides):
    """The arrays of the plan are those that the stage's programs take, for every choice; lowered for this CPU."""
    config = load_config(name)[1]
    [stage] = config.stages
    small = [f"{stage}.rollouts=16", f"{stage}.minibatches=1", f"{stage}.microbatches=1", "model.source=random:llama",
             "mesh.tensor=1", "mesh.fsdp=1"]  # fmt: skip
    config = apply_overrides(config, [*small, f"{stage}.response.max_new_tokens=16", *overrides])
    run, _ = planned_run(config, parse_slice("h100x1"))
    programs = programs_of(dataclasses.replace(run, mesh=make_mesh(Mesh(1, 1, 1), jax.devices()[:1])))
    for program in (program for program in programs if program.name in ("score rollouts", "train step")):
        assert "func" in program.lower().as_text()


def test_what_is_kept_of_a_layer_and_what_is_done_again(ppo):
    """none keeps all, dots what products make, full a layer's input, for a forward pass or attention's part of it."""
    keeps = {
        remat: line(make_plan(apply_overrides(ppo, [f"model.remat={remat}"]), H100, ARITHMETIC), "train step")
        for remat in ("none", "dots", "full")
    }
    none, dots, full = (keep.program for keep in keeps.values())
    assert none.temporaries > 1.3 * dots.temporaries > 1.3 * 1.3 * full.temporaries
    assert full.work.flops == pytest.approx(none.work.flops * 4 / 3)
    assert 1 < dots.work.flops / none.work.flops < 1.02  # attention is few FLOPs at 1024 tokens
    assert none.work.memory < dots.work.memory < full.work.memory
    assert none.arguments == dots.arguments == full.arguments


def small_chip(gibibytes: float) -> Slice:
    """Eight chips like H100 with other memory."""
    chip = dataclasses.replace(ACCELERATORS["h100"], memory=int(gibibytes * GIB))
    return Slice("h100x8", chip, 8)


@pytest.fixture(scope="module")
def tiny(ppo):
    """PPO of a tiny model in the shape of ppo_7b."""
    return dataclasses.replace(ppo, model=dataclasses.replace(ppo.model, source="random:llama"))


@pytest.mark.parametrize("share, asked", [(0.97, "--set"), (0.8, "--set"), (0.6, "--plan")])
def test_a_refusal_names_a_change_that_fits(tiny, share, asked):
    largest = max(line.total for line in make_plan(tiny, H100, ARITHMETIC).lines)
    piece = small_chip(largest * share / GIB * 16 / 15)
    refused = make_plan(tiny, piece, ARITHMETIC)
    assert refused.too_large
    found = find_change(refused, ARITHMETIC)
    message = refusal(refused, found)
    assert re.search(r"needs \d+\.\d\d GiB a chip and \d+\.\d\d GiB are there: .*" + asked + ".* fits", message)
    settings, larger = re.findall(r"--set (\S+)", message), re.search(r"--plan=h100x(\d+)", message)
    if larger:
        piece = dataclasses.replace(piece, name=f"h100x{larger[1]}", chips=int(larger[1]))
    assert not make_plan(apply_overrides(tiny, settings), piece, ARITHMETIC).too_large


class Stricter(Measurer):
    """A compiler that finds ten times the temporaries of arithmetic in whatever is changed, short of more chips."""

    def __init__(self, plan):
        super().__init__(True, lambda line: self.said.append(line))
        self.as_it_stands, self.said = {line.program.key for line in plan.lines}, []

    def of(self, program):
        memory = by_arithmetic(program)
        changed = program.key not in self.as_it_stands and H100.name in program.key
        return dataclasses.replace(memory, temporaries=memory.temporaries * (10 if changed else 1))


def test_the_search_says_what_it_tries_and_gives_a_candidate_up_at_its_first_program_too_large(tiny):
    plan = make_plan(tiny, H100, ARITHMETIC)
    largest = max(plan.lines, key=lambda line: line.total)
    assert largest.program.name == "train step"
    measurer = Stricter(plan)
    refused = make_plan(tiny, small_chip(0.97 * largest.total / GIB * 16 / 15), measurer)
    (_, piece), mended = find_change(refused, measurer)
    assert not mended.too_large and piece.chips > H100.chips
    tried = [line for line in measurer.said if line.startswith("trying ")]
    assert tried[0] == "trying --set ppo.microbatches=16" and tried[-1] == f"trying --plan={piece.name}"
    assert re.fullmatch(r"ppo: train step: \d+\.\d\d GiB, too large", measurer.said[1])
    assert measurer.said.count(measurer.said[1]) == 1, "what the compiler made of it is remembered"


def test_nothing_helps_a_chip_of_a_kibibyte(tiny):
    refused = make_plan(tiny, small_chip(1e-6), ARITHMETIC)
    assert "no change that was tried fits" in refusal(refused, find_change(refused, ARITHMETIC))


def test_the_smallest_slice(ppo):
    plan = smallest_plan(dataclasses.replace(ppo, mesh=Mesh(data=1, fsdp=-1)), ACCELERATORS["h200"], ARITHMETIC)
    assert not plan.too_large
    half = f"h200x{plan.piece.chips // 2}"
    smaller = make_plan(dataclasses.replace(ppo, mesh=Mesh(data=1, fsdp=-1)), parse_slice(half), ARITHMETIC)
    assert smaller.too_large


def test_adapters_share_what_stays_frozen():
    config = load_config("ppo_7b_lora")[1]
    plan = make_plan(config, H100, ARITHMETIC)
    assert not plan.too_large
    policy = parameters(plan.models["model.source"][0])
    train, score, prepare = (line(plan, name) for name in ("train step", "score rollouts", "prepare weights"))
    models = 2 * 2 * policy / H100.chips  # in bfloat16; adapters and their moments are in float32, half of them split
    assert models < train.total - train.memory.temporaries < 2 * models
    held = train.program.resident + train.memory.arguments
    assert score.program.resident + score.memory.arguments - score.program.shared == pytest.approx(held, rel=0.01)
    assert prepare.program.resident + prepare.memory.arguments == pytest.approx(held, rel=0.01)


@pytest.mark.parametrize("name", ["sft_7b", "sft_7b_lora"])
def test_an_anchor_costs_a_forward_pass_and_no_copy_of_the_model(name):
    config = apply_overrides(load_config(name)[1], ["model.remat=none"])
    plain, anchored = (
        line(make_plan(apply_overrides(config, [f"sft.anchor={anchor}"]), H100, ARITHMETIC), "train step")
        for anchor in (0, 1)
    )
    held = [each.total - each.memory.temporaries for each in (plain, anchored)]
    assert held[1] == pytest.approx(held[0], rel=0.01)
    assert plain.memory.temporaries < anchored.memory.temporaries < 2 * plain.memory.temporaries
    added = anchored.program.work.flops / plain.program.work.flops - 1
    assert added == pytest.approx(1 / 2 if config.lora.rank else 1 / 3, rel=0.3)


@pytest.mark.parametrize("dtype, share", [("bfloat16", 1 / 2), ("int8", 0.26)])
def test_smaller_frozen_models(ppo, plan, dtype, share):
    smaller = make_plan(apply_overrides(ppo, [f"ppo.frozen_dtype={dtype}"]), H100, ARITHMETIC)
    ratio = line(smaller, "train step").program.resident / line(plan, "train step").program.resident
    assert ratio == pytest.approx(share, rel=0.1)


def test_every_stage_has_a_plan():
    config = load_config("cai_7b")[1]
    plan = make_plan(config, H100, ARITHMETIC)
    assert list(dict.fromkeys(line.program.stage for line in plan.lines)) == list(config.stages)
    assert all(line.program.calls > 0 and line.seconds >= 0 for line in plan.lines)


def test_dpo_scores_once_and_trains_without_a_reference_beside_it():
    config = load_config("dpo_7b")[1]
    plan = make_plan(config, H100, ARITHMETIC)
    policy = 4 * parameters(plan.models["model.source"][0]) / H100.chips
    assert not plan.too_large
    train, score = (line(plan, name) for name in ("train step", "score pairs"))
    assert train.memory.arguments == pytest.approx(3 * policy, rel=0.01)
    assert train.program.resident == pytest.approx(policy, rel=0.01)
    pairs = 6 * sum(plan_rows(config))  # of four responses each two
    assert train.program.calls == -(-(pairs - -(-pairs // 5)) // 64)  # a fifth is held out, 64 pairs a step
    assert score.program.calls == -(-(pairs + -(-pairs // 5)) // 16)  # all before training, the held-out after it
    adapted = make_plan(load_config("dpo_7b_lora")[1], H100, ARITHMETIC)
    assert line(adapted, "train step").total < train.total / 1.5


def plan_rows(config):
    return [workload_of(config).rows(name) for name in ("red_team", "helpful")]


def test_best_of_n_draws_n_times_and_trains_where_it_is_distilled():
    config = load_config("best_of_n_7b")[1]
    plan = make_plan(config, H100, ARITHMETIC)
    assert not plan.too_large and line(plan, "train step").program.stage == "best_of_n"
    fewer = make_plan(apply_overrides(config, ["best_of_n.n=4", "best_of_n.distill=false"]), H100, ARITHMETIC)
    assert "train step" not in [each.program.name for each in fewer.lines]
    for name in ("decode, a step", "score texts"):
        ratio = line(plan, name).program.calls / line(fewer, name).program.calls
        assert ratio == pytest.approx(4, rel=0.05)


def test_draws_of_a_revision_are_written_and_scored_and_critiques_can_be_left_out():
    config = load_config("cai_7b")[1]

    def work(*overrides):
        lines = make_plan(apply_overrides(config, overrides), H100, ARITHMETIC).lines
        mine = {each.program.name: each.program.calls for each in lines if each.program.stage == "critique_revision"}
        return mine["decode, a step"], mine["prefill"]

    settings = config.critique_revision
    answer, critique, revision = (
        sampling.max_new_tokens for sampling in (settings.response, settings.critique, settings.revision)
    )

    def written(draws, critique):
        return answer + settings.rounds * (critique + draws * revision)

    (steps, passes), (more_steps, more_passes) = work(), work("critique_revision.draws=4")
    assert more_steps / steps == pytest.approx(written(4, critique) / written(1, critique), rel=0.01)
    assert more_passes > 2 * passes
    rated_steps, rated_passes = work("sft.least_ratio=0.5")
    assert rated_steps == steps and passes < rated_passes < more_passes
    fewer_steps, _ = work("critique_revision.critiques=false")
    assert fewer_steps / steps == pytest.approx(written(1, 0) / written(1, critique), rel=0.01)


def test_contrasted_responses_run_their_prompt_once_for_each_context_and_labels_do_not_change():
    def programs(*overrides):
        config = apply_overrides(load_config("cai_7b")[1], ["preferences.labelers=options", *overrides])
        found = {}
        for each in (x.program for x in make_plan(config, H100, ARITHMETIC).lines if x.program.stage == "preferences"):
            found.setdefault(each.name, []).append(each)
        return found, workload_of(config).starts

    (plain, starts), (contrasted, more_starts) = programs(), programs("preferences.contrasted=true")
    assert starts["responses"] == (0,) and len(more_starts["responses"]) == 2
    assert more_starts["labels"] == starts["labels"]
    (prefill, labels), (more_prefill, more_labels) = plain["prefill"], contrasted["prefill"]
    assert more_prefill.calls / prefill.calls == pytest.approx(2, rel=0.01) and more_labels.calls == labels.calls
    assert more_labels.work == labels.work
    (decode,), (more_decode,) = plain["decode, a step"], contrasted["decode, a step"]
    assert more_decode.calls == decode.calls and more_decode.work.memory > decode.work.memory


def test_more_contenders_take_longer_to_evaluate():
    config = load_config("cai_7b")[1]
    more = dataclasses.replace(config, stages=tuple(stage for stage in STAGES))

    def steps(config):
        lines = make_plan(config, H100, ARITHMETIC).lines
        [decode] = [each for each in lines if (each.program.stage, each.program.name) == ("evaluate", "decode, a step")]
        return decode.program.calls

    assert steps(more) / steps(config) == pytest.approx((5 + config.best_of_n.n) / 3)
    named = apply_overrides(config, ["evaluate.dpo=x", "evaluate.best_of_n=y"])
    assert steps(named) / steps(config) == pytest.approx(5 / 3)


def test_a_plan_of_red_team_prompts_counts_lists_by_category():
    """Twelve categories of shipped prompts, so many lists of each; the judge of categories reads the given ones too."""
    config = dataclasses.replace(load_config("cai_7b")[1], stages=("red_team",))
    plan = make_plan(config, H100, ARITHMETIC)
    write, answer = [each.program for each in plan.lines if each.program.name == "decode, a step"]
    lists = 12 * config.red_team.draws
    batches = -(-lists // config.sampler.rows), -(-5 * lists // config.sampler.rows)
    assert write.calls == batches[0] * config.red_team.request.max_new_tokens
    assert answer.calls == batches[1] * config.red_team.response.max_new_tokens
    assert any("not those that it will write" in line for line in plan.assumptions)


def test_text_and_json_say_whose_numbers(plan):
    text = as_text("ppo_7b", plan, price=2.5)
    assert "no compiler for this chip" in text and "Nothing was run" in text and "cost" in text
    written = json.loads(json.dumps(as_json("ppo_7b", plan, 2.5, None)))
    assert written["slice"] == {"name": "h100x8", "chips": 8, "machines": 1, "mesh": plan.mesh}
    assert written["sources"] == {
        "bytes": ["arithmetic"], "flops": "arithmetic", "seconds": "arithmetic from published peaks",
    }  # fmt: skip
    program = written["programs"][0]
    assert program["total_bytes"] == (
        program["arguments_bytes"] + program["outputs_bytes"] + program["temporaries_bytes"] + program["beside_bytes"]
    )
    hours = written["total"]["hours_expected"]
    assert written["total"]["cost_expected"] == pytest.approx(hours * 8 * 2.5)
    assert written["total"]["hours_at_peak"] == pytest.approx(
        sum(p["seconds_at_peak"] * p["calls"] for p in written["programs"]) / 3600
    )
    assert written["assumptions"]


def test_the_compilers_refusal_is_read():
    message = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. " \
        "Used 41.50G of 30.75G hbm. Exceeded hbm capacity by 10.75G."
    assert _used(message) == int(41.5 * GIB)
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (400.00G) " \
        "exceeds available HBM (30.75G)."
    assert _used(message) == 400 * GIB
    assert _used("INTERNAL: something else") is None


def test_rows_of_other_stages_do_not_matter(ppo):
    class SixteenWays:
        shape = {"data": 1, "fsdp": 16, "tensor": 1}

    context.check_rows(ppo, SixteenWays)  # sft.batch_size is 8 by default, and sft is not selected
    with pytest.raises(UserError, match="sft.batch_size"):
        context.check_rows(dataclasses.replace(ppo, stages=("sft",)), SixteenWays)


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(command, "set_environment", lambda: None)


def test_the_command_prints_writes_and_refuses(quiet, capsys, tmp_path):
    config = load_config("tiny")[1]
    command.plan_run("tiny", config, "h100x1", str(tmp_path / "plan.json"), None)
    out = capsys.readouterr().out
    assert out.startswith("tiny on h100x1: 1 chips on 1 machine,")
    assert json.loads((tmp_path / "plan.json").read_text())["fits"] is True
    large = dataclasses.replace(config, model=Model("Qwen/Qwen2.5-14B"))
    with pytest.raises(UserError, match="h100x1: .* needs .* GiB a chip"):
        command.plan_run("large", large, "h100x1", str(tmp_path / "plan.json"), None)
    assert json.loads((tmp_path / "plan.json").read_text())["fits"] is False


def test_wrong_names_and_prices(quiet, ppo):
    with pytest.raises(UserError, match="no accelerator 'v4-33'; nearest: v4-32"):
        command.plan_run("ppo_7b", ppo, "v4-33", None, None)
    with pytest.raises(UserError, match="--price=-1"):
        command.plan_run("ppo_7b", ppo, "h100x8", None, -1.0)
    with pytest.raises(UserError, match="--plan_json=/nowhere/at/all.json: there is no such folder"):
        command.plan_run("ppo_7b", ppo, "h100x8", "/nowhere/at/all.json", None)


def test_flags_of_a_plan_without_a_plan():
    done = subprocess.run(
        [sys.executable, "-m", "cai_jax.launch", "--config=tiny", "--price=2"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--price belong to a plan" in done.stderr


def test_a_missing_compiler_says_how_to_install_it(monkeypatch, quiet, ppo):
    monkeypatch.setattr(topology, "has_compiler", lambda: False)
    with pytest.raises(UserError, match=r"v4-32: the TPU compiler is not installed: pip install 'cai-jax\[plan\]'"):
        command.plan_run("ppo_7b", ppo, "v4-32", None, None)


def test_a_mesh_that_does_not_fit_the_slice(quiet, ppo):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        command.plan_run("ppo_7b", dataclasses.replace(ppo, mesh=Mesh(1, 3, 1)), "h100x8", None, None)


def test_every_accelerator_has_a_name_for_its_plan():
    assert all(isinstance(chip, Accelerator) and chip.platform in ("tpu", "gpu") for chip in ACCELERATORS.values())


def test_the_judge_stage_asks_the_model_that_labels(ppo):
    stages = dataclasses.replace(ppo, stages=("judge",))
    judge = make_plan(stages, H100, ARITHMETIC)
    assert {each.program.stage for each in judge.lines} == {"judge"}
    assert [each.program.name for each in judge.lines][-1] in ("prefill", "decode, a step")
    more = make_plan(apply_overrides(stages, ["judge.also=contrast,rating", "judge.pleas=20"]), H100, ARITHMETIC)
    assert more.seconds() > judge.seconds() > 0
    other = make_plan(apply_overrides(stages, ["preferences.judge=random:llama"]), H100, ARITHMETIC)
    assert other.seconds() < judge.seconds()
