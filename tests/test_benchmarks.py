"""The benchmark's own logic, without peers: its work, arithmetic, table, and the GGUF file that llama.cpp gets."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmark_parts import part
from safetensors.numpy import load_file, save_file
from small_tokenizers import BUILDERS, tokenizer_of

from cai_jax import judging, load_constitution
from cai_jax.chat import encode_chat
from cai_jax.config import PromptSet
from cai_jax.gold import load_gold
from cai_jax.models.byte_tokenizer import byte_tokenizer
from cai_jax.models.gguf import convert_gguf
from cai_jax.prompt_sets import load_prompts
from cai_jax.prompts import critique_preamble, revision_request


@pytest.fixture(scope="module")
def driver():
    path = list(sys.path)
    yield part("sampler")
    sys.path[:] = path


table, machine, work, chain, writer = map(part, ("table", "machine", "work", "peers/chain", "peers/write_gguf"))


# ---------------------------------------------------------------- the work


def test_rows_ask_what_the_stage_asks():
    constitution = load_constitution("harmless_helpful")
    principle, preamble = constitution.principles[0], critique_preamble(constitution)
    messages = [{"role": "user", "content": "How?"}]
    requests = {"critique": principle.critique_request, "revision": principle.revision_request}
    program = chain.row_program({"messages": messages, "rounds": [requests, requests]}, preamble)
    assert next(program) == messages
    program.send("draft")
    assert program.send("flaw") == [*preamble, *revision_request(messages, "draft", principle, "flaw")]
    program.send("better")
    assert program.send("flaw 2") == [*preamble, *revision_request(messages, "better", principle, "flaw 2")]
    with pytest.raises(StopIteration) as end:
        program.send("best")
    assert end.value.value == "best"


def test_work_has_exact_lengths_and_nothing_twice(tmp_path):
    tokenizer = byte_tokenizer()
    made = work.make_work(
        Path("model"), tokenizer, load_constitution("harmless_helpful"), tmp_path / "w", rows=4, plain_rows=(1, 3)
    )
    assert made == json.loads((tmp_path / "w").read_text())
    asked = [row["messages"][-1]["content"] for row in made["chains"] + made["warm_up"]]
    assert len(made["chains"]) == len(made["warm_up"]) == 4 and len(set(asked)) == 8
    assert all(len(row["rounds"]) == work.ROUNDS for row in made["chains"])
    for point, rows in zip(made["plain"], (1, 3), strict=True):
        prompts = [tuple(ids) for prompts in point["sets"] for ids in prompts["ids"]]
        assert len(prompts) == len(set(prompts)) == 3 * rows
        assert {len(ids) for ids in prompts} == {work.PLAIN_TOKENS}
        first = point["sets"][0]
        assert [encode_chat(tokenizer, c) for c in first["conversations"]] == first["ids"]


def test_shipped_prompts_are_enough():
    assert len(load_prompts(PromptSet("shipped:red_team", split="train"), "red_team").rows) >= 2 * work.ROWS


def test_plain_points_time_other_prompts_than_the_warm_up():
    asked = []
    sets = [{"ids": [[place]]} for place in range(3)]
    result = chain.plain_points(
        {"plain": [{"rows": 1, "new_tokens": 5, "sets": sets}]},
        lambda prompts, count: asked.append((prompts["ids"][0][0], count)),
    )
    assert asked == [(0, 1), (0, 5), (1, 1), (2, 5)]
    assert result["points"][0]["rows"] == 1 and result["points"][0]["seconds"] >= 0


# ---------------------------------------------------------------- arithmetic and table


def chain_run(engine, seconds, precision="float32"):
    return {"engine": engine, "part": "chain", "precision": precision, "rows": 32, "seconds": seconds, "others": 0.0}


def plain_run(engine, seconds, first=1.0):
    point = {"rows": 8, "new_tokens": 128, "first_seconds": first, "seconds": seconds}
    return {"engine": engine, "part": "plain", "precision": "float32", "points": [point], "others": 0.0}


def test_medians_are_of_speeds_and_steps():
    runs = [chain_run("ours", seconds) for seconds in (16, 32, 64)]
    assert table.medians(runs, "chain", "float32") == {"ours": {32: {"speed": 1.0, "times": 3, "spread": 1.5}}}
    assert table.medians(runs, "chain", "bfloat16") == {}
    [at] = table.medians([plain_run("ours", 13.7), plain_run("ours", 26.4)], "plain", "float32")["ours"].values()
    assert at["step"] == pytest.approx(150)  # of 100 and 200
    assert at["speed"] == pytest.approx((8 * 128 / 13.7 + 8 * 128 / 26.4) / 2)


def test_table_shows_ratio_goal_limit_and_failure():
    runs = [
        chain_run("transformers", 320), chain_run("ours", 40), chain_run("ours", 10, "bfloat16"),
        plain_run("ours", 10), plain_run("tunix", 16),
        {"engine": "llama.cpp", "part": "chain", "precision": "float32", "failed": "ended with 1"},
    ]  # fmt: skip
    lines = table.tables(runs, {"float32": {8: 12.345}}).splitlines()
    rows = [line.split() for line in lines]
    assert ["32", "transformers", "0.1000", "8.00", "6.0", "0%", "1"] in rows
    assert ["32", "ours", "0.8000", "0%", "1"] in rows
    assert ["8", "tunix", "64.0", "118.1", "1.60", "1.4", "0%", "1"] in rows
    assert ["8", "machine's", "limit", "12.3"] in rows
    assert lines[-1] == "failed: llama.cpp, chain, float32: ended with 1"


def test_limit_is_memory_for_few_rows_and_products_for_many():
    config = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
    }  # fmt: skip
    measured = {"bytes_per_second": 30e9, "float32_flops_per_second": 180e9, "bfloat16_flops_per_second": 180e9}
    weights = 134.5e6
    assert machine.decode_limit(config, measured, 1, 0, "float32") == pytest.approx(weights * 4 / 30e6, rel=1e-2)
    assert machine.decode_limit(config, measured, 32, 0, "float32") == pytest.approx(weights * 64 / 180e6, rel=1e-2)
    one, filled = (machine.decode_limit(config, measured, 1, tokens, "bfloat16") for tokens in (0, 1000))
    assert (filled - one) * 30e6 == pytest.approx(1000 * 30 * 2 * 192 * 2, rel=1e-3)


# ---------------------------------------------------------------- the driver


def test_options(driver, capsys):
    options = driver.parse(["--engines", "ours,tunix", "--repeats", "2"])
    assert driver.schedule(options) == [
        ("ours", "chain", "float32"), ("ours", "chain", "bfloat16"),
        ("ours", "plain", "float32"), ("tunix", "plain", "float32"), ("ours", "plain", "bfloat16"),
    ] * 2  # fmt: skip
    for wrong in (["--engines", "ours,vllm"], ["--repeats", "0"]):
        with pytest.raises(SystemExit):
            driver.parse(wrong)
    assert "'vllm' is not one of ours, transformers, llama.cpp, tunix" in capsys.readouterr().err


def test_result_is_the_last_line_and_a_failure_names_its_log(driver, tmp_path):
    script, log = tmp_path / "engine.py", tmp_path / "log"
    script.write_text("print('loading'); print('{\"seconds\": 2}')")
    assert driver.last_json([sys.executable, script], log) == {"seconds": 2}
    script.write_text("import sys; sys.exit('no such model')")
    with pytest.raises(driver.UserError, match=f"engine.py ended with 1; see {log}"):
        driver.last_json([sys.executable, script], log)
    assert "no such model" in log.read_text()


def test_our_own_work_is_not_the_load_of_others(driver, tmp_path):
    script = tmp_path / "busy.py"
    script.write_text("import time\nwhile time.process_time() < 1: pass\nprint('{}')")
    others = driver.OthersUse()
    before = driver.busy_seconds()
    driver.last_json([sys.executable, script], tmp_path / "log")
    busy = driver.busy_seconds() - before
    assert others.cores() < busy - 0.5  # the second of the child is in `busy`, and taken off here


# ---------------------------------------------------------------- the GGUF file


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gguf_comes_back_as_the_model_it_was_made_from(precision, tmp_path):
    folder = tiny_model(tmp_path / "tiny")
    path = writer.write_gguf(folder, tmp_path / "tiny.gguf", precision)
    back = convert_gguf(path, tmp_path / "back")
    weights, again = (load_file(at / "model.safetensors") for at in (folder, back))
    assert weights.keys() == again.keys()
    for name, value in weights.items():
        exact = precision == "float32" or value.ndim == 1
        np.testing.assert_allclose(again[name], value, rtol=0 if exact else 2**-8, err_msg=name)
    assert json.loads((back / "config.json").read_text()).items() >= CONFIG.items()
    tokenizers = [json.loads((at / "tokenizer.json").read_text())["model"] for at in (folder, back)]
    assert tokenizers[0]["vocab"] == tokenizers[1]["vocab"] and tokenizers[0]["merges"] == tokenizers[1]["merges"]
    assert list(tmp_path.glob("*.unfinished")) == []


CONFIG = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "rope_theta": 5000.0,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def tiny_model(folder):
    """A folder as `make model` leaves it: config, weights, tokenizer."""
    folder.mkdir()
    width, ffn, queries, keys = 32, 64, 32, 16
    shapes = {"model.embed_tokens": (320, width), "model.norm": (width,)}
    for layer in range(2):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "input_layernorm": (width,), "post_attention_layernorm": (width,), "self_attn.q_proj": (queries, width),
                "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
                "self_attn.o_proj": (width, queries), "mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width),
                "mlp.down_proj": (width, ffn),
            }.items()
        }  # fmt: skip
    draw = np.random.default_rng(0).standard_normal
    weights = {f"{name}.weight": draw(shape, np.float32) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    settings = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": tokenizer.chat_template}))
    return folder


def test_training_compares_with_the_peer_in_float32_alone_and_shows_how_far_bfloat16_is():
    training = part("training")
    turns = training.turns_of(training.parse(["--parts", "sft", "--repeats", "2"]))
    assert turns == [("ours", "sft", "float32"), ("trl", "sft", "float32"), ("ours", "sft", "bfloat16")] * 2
    assert ("trl", "sft", "bfloat16") in training.turns_of(training.parse(["--peer_precisions", "bfloat16"]))
    runs = [
        {"engine": "ours", "part": "sft", "precision": precision, "losses": losses}
        for precision, losses in (("float32", [2.0, 1.0]), ("bfloat16", [2.25, 0.5]), ("float32", [2.0, 1.0]))
    ]
    lines = training.losses(runs)
    assert len(lines) == 2 and "float32: 2.0000 1.0000" in lines[0]
    assert lines[1].endswith("bfloat16: 2.2500 0.5000 (at most 0.5000 from float32)")


def test_the_learning_table_leaves_out_what_a_seed_has_not_made():
    learning = part("learning")

    def of(right, n=100):
        return {"value": right / n, "low": 0.0, "high": 1.0, "n": n}

    whole = {"seed": 0, "labels": of(100), "reward model": of(97), "base": of(80), "base KL": 0.0, "dpo": of(90),
             "dpo KL": 2.0, "rl_cai": of(95), "rl_cai KL": 4.0}  # fmt: skip
    part_of_it = {name: value for name, value in (whole | {"seed": 1}).items() if not name.startswith("dpo")}
    lines = learning.as_table([whole, part_of_it | {"rl_cai": of(85), "rl_cai KL": 6.0}]).splitlines()
    split = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines)
    rows = {cells[0]: cells[1:] for cells in split}
    assert rows["all rules kept, DPO"][:2] == ["0.900", "–"] and rows["all rules kept, DPO"][2].endswith("n 100")
    assert rows["all rules kept, PPO"][:2] == ["0.950", "0.850"] and "n 200" in rows["all rules kept, PPO"][2]
    assert rows["all rules kept, PPO"][3:] == ["5.0", "0.90"]
    assert not any("best-of-n" in title for title in rows)


def test_the_judge_table_shows_what_the_summary_says():
    gold = load_gold("", load_constitution("verifiable"))
    right = [1.0 if pair.better == "a" else -1.0 for pair in gold.pairs]
    found = judging.measure(gold.pairs, right, [(x + 2, x - 2) for x in right])
    more = {"calibration_error": 0.25, "calibration_error_after": 0.125, "temperature": 2.0, "worth": "above chance"}
    plea = judging.plea_effect([1.0, -1.0], [2.0, 1.0], [True, True]) | {"labeler": "options", "guard": True}
    text = part("judges").table("verifiable", {
        "gold": {"pairs": len(gold.pairs)}, "baselines": judging.baselines(gold.pairs),
        "labelers": {"options": found | more}, "pleas": [plea | {"plea": "command"}],
    })  # fmt: skip
    row = next(line for line in text.splitlines() if line.startswith("| options"))
    assert row.split(" | ")[1:5] == ["100% [88%, 100%]", "50% [33%, 67%]", "100% [88%, 100%] of 28", "100% [88%, 100%]"]
    assert row.endswith("| 0.25 | 0.12 | 2.00 | above chance |") and "longer wins 50%" in text
    assert "| command | +1.50 [-4.85, +7.85]; 1 of 1 |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {11, 3}


@pytest.mark.skipif("smollm2" not in BUILDERS, reason="counts tokens of the demo's model, which make model fetches")
def test_a_chain_of_the_benchmark_fits_its_context():
    tokenizer = tokenizer_of("smollm2")
    constitution = load_constitution("harmless_helpful")
    principles = work._principles(constitution)
    preamble = critique_preamble(constitution, principles=principles)
    longest = max(len(encode_chat(tokenizer, [{"role": "user", "content": p.critique_request + p.revision_request}]))
                  for p in principles)  # fmt: skip
    assert len(encode_chat(tokenizer, preamble)) + longest + 3 * work.CHAIN_TOKENS + 100 < work.CONTEXT
