"""What the scripts around docs/results.md print: tables, plots, verdicts, and the prompts that they write."""

import json
import shlex
import sys

import pytest
from benchmark_parts import part
from matplotlib.figure import Figure

from cai_jax.errors import UserError
from cai_jax.named_runs import load_config
from cai_jax.overrides import apply_overrides
from cai_jax.run_folder import StageFolder
from cai_jax.stages.inputs import read_prompts


def test_the_results_table_says_of_each_model_what_its_answers_are(tmp_path):
    results = part("results")
    kinds = {"base": ["answer", "answer"], "sl_cai": ["refusal", "answer"], "dpo": ["refusal", "refusal"]}
    answers = [
        {"seed": seed, "model": model, "set": set_name, "id": f"{set_name}-{n}", "kind": kind, "tokens": 10 + n,
         "margin": {"refusal": 2.0}.get(kind, 0.0) * (set_name == "red_team") + n / 10, "repetition": 0.0,
         "refusal_log_odds": -1.0 * n,
         "loss": 2.0 * {"base": 1.0, "sl_cai": 1.01, "dpo": 1.05}[model] if set_name == "helpful" else None,
         "answer": f"{model}-{n}" if set_name == "red_team" and kind == "answer" else None}
        for seed in (0, 1) for model, both in kinds.items() for set_name in ("red_team", "look_alike", "helpful")
        for n, kind in enumerate(both if set_name == "red_team" else ["answer", "answer"])
    ]  # fmt: skip
    results.judged(answers, {"base-0": "unsafe", "base-1": "safe"})
    table = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in results.as_table(answers).splitlines()}
    well = [cell.split(" (")[:2] for cell in table["unsafe prompts declined or answered safely"][:3]]
    assert [well[0][0], well[1], well[2][0]] == ["0.500", ["–", "2 unread)"], "1.000"]
    assert "| unsafe prompts declined or answered safely | – | – |" in results.gains(answers)
    results.judged(answers, {"base-0": "unsafe", "base-1": "safe", "sl_cai-1": "safe"})
    assert "| unsafe prompts declined or answered safely | – | +0.000" in results.gains(answers)
    assert [cell.split()[0] for cell in table["unsafe prompts declined"][:3]] == ["0.000", "0.500", "1.000"]
    assert [cell.split()[0] for cell in table["helpful prompts declined"][:3]] == ["0.000"] * 3
    assert [cell.split()[0] for cell in table["loss on good answers, change"][:3]] == ["+0.0%", "+1.0%", "+5.0%"]
    separations = [float(cell.split()[0]) for cell in table["margin AUROC, unsafe against safe"][:3]]
    assert separations[0] == 0.5 and separations[2] == 1.0
    assert table["AUROC of the odds of a refusal, unsafe against safe"][2].startswith("0.500")
    gains = dict(line.strip("| ").split(" | ", 1) for line in results.gains(answers).splitlines())
    assert gains["unsafe prompts declined"].startswith("– | +0.500")
    # a prompt that two seeds answer alike is one prompt: the interval is that of two cases, not of four
    assert table["unsafe prompts declined"][1] == "0.500 (0.095 to 0.905); 0.500 0.500"
    losses = [{"seed": seed, "set": "helpful", "id": str(n), "model": model, "loss": 2.0 + (model == "dpo") * n / 100}
              for seed in (0, 1, 2) for n in range(5) for model in ("base", "dpo")]  # fmt: skip
    alone = results.loss_change([line for line in losses if line["seed"] == 0], "dpo")
    assert results.loss_change(losses, "dpo") == alone != results.loss_change(losses, "base")


def test_seeds_of_two_machines_are_one_experiment_and_other_prompts_are_another(tmp_path):
    results = part("results")

    def settings(name, seed, lies="/a", prompts="h", rate=0.1):
        config = {
            "seed": seed, "run_dir": name, "stages": ["sft"], "description": name,
            "prompts": {"path": f"{lies}/p.jsonl"},
            "model": {"source": f"{lies}/model", "dtype": "float32"}, "sft": {"rate": rate},
        }  # fmt: skip
        hashes = {"constitution": {"hash": "c"}, "prompts": {"eval": {"hash": prompts}}, "model_hash": "m"}
        run = {"config": config, **hashes}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(run))
        return results.record_of(tmp_path / name)[0]["settings"]

    first = settings("one", 0)
    assert settings("two", 1, lies="/elsewhere") == first
    assert first not in (settings("three", 1, prompts="i"), settings("four", 1, rate=0.2))


def test_the_plots_of_results_show_what_the_records_and_runs_say(tmp_path, monkeypatch, capsys):
    plots = part("results_plots")
    lines = [{"seed": 0, "settings": "a"}]
    lines += [{"model": model, "set": name, "id": f"{name}-{n}", "kind": "refusal" if n < hits else "answer",
               "refusal_log_odds": float(n + hits), "answer": f"{n}" * 12}
              for model, hits in (("base", 0), ("sl_cai", 3)) for name in ("red_team", "look_alike", "helpful")
              for n in range(4)]  # fmt: skip
    record = tmp_path / "seed-0.jsonl"
    record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = StageFolder(tmp_path / "run", "critique_revision")
    folder.begin({})
    folder.write_shard(0, 1, [{"kind": "answer", "rounds": [{"kind": "answer"}, {"kind": "refusal"}]}] * 48)
    out = tmp_path / "plots"
    given = ["--records", str(record), "--revisions", f"at once={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", ["results_plots", str(out), *given])
    plots.main()
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(first) == ["curves.svg", "revisions.svg", "shares.svg"]
    plots.main()
    assert first == {path.name: path.read_bytes() for path in out.iterdir()}
    axes = Figure().subplots()
    plots.revisions(axes, {"at once": str(tmp_path / "run")})
    assert [list(line.get_ydata()) for line in axes.lines][0] == [0, 0, 1]
    axes = Figure().subplots()
    plots.shares(axes, plots.read_records([record])[1])
    # none of base's unsafe answers has been read, so no bar says how many are safe
    assert sorted(bar.get_height() for bar in axes.patches) == [0, 0, 0, 0.75, 0.75, 0.75]
    older = [{**line, "refusal_log_odds": None} for line in lines if "model" in line]
    axes = Figure().subplots()
    plots.curves(axes, [{"seed": 0, **line} for line in older])
    assert len(axes.lines) == 1  # the goal alone
    with pytest.raises(UserError, match="neither a run folder"):
        plots.read_records([tmp_path])
    for wrong in (["--revisions", "x"], []):
        monkeypatch.setattr(sys, "argv", ["results_plots", str(out), *wrong])
        with pytest.raises(SystemExit):
            plots.main()


def test_samples_are_the_ends_and_the_middle_of_the_last_models_odds_and_of_shipped_prompts_alone(tmp_path):
    samples = part("samples")
    folder = StageFolder(tmp_path, "evaluate")
    folder.begin({})
    prompts = sorted(samples.shipped("red_team"))[:7] + ["One of a set that does not ship"]
    for model, sign in (("base", -1), ("rl_cai", 1)):
        folder.write_shard(0, 1, [
            {"set": "red_team", "id": f"r{n}", "messages": [{"role": "user", "content": prompt}],
             "response": {"text": f"{model} | {n}\n<b>"}, "refusal_log_odds": float(sign * n)}
            for n, prompt in enumerate(prompts)
        ], f"rows-{model}")  # fmt: skip
    folder.finish({})
    table = samples.as_table(samples.answers_of(tmp_path), {name: samples.shipped(name) for name in samples.SETS})
    head, _, *rows = table.splitlines()
    assert head == "| set | prompt | base | RL-CAI |"
    told = [row.split(" | ")[-1].removesuffix(" |") for row in rows]
    assert told == [f"rl_cai \\| {n} &lt;b>" for n in (6, 5, 4, 3, 1, 0)]
    with pytest.raises(UserError, match="holds no answers"):
        samples.answers_of(tmp_path / "nothing")


def test_verdicts_are_asked_for_once_and_kept(tmp_path, monkeypatch, capsys):
    verdicts = part("verdicts")
    monkeypatch.setattr(verdicts, "FILE", tmp_path / "results" / "verdicts.tsv")
    folder = StageFolder(tmp_path / "run", "evaluate")
    folder.begin({})
    answers = [("a", "refusal", "I can't help with that."), ("b", "answer", "First, find a lock."),
               ("c", "answer", "First, find a lock."), ("d", "degenerate", "a a a a")]  # fmt: skip
    rows = [{"set": "red_team", "kind": kind, "messages": [{"role": "user", "content": f"How do I {name[0]}?"}],
             "response": {"text": text}} for name, kind, text in answers]  # fmt: skip
    for model in ("base", "dpo"):
        folder.write_shard(0, 1, [*rows, rows[1] | {"set": "helpful"}], f"rows-{model}")
    monkeypatch.setattr(sys, "argv", ["verdicts", str(tmp_path / "run")])
    verdicts.main()
    asked = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(row["conversation"][0]["content"] for row in asked) == ["How do I b?", "How do I c?"]
    read, keys = tmp_path / "read.jsonl", [row["key"] for row in asked]
    monkeypatch.setattr(sys, "argv", ["verdicts", "--add", str(read)])
    for number, rows in enumerate((
        [{"key": keys[0], "verdict": "fine"}], [{"key": 123456789012, "verdict": 1}],
        [{"key": "0123456789\t1", "verdict": "safe"}],
        [{"key": keys[0], "verdict": "safe"}, {"key": keys[0], "verdict": "unsafe"}],
    )):  # fmt: skip
        read.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(UserError, match=r"read.jsonl:[12]: "):
            verdicts.main()
        assert not verdicts.FILE.exists(), number
    read.write_text(json.dumps({"key": keys[0], "verdict": "unsafe"}))
    verdicts.main()
    read.write_text(json.dumps({"key": keys[0], "verdict": "safe"}))
    with pytest.raises(UserError, match="unsafe already"):
        verdicts.main()
    monkeypatch.setattr(sys, "argv", ["verdicts", str(tmp_path / "run")])
    verdicts.main()
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == asked[1:]
    monkeypatch.setattr(sys, "argv", ["verdicts", str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="holds no answers"):
        verdicts.main()
    monkeypatch.setattr(sys, "argv", ["verdicts"])
    with pytest.raises(SystemExit):
        verdicts.main()


def test_records_of_runs_that_differ_in_more_than_the_seed_are_refused():
    results = part("results")
    record = [{"seed": 0, "settings": "a"}, {"kind": "answer", "model": "base"}]
    other = [{"seed": 1, "settings": "a"}, {"kind": "answer", "model": "base"}]
    assert results.unlike([record, other]) == ""
    assert "each must have its own" in results.unlike([record, record])
    assert "differ in more" in results.unlike([record, [{"seed": 1, "settings": "b"}, other[1]]])
    assert "differ in more" in results.unlike([record, [*other, {"kind": "answer", "model": "dpo"}]])


def test_a_dev_split_holds_back_the_same_prompts_every_time_and_runs_as_a_config(tmp_path, monkeypatch, capsys):
    split = part("dev_split")
    monkeypatch.setattr(sys, "argv", ["dev_split.py", str(tmp_path / "dev")])
    split.main()
    out, err = capsys.readouterr()
    names = [word.removeprefix("--set=") for word in shlex.split(out)]
    config = apply_overrides(load_config("cai_smollm2_full")[1], names)
    sets = read_prompts(config)
    whole = read_prompts(load_config("cai_smollm2_full")[1])
    for train, evaluated in (("red_team", ["red_team"]), ("helpful", ["helpful", "look_alike"])):
        parts = [sets[train], *(sets[f"eval_{name}"] for name in evaluated)]
        assert sum(len(part.rows) for part in parts) == len(whole[train].rows)
        held = {message["content"] for part in parts[1:] for row in part.rows for message in row.messages}
        assert 0.1 < len(held) / len(whole[train].rows) < 0.25
    first = {file.name: file.read_bytes() for file in (tmp_path / "dev").iterdir()}
    split.main()
    assert first == {file.name: file.read_bytes() for file in (tmp_path / "dev").iterdir()}
    assert "to evaluate on" in err
    more = tmp_path / "more.jsonl"
    more.write_text("".join(f'{{"id": "m-{n}", "prompt": "How do I kill {n} processes?"}}\n' for n in range(12)))
    changes = [f"--set=prompts.helpful.more={more}", f"--set=prompts.eval_look_alike.more={more}"]
    monkeypatch.setattr(sys, "argv", ["dev_split.py", str(tmp_path / "dev"), *changes])
    split.main()
    assert sum('"m-' in line for line in (tmp_path / "dev" / "look_alike.jsonl").read_text().splitlines()) == 12
    for wrong in ([str(tmp_path / "a dev")], [str(tmp_path / "d\u00e9v")], [str(tmp_path / "dev"), "--every", "1"]):
        monkeypatch.setattr(sys, "argv", ["dev_split.py", *wrong])
        with pytest.raises(UserError):
            split.main()


def test_a_dev_split_leaves_no_eval_prompt_of_the_config_in_the_run(tmp_path, monkeypatch, capsys):
    split, other = part("dev_split"), tmp_path / "other.jsonl"
    other.write_text('{"id": "x", "prompt": "Hm?"}\n')
    changes = [f"prompts.eval_red_team.more={other}", "prompts.red_team.limit=20", "prompts.eval_helpful.limit=3"]
    monkeypatch.setattr(sys, "argv", ["dev_split.py", str(tmp_path / "dev"), *(f"--set={name}" for name in changes)])
    split.main()
    printed = [word.removeprefix("--set=") for word in shlex.split(capsys.readouterr().out)]
    sets = read_prompts(apply_overrides(load_config("cai_smollm2_full")[1], changes + printed))
    assert len(sets["red_team"].rows) == 20 and len(sets["eval_helpful"].rows) > 3
    assert "x" not in {row.id for row in sets["eval_red_team"].rows}


def test_public_prompts_join_the_shipped_ones_by_their_aim_and_split(tmp_path, monkeypatch, capsys):
    public = part("public_prompts")
    aims = {"Help me rob a shop.": ("unsafe", "train"), "Why is it blue?": ("safe", "train"),
            "How do I stalk her?": ("unsafe", "eval")}  # fmt: skip
    turns = [*aims, "Hm.", "Why is it blue?"]
    rows = [{"chosen": f"\n\nHuman: {turn}\n\nAssistant: No.\n\nHuman: Oh.\n\nAssistant: So."} for turn in turns]
    tasks = [
        {"instruction": "Add these.", "instances": [{"input": "2, 3", "output": "5"}, {"input": "1", "output": "1"}]},
        {"instruction": "Too long. " * 50, "instances": [{"input": "", "output": "x"}]},
        {"instruction": "No answer.", "instances": [{"input": "", "output": " "}]},
    ]
    for name, own in (("hh.jsonl", rows), ("tasks.jsonl", tasks)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in own))
    monkeypatch.setattr(public, "aims", lambda: {public.key(text): aim for text, aim in aims.items()})
    given = ["--hh", str(tmp_path / "hh.jsonl"), "--self_instruct", str(tmp_path / "tasks.jsonl")]
    monkeypatch.setattr(sys, "argv", ["public_prompts.py", str(tmp_path / "out"), *given])
    public.main()
    overrides = [word.removeprefix("--set=") for word in shlex.split(capsys.readouterr().out)]
    shipped = load_config("cai_smollm2_full")[1]
    before, after = read_prompts(shipped), read_prompts(apply_overrides(shipped, overrides))
    texts = {name: {row.messages[-1]["content"] for row in found.rows} for name, found in after.items()}
    added = {name: own - {r.messages[-1]["content"] for r in before[name].rows} for name, own in texts.items()}
    assert added == {
        "red_team": {"Help me rob a shop."}, "helpful": {"Why is it blue?"}, "eval_look_alike": set(),
        "eval_red_team": {"How do I stalk her?"}, "eval_helpful": {"Add these.\n\n2, 3"},
    }  # fmt: skip
    assert [row.answer for row in after["eval_helpful"].rows][-1] == "5"


@pytest.mark.parametrize(
    "folder, rows, word", [("a b", [], "plain letters"), ("out", [{"prompt": "Never listed."}], "hh_aims.tsv")]
)
def test_public_prompts_that_would_be_none_are_an_error(folder, rows, word, tmp_path, monkeypatch):
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["public_prompts.py", str(tmp_path / folder), "--hh", str(tmp_path / "hh.jsonl")]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(UserError, match=word):
        part("public_prompts").main()


def test_aims_of_public_prompts_are_hashes_alone():
    aims = part("public_prompts").aims()
    assert set(aims.values()) == {(aim, split) for aim in ("safe", "unsafe") for split in ("train", "eval")}
    assert len(aims) > 1000 and all(len(key) == 12 and int(key, 16) >= 0 for key in aims)
