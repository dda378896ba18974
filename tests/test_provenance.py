import errno
import hashlib
import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_jax.errors import UserError
from cai_jax.provenance import content_hash, file_hash, read_json, read_jsonl, row_seed, to_json, write_json

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as raised:
        function(*args, **kwargs)
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    return message


# ---------------------------------------------------------------- hashes and keys


@given(_JSON)
def test_a_hash_survives_writing_and_reading(value):
    plain = json.loads(to_json(value))
    assert content_hash(value) == content_hash(plain)


def test_a_hash_ignores_the_order_of_keys_and_nothing_else():
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": (1, 2), "a": 1})
    values = [None, True, 1, "1", 1.5, [1], {"1": 1}, "", [], {}, "a", "A", ["a", "b"], ["ab"]]
    assert len({content_hash(value) for value in values}) == len(values)


def test_file_hash_is_the_sha256_of_the_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"\x00\xffabc" * 100_000)
    assert file_hash(tmp_path / "f") == hashlib.sha256(b"\x00\xffabc" * 100_000).hexdigest()


def test_a_row_seed_is_what_its_docstring_says():
    digest = hashlib.sha256('[7,"sft","rt-é",2]'.encode()).digest()
    assert row_seed(7, "sft", "rt-é", 2) == int.from_bytes(digest[:8], "big")


def test_row_seeds_differ_in_every_part():
    rows = [(seed, stage, row, turn) for seed in (0, 1) for stage in ("sft", "ppo")
            for row in ("1", "11") for turn in (0, 1, 11)]
    seeds = {row_seed(*row) for row in rows} | {row_seed(0, "sft", "1")}
    assert len(seeds) == len(rows) + 1
    assert max(seeds) >= 2**62 and all(0 <= seed < 2**64 for seed in seeds)


# ---------------------------------------------------------------- JSON


def test_written_json_is_sorted_whole_and_has_null_for_what_is_no_number(tmp_path):
    value = {"b": float("nan"), "a": [float("inf"), 1.5], "c": (np.float32(0.5), np.int64(3), np.ones(2))}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == {"a": [None, 1.5], "b": None, "c": [0.5, 3, [1.0, 1.0]]}
    assert list(read_json(tmp_path / "x.json")) == ["a", "b", "c"]
    assert os.listdir(tmp_path) == ["x.json"]


def test_what_has_no_json_form_is_an_error_and_not_a_text(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": {1, 2}})


def test_malformed_json_is_named(tmp_path):
    (tmp_path / "x.json").write_text('{"a": ')
    assert "x.json" in error_of(read_json, tmp_path / "x.json")


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", 1)

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    assert "no space left" in error_of(write_json, tmp_path / "x.json", 2)
    assert read_json(tmp_path / "x.json") == 1


def test_a_line_without_its_end_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}')
    assert "x.jsonl:1" in error_of(read_jsonl, tmp_path / "x.jsonl")
