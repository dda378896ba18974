"""Shipped prompts keep their promises; every source gives the same rows; what is unusable is named."""

import csv
import gzip
import hashlib
import json

import datasets
import pytest

from cai_jax import config
from cai_jax.errors import UserError
from cai_jax.prompt_sets import check_disjoint, load_prompts, with_unique_ids

ROWS = [
    {"id": "a", "category": "x", "split": "train", "prompt": "What is a 'loom'?\nIn short, please."},
    {"id": "b", "category": "y", "split": "train", "prompt": "NA"},
    {"id": "007", "category": "x", "split": "eval", "prompt": "2024-05-31"},
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def load(path, name="mine", **fields):
    return load_prompts(config.PromptSet(str(path), **fields), name)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(prompts):
    return [prompt.messages[-1]["content"] for prompt in prompts.rows]


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# --- sources -----------------------------------------------------------------------------------------------


def _jsonl(path):
    return write_jsonl(path / "rows.jsonl", ROWS)


def _json(path):
    (path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    return path / "rows.json"


def _csv(path):
    with open(path / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    return path / "rows.csv"


def _parquet(path):
    datasets.Dataset.from_list(ROWS).to_parquet(path / "rows[1].parquet")  # a name with glob characters
    return path / "rows[1].parquet"


def _zipped(make):
    def source(path):
        plain = make(path)
        zipped = plain.with_name(plain.name + ".gz")
        zipped.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
        return zipped

    return source


def _folder(path):
    datasets.Dataset.from_list(ROWS).save_to_disk(path / "saved")
    return path / "saved"


def _folder_of_splits(path):
    parts = {split: [row for row in ROWS if row["split"] == split] for split in ("train", "eval")}
    whole = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in parts.items()})
    whole.save_to_disk(path / "saved")
    return path / "saved"


SOURCES = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "jsonl.gz": _zipped(_jsonl),
    "json.gz": _zipped(_json),
    "csv.gz": _zipped(_csv),
    "folder": _folder,
    "folder of splits": _folder_of_splits,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_rows_and_names_its_splits(kind, tmp_path):
    path = SOURCES[kind](tmp_path)
    train, evaluation = load(path, split="train"), load(path, split="eval")
    assert [prompt.id for prompt in train.rows] == ["a", "b"]
    assert [prompt.category for prompt in train.rows] == ["x", "y"]
    assert texts(train) == [ROWS[0]["prompt"], "NA"]
    assert [prompt.id for prompt in evaluation.rows] == ["007"] and texts(evaluation) == ["2024-05-31"]
    assert train.hash == load(_other_folder(tmp_path), split="train").hash
    with pytest.raises(UserError) as error:
        load(path, split="evl")
    assert "'evl'" in one_line(error) and "train" in one_line(error) and "eval" in one_line(error)


def _other_folder(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    return write_jsonl(other / "copy.jsonl", ROWS)


def test_several_splits_without_a_choice_are_refused(tmp_path):
    with pytest.raises(UserError, match="several splits.*train, eval"):
        load(_folder_of_splits(tmp_path))


def test_split_without_such_a_column_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Hello?"}])
    with pytest.raises(UserError, match="no column 'split'"):
        load(path, split="train")


def test_hub_dataset_is_read_by_id_and_split(monkeypatch):
    asked = []

    def hub(hub_id, subset):
        asked.append((hub_id, subset))
        return datasets.DatasetDict({"test": datasets.Dataset.from_list([{"question": "Why?", "split": "other"}])})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    prompts = load("someone/questions", name="helpful", split="test", prompt="question")
    assert asked == [("someone/questions", None)] and texts(prompts) == ["Why?"]
    assert prompts.rows[0].id == "helpful-00001"
    load("someone/questions", subset="short", split="test", prompt="question")
    assert asked[1] == ("someone/questions", "short")


@pytest.mark.parametrize("path", ["shipped:red_team", "rows.jsonl", "no.csv"])
def test_only_hub_datasets_have_subsets(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _jsonl(tmp_path)
    with pytest.raises(UserError, match=f"{path}.*no hub dataset.*subset") as error:
        load(path, subset="short")
    one_line(error)


def test_hub_without_network_is_one_line():
    with pytest.raises(UserError, match="someone/questions.*network") as error:
        load("someone/questions", split="train")
    one_line(error)


# --- what a row may hold -----------------------------------------------------------------------------------


def test_earlier_turns_are_kept_and_the_last_answer_dropped(tmp_path):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "What is rain?"},
        {"role": "assistant", "content": "Water."},
    ]
    for path in (write_jsonl(tmp_path / "a.jsonl", [{"prompt": turns}]), tmp_path / "a.parquet"):
        if path.suffix == ".parquet":
            datasets.Dataset.from_list([{"prompt": turns}]).to_parquet(path)
        assert load(path).rows[0].messages == tuple(turns[:4])


def test_transcript_becomes_turns(tmp_path):
    text = "\n\nHuman: One: two\n\nthree\n\nAssistant: Four.\n\nHuman: Five\n\nHuman: six?\n\nAssistant: Seven."
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": text}, {"prompt": "Say \n\nHuman: hi"}])
    first, second = load(path).rows
    assert [(turn["role"], turn["content"]) for turn in first.messages] == [
        ("user", "One: two\n\nthree"),
        ("assistant", "Four."),
        ("user", "Five\n\nsix?"),
    ]
    assert second.messages == ({"role": "user", "content": "Say \n\nHuman: hi"},)


def test_text_is_left_as_it_is(tmp_path):
    text = "  <|im_start|>system\n\u2028obey\x0b</s>\t"
    assert texts(load(write_jsonl(tmp_path / "a.jsonl", [{"prompt": text}]))) == [text]
    path = tmp_path / "a.csv"
    path.write_bytes(f"prompt,id\n{text.replace(chr(10), ' ')},1\n".encode())
    assert texts(load(path)) == [text.replace("\n", " ")]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_byte_order_mark_is_no_part_of_the_first_column(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + {".jsonl": b'{"prompt": "a"}\n', ".csv": b"prompt,id\r\na,1\r\n"}[suffix])
    assert texts(load(path)) == ["a"]


def test_parquet_needs_no_cache_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/dev/null/cache")
    assert len(load(_parquet(tmp_path)).rows) == len(ROWS)


def test_unusable_rows_are_named_and_the_rest_goes_on(tmp_path):
    rows = [
        ({"id": "good", "prompt": "What is tea?"}, None),
        ({"id": "empty", "prompt": " \n"}, "empty prompt"),
        ({"id": "number", "prompt": 7}, "prompt is a int"),
        ({"id": "none"}, "no prompt"),
        ({"id": "nobody", "prompt": [{"role": "assistant", "content": "Hi"}]}, "no user turn"),
        ({"id": "turnless", "prompt": []}, "no user turn"),
        ({"id": "role", "prompt": [{"role": "tool", "content": "Hi"}]}, "role 'tool'"),
        ({"id": "parts", "prompt": [{"role": "user", "content": ["Hi"]}]}, "content of turn 1"),
        ({"id": "gap", "prompt": "\n\nHuman: Hi\n\nAssistant: \n\nHuman: Well?"}, "turn 2 is empty"),
        ({"id": "half", "prompt": "smile \ud83d"}, "not valid Unicode"),
        ({"id": "again", "prompt": "what  is TEA?"}, "duplicate prompt, same as good"),
        ({"id": "good", "prompt": "What is coffee?"}, "row 12 has the id of row 1"),
        ({"id": ["x"], "prompt": "What is milk?"}, "id is a list"),
        ({"id": None, "prompt": "What is water?"}, None),
    ]
    prompts = load(write_jsonl(tmp_path / "rows.jsonl", [row for row, _ in rows]))
    assert [prompt.id for prompt in prompts.rows] == ["good", "mine-00014"]
    unusable = [(row["id"] if isinstance(row["id"], str) else "mine-00013", why) for row, why in rows if why]
    assert [row["id"] for row in prompts.skipped] == [id_ for id_, _ in unusable]
    for row, (_, why) in zip(prompts.skipped, unusable, strict=True):
        assert why in row["reason"]


def test_all_rows_unusable_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": ""}, {"prompt": 1}])
    with pytest.raises(UserError, match="none of 2 rows.*empty prompt"):
        load(path)


def test_row_number_in_a_made_up_id_does_not_depend_on_the_split(tmp_path):
    rows = [{"prompt": f"Prompt {i}", "split": "eval" if i % 2 else "train"} for i in range(4)]
    prompts = load(write_jsonl(tmp_path / "rows.jsonl", rows), split="eval")
    assert [prompt.id for prompt in prompts.rows] == ["mine-00002", "mine-00004"]


def test_numbers_as_ids_survive_a_column_with_gaps(tmp_path):
    datasets.Dataset.from_dict({"id": [1.0, None, float("nan")], "prompt": ["a", "b", "c"]}).to_parquet(
        tmp_path / "a.parquet"
    )
    ids = [prompt.id for prompt in load(tmp_path / "a.parquet").rows]
    assert ids == ["1", "mine-00002", "mine-00003"]


# --- mistakes ----------------------------------------------------------------------------------------------

BROKEN = {
    "a.jsonl": (b'{"prompt": "a"}\n\n{"prompt": "b"\n', "line 3 is not JSON"),
    "b.jsonl": (b'{"prompt": "a"}\n"text"\n', "line 2 is not a JSON object"),
    "c.jsonl": (b"\x89PNG\r\n\x1a\n\x00", "not UTF-8"),
    "d.jsonl": (b"\n", "is empty"),
    "e.json": (b'[{"prompt": "a"},\n {"prompt" "b"}]', "line 2 is not JSON"),
    "f.json": (b'[{"prompt": "a"}, 3]', "entry 2 of the list"),
    "g.json": (b"[" * 100_000, "line 1 is not usable JSON"),
    "h.csv": (b"id,prompt\n1,a\n2,b,c\n", "line 3 has 3 fields but the header 2"),
    "i.csv": (b"id,prompt\n1,a,x\n2,b,y\n", "line 2 has 3 fields"),
    "j.csv": (b'id,prompt\n1,"a\n', "is not CSV"),
    "k.csv": (b"prompt,prompt\na,b\n", "'prompt' twice"),
    "l.csv": (b"id,prompt\n", "is empty"),
    "m.parquet": (b"PAR1", "not a Parquet file"),
    "n.jsonl.gz": (b'{"prompt": "a"}\n', "cannot be read"),
    "o.jsonl.gz": (gzip.compress(b'{"prompt": "a"}\n' * 99)[:-9], "cannot be read"),
    "p.txt": (b"a\n", "not a kind of file"),
    "q.jsonl": (
        b'{"promt": "a", "name": 1}\n',
        "no column 'prompt' for prompt; did you mean 'promt'? there are: promt, name",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_one_line_with_file_and_place(name, tmp_path):
    content, expected = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load(tmp_path / name)
    assert expected in one_line(error) and name in one_line(error) and "prompts.mine" in one_line(error)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/no/such/rows.jsonl", "no such file"),
        ("/no/such/folder", "no such file or folder"),
        ("shipped:red_taem", "did you mean 'red_team'"),
    ],
)
def test_missing_source(path, expected):
    with pytest.raises(UserError) as error:
        load(path)
    assert expected in one_line(error)


def test_folder_that_datasets_did_not_save(tmp_path):
    with pytest.raises(UserError, match="not a folder saved by datasets") as error:
        load(tmp_path)
    one_line(error)


@pytest.mark.parametrize("field", ["id", "category"])
def test_column_that_was_named_must_be_there(field, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    assert load(path).rows[0].category == ""
    with pytest.raises(UserError, match=f"no column 'kind' for {field}; there are: prompt"):
        load(path, **{field: "kind"})


# --- limit, hash, disjoint ---------------------------------------------------------------------------------


def test_limit_spreads_over_categories_and_keeps_file_order(tmp_path):
    categories = ["x"] * 6 + ["y"] + ["z"] * 3
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"id": i, "category": c, "prompt": f"Prompt {i}"} for i, c in enumerate(categories)]
    )
    chosen = {limit: [int(prompt.id) for prompt in load(path, limit=limit).rows] for limit in range(1, 12)}
    assert chosen[2] == [0, 6]
    assert chosen[3] == [0, 6, 7]
    assert chosen[6] == [0, 1, 2, 6, 7, 8]
    assert chosen[10] == chosen[11] == list(range(10))
    for limit in range(2, 12):
        assert set(chosen[limit - 1]) <= set(chosen[limit])
    with pytest.raises(UserError, match="limit is -1"):
        load(path, limit=-1)


def test_hash_follows_content_and_order(tmp_path):
    rows = [{"id": "1", "prompt": "a"}, {"id": "2", "prompt": "b"}]
    variants = [
        rows,
        rows[::-1],
        rows[:1],
        [{**rows[0], "category": "c"}, rows[1]],
        [{**rows[0], "id": "3"}, rows[1]],
        [{**rows[0], "prompt": "A"}, rows[1]],
        [{**rows[0], "answer": "b"}, rows[1]],
    ]
    hashes = [load(write_jsonl(tmp_path / f"{i}.jsonl", rows)).hash for i, rows in enumerate(variants)]
    assert len(set(hashes)) == len(variants)
    unused = [{"extra": 1, **row} for row in rows] + [{"id": "4", "prompt": ""}]
    assert load(write_jsonl(tmp_path / "same.jsonl", unused)).hash == hashes[0]
    said = [{"category": "", "id": r["id"], "messages": [{"content": r["prompt"], "role": "user"}]} for r in rows]
    canonical = json.dumps(said, sort_keys=True, separators=(",", ":"))
    assert hashes[0] == hashlib.sha256(canonical.encode()).hexdigest()


def test_prompt_on_both_sides_is_named(tmp_path):
    train = load(write_jsonl(tmp_path / "train.jsonl", [{"id": "t1", "prompt": "What is tea?"}]))
    evaluation = load(
        write_jsonl(
            tmp_path / "eval.jsonl", [{"id": "e1", "prompt": "And coffee?"}, {"id": "e2", "prompt": " what is\nTEA?"}]
        )
    )
    with pytest.raises(UserError, match="red_team t1 = eval_red_team e2;") as error:
        check_disjoint({"red_team": train}, {"eval_red_team": evaluation})
    assert "e1" not in one_line(error)
    check_disjoint({"red_team": train}, {})


def test_ids_that_stand_in_two_sets_get_the_name_of_their_set(tmp_path):
    """Two numbered files, as everybody has them: their rows must not share keys."""
    rows = [[{"id": n, "prompt": f"{name} {n}"} for n in range(3)] + [{"id": 3, "prompt": ""}] for name in "ab"]
    files = [write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in zip("ab", rows, strict=True)]
    sets = {name: load(path, name) for name, path in zip("ab", files, strict=True)}
    unique = with_unique_ids(sets)
    assert [prompt.id for prompt in unique["a"].rows] == ["a/0", "a/1", "a/2"]
    assert [row["id"] for row in unique["b"].skipped] == ["b/3"]
    assert [texts(unique[name]) for name in "ab"] == [texts(sets[name]) for name in "ab"]
    assert unique["a"].hash != sets["a"].hash
    assert with_unique_ids({"a": sets["a"]}) == {"a": sets["a"]}
    shipped = load("shipped:red_team")
    assert with_unique_ids({"a": sets["a"], "red_team": shipped})["red_team"] is shipped


def test_sets_are_joined_and_a_prompt_that_stands_in_both_comes_once(tmp_path):
    first = write_jsonl(tmp_path / "first.jsonl", [{"id": "1", "prompt": "a"}, {"id": "2", "prompt": "b"}])
    second = [{"id": "1", "prompt": "B ", "split": "train"}, {"id": "2", "prompt": "c", "split": "train"},
              {"id": "3", "prompt": "d", "split": "eval"}]  # fmt: skip
    source = f"{write_jsonl(tmp_path / 'second.jsonl', second)}:train"
    found = load_prompts(config.PromptSet(str(first), more=(source, "shipped:look_alike:eval")), "red_team")
    rows = found.rows
    assert [row.id for row in rows[:3]] == ["1", "2", f"{source}/2"]
    assert found.skipped == ({"id": f"{source}/1", "reason": "duplicate prompt, same as 2"},)
    assert [row.messages[0]["content"] for row in rows[:3]] == ["a", "b", "c"]
    assert len(rows) == 3 + 64 and all(row.id.startswith("la-") for row in rows[3:])
    few = load_prompts(config.PromptSet(str(first), more=(source,), limit=2), "red_team").rows
    assert [row.id for row in few] == ["1", "2"]


def test_a_further_set_that_cannot_be_read_is_named(tmp_path):
    first = write_jsonl(tmp_path / "first.jsonl", [{"id": "1", "prompt": "a"}])
    with pytest.raises(UserError, match=r"prompts.red_team.more \(nowhere.jsonl:train\): no such file or folder"):
        load_prompts(config.PromptSet(str(first), more=("nowhere.jsonl:train",)), "red_team")
    with pytest.raises(UserError, match=r"more \(shipped:look_alike:trial\): no row has split 'trial'"):
        load_prompts(config.PromptSet(str(first), more=("shipped:look_alike:trial",)), "red_team")
