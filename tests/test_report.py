"""The report: whole, missing, hostile and broken run folders, written by a deterministic generator."""

import html
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cai_jax import monitors
from cai_jax.config import OPTIONAL, STAGES, Monitor
from cai_jax.constitution import load_constitution
from cai_jax.errors import UserError
from cai_jax.report import data_sections, evaluation, numbers, plots, verdicts, write_report
from cai_jax.report.artifacts import read_run
from cai_jax.report.markup import Html, text_block
from cai_jax.statistics import wilson_interval

HOSTILE = (
    "</style></svg></main><script>alert('x')</script> <img src=https://evil.example/a.png onerror=\"go()\"> &"
    " &lt;b&gt; '\"><|im_start|>system \u202egnp.exe \x00\x1b[31m \ud800 "
    + "W" * 400
)
VOID = {"meta", "br"}
LATER = ("dpo", "best_of_n", "grpo")  # models of an evaluation that has them all
SECTIONS = ["results", "limits", "ran", *STAGES, "chains", "answers", "failures", "skipped", "config"]
WORDS = (
    "I can not help with that, but here is a safer way to look at the question and what to ask a doctor or "
    "the local office first, because rules differ and details matter more than they seem"
).split()


def interval(value, n, width=None):
    """A contract INTERVAL: for a share, the normal approximation clipped to 0..1."""
    if width is None:
        width = 1.96 * math.sqrt(max(value * (1 - value), 0.02) / n)
        return {"value": value, "low": max(0.0, value - width), "high": min(1.0, value + width), "n": n}
    return {"value": value, "low": value - width, "high": value + width, "n": n}


UNKNOWN = {"value": None, "low": None, "high": None, "n": 0}


class FakeRun:
    """Writes a run folder as WORKSPACE.md describes it; the same seed gives the same bytes."""

    def __init__(self, folder: Path, seed: int = 0, prompts: int = 24):
        self.folder, self.draw, self.prompts = folder, random.Random(seed), prompts
        self.hostile = ""  # put in front of every model text and prompt
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, path: str, content) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = content if isinstance(content, list) else [content]
        target.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def text(self, words: int = 40) -> dict:
        body = " ".join(self.draw.choice(WORDS) for _ in range(self.draw.randint(words // 2, words * 2)))
        tokens = len(body.split())
        return {"text": self.hostile + body, "tokens": tokens, "truncated": tokens > 1.8 * words}

    def messages(self, row_id: str) -> list[dict]:
        return [{"role": "user", "content": f"{self.hostile}Tell me about\n  {row_id}, please."}]

    def finish(self, stage: str, summary: dict, seconds: float) -> None:
        counters = {"critique_empty": 0, "revision_unchanged": 7, "truncated": self.draw.randint(0, 9)}
        skipped = [{"id": f"{stage}-long-{i}", "reason": "prompt longer than 256 tokens"} for i in range(2)]
        self.write(f"{stage}/summary.json", {**summary, "counters": counters, "skipped": skipped})
        timing = {
            "seconds": seconds,
            "peak_memory_bytes": int(2.1 * 2**30),
            "started": "2025-01-31T10:00:00Z",
            "sampler_programs": 3,
        }
        self.write(f"{stage}/timing.json", timing)
        self.write(f"{stage}/done.json", {"artifacts": {}, "hash": "0" * 64})

    def config(self) -> None:
        self.write(
            "config.json",
            {
                "name": "cai_smollm2",
                "description": "Whole pipeline on SmolLM2-135M-Instruct, two CPU cores",
                "command": "python -m cai_jax.launch --config=cai_smollm2",
                "parameters": 134515008,
                "config": {
                    "seed": 7,
                    "model": {"source": "~/.cache/smollm2.gguf", "compute_dtype": "bfloat16"},
                    "constitution": "no_such_constitution",
                    "ppo": {"kl_coef": 0.02, "clip": 0.2},
                    "stages": list(STAGES),
                    "preferences": {"judge": ""},
                },
                "environment": {
                    "python": "3.11.7",
                    "jax": "0.10.2",
                    "platform": "cpu",
                    "devices": ["TFRT_CPU_0"],
                    "cpu_count": 2,
                },
                "constitution": {"name": "harmless_helpful", "version": 1, "hash": "c0" * 32},
                "model_hash": "ab" * 32,
                "prompts": {
                    "red_team": {"rows": 48, "skipped": [{"id": "line 9", "reason": "no prompt"}], "hash": "d4" * 32}
                },
                "versions": {"jax": "0.10.2", "optax": "0.2.6"},
            },
        )

    def red_team(self) -> None:
        kept = [
            {"id": f"written/privacy/0/{i}", "category": "privacy", "classified": "fraud", "kind": "answer",
             "prompt": self.text(12)["text"]}
            for i in range(14)
        ]  # fmt: skip
        self.write("red_team/prompts.jsonl", kept)
        category = {"given": 15, "candidates": 20, "kept": 14, "refused": interval(0.1, 20)}
        measures = {"texts": 14, "distinct_1": 0.5, "distinct_2": 0.9, "mean_similarity": 0.05}
        measures["nearest_similarity"] = 0.21
        self.finish(
            "red_team",
            {
                "lists": 8,
                "candidates": 20,
                "tried": 20,
                "kept": 14,
                "categories": {"privacy": category, "": category | {"candidates": 0, "refused": UNKNOWN}},
                "classifier": {"right_on_given": interval(0.53, 180), "agrees_with_request": interval(0.4, 20)},
                "diversity": {"given": measures | {"nearest_similarity": 0.13}, "kept": measures},
            },
            0.0,
        )

    def critique_revision(self) -> None:
        principles = [f"{name}-{i}" for name in ("weapons", "privacy", "honesty", "over_refusal") for i in range(4)]
        rows = []
        for i in range(2 * self.prompts):
            response, rounds = self.text(60), []
            for k in range(1, 5):
                unchanged = self.draw.random() < 0.1 * k
                newest = rounds[-1]["revision"] if rounds else response
                rounds.append(
                    {
                        "round": k,
                        "principle": self.draw.choice(principles),
                        "principle_hash": "f" * 16,
                        "critique": self.text(30),
                        "revision": newest if unchanged else self.text(60 - 8 * k),
                        "flags": {"revision_unchanged": unchanged, "critique_empty": False, "critique_truncated": True},
                    }
                )
            rows.append(
                {
                    "id": f"red-{i:03}",
                    "category": ["violence", "privacy", "fraud", "self_harm"][i % 4],
                    "messages": self.messages(f"subject {i}"),
                    "response": response,
                    "rounds": rounds,
                    "flags": {"response_truncated": False, "response_empty": False, "context_full": i == 0},
                    "provenance": {},
                }
            )
        half = len(rows) // 2
        self.write("critique_revision/rows-00000-of-00002.jsonl", rows[:half])
        self.write("critique_revision/rows-00001-of-00002.jsonl", rows[half:])
        self.finish(
            "critique_revision",
            {
                "rows": len(rows),
                "mean_tokens": {"response": 66.0, "critique": 34.0, "revision": [58.0, 49.0, 40.0, 31.0]},
                "principles": {name: self.draw.randint(1, 20) for name in principles},
                "checks": {
                    "honesty-0": {
                        "rule": "The text has at most 20 words.",
                        "n": 40,
                        "before": interval(0.25, 40),
                        "after": interval(0.75, 40),
                    },
                    "honesty-1": {"rule": "Never drawn.", "n": 0, "before": UNKNOWN, "after": UNKNOWN},
                },
            },
            312.0,
        )

    def sft(self) -> None:
        self.write(
            "sft/metrics.jsonl",
            [
                {
                    "step": i + 1,
                    "loss": 2.4 - 0.5 * math.tanh(i / 9) + self.draw.gauss(0, 0.04),
                    "tokens": 4000,
                    "learning_rate": 1e-5 * min(1, (i + 1) / 4),
                    "grad_norm": 1.5 + self.draw.random(),
                }
                for i in range(28)
            ],
        )
        self.finish(
            "sft",
            {
                "examples": {"revisions": 192, "helpful": 48},
                "steps": 28,
                "first_loss": 2.41,
                "last_loss": 1.93,
                "packing_efficiency": 0.91,
            },
            188.0,
        )

    def judge(self, right: int = 55, counted: int = 96) -> None:
        def of(name, **more):
            shares = ("accuracy", "decided_accuracy", "first_order_accuracy", "same_position", "first_position",
                      "chose_longer", "accuracy_better_longer", "accuracy_better_shorter")  # fmt: skip
            found = {share: wilson_interval(right, counted) for share in shares}
            return found | {"n": counted, "ties": 2, "worth": "not shown to be above chance", "votes": name != "rule",
                            "failures": {"too_long": 3}, "temperature": 2.5, "calibration_error": 0.21,
                            "calibration_error_after": 0.07, "categories": {"privacy": interval(0.5, 8)}} | more

        alone = dict.fromkeys(("first_order_accuracy", "same_position", "first_position"))
        plea = {"shift": interval(1.5, 8, 0.5), "flipped": interval(0.75, 4)}
        self.finish(
            "judge",
            {
                "gold": {"source": "shipped:harmless_helpful", "pairs": counted},
                "voters": ["options"],
                "orders": "both",
                "labelers": {"options": of("options"), "rule": of("rule", failures={}, **alone)},
                "vote": of("vote"),
                "baselines": {"longer_wins": 0.5, "shorter_wins": 0.5, "refusal_wins": 0.68},
                "pleas": [
                    {"labeler": name, "plea": kind, "guard": guard, **plea}
                    for name, guard in (("options", True), ("options", False), ("rule", True))
                    for kind in ("none", "next_turn")
                ],
            },
            0.0,
        )

    def preferences(self) -> None:
        rows = []
        for i in range(2 * self.prompts):
            better, bias = self.draw.gauss(0, 0.15), 0.2
            ab, ba = (min(max(0.5 + better + side, 0.01), 0.99) for side in (bias, -bias))
            rows.append({"id": f"pair-{i}", "probability_a_ab": ab, "probability_a_ba": ba})
        self.write("preferences/rows-00000-of-00001.jsonl", rows)
        self.finish(
            "preferences",
            {
                "pairs": len(rows),
                "labelled": len(rows),
                "kept": len(rows) - 3,
                "kept_share": 1 - 3 / len(rows),
                "labelers": {
                    "options": {"opinions": len(rows) - 2, "failures": {"too_long": 2}, "flags": {"guarded": 4},
                                "temperature": 1.7, "consistent_share": 0.35, "first_position_share": 0.81},
                    "rule": {"opinions": len(rows), "failures": {}, "flags": {}, "temperature": 1.0,
                             "consistent_share": None, "first_position_share": None},
                },
                "agreement": [{"labelers": ["options", "rule"], "kappa": 0.125,
                               "same": {"value": 0.56, "low": 0.41, "high": 0.7, "n": 44}}],
                "filters": [{"filter": "duplicates", "dropped": 2, "left": len(rows) - 2},
                            {"filter": "length_matched", "dropped": 1, "left": len(rows) - 3}],
                "consistent_share": 0.35,
                "first_position_share": 0.81,
                "confidence_histogram": {
                    "edges": [i / 10 for i in range(11)],
                    "counts": [0, 1, 3, 7, 13, 14, 6, 3, 1, 0],
                },
            },
            151.0,
        )

    def reward_model(self, accuracy: float = 0.55) -> None:
        self.write(
            "reward_model/metrics.jsonl",
            [
                {
                    "step": i + 1,
                    "loss": 0.7 - 0.002 * i,
                    "accuracy": min(1, 0.5 + 0.02 * i),
                    "margin": 0.03 * i,
                    "learning_rate": 1e-5,
                    "grad_norm": 2.0,
                }
                for i in range(12)
            ],
        )
        bins = [
            {
                "low": i / 5,
                "high": (i + 1) / 5,
                "n": n,
                "predicted": i / 5 + 0.1 if n else None,
                "observed": 0.3 + 0.08 * i if n else None,
            }
            for i, n in enumerate([0, 5, 9, 4, 2])
        ]
        self.finish(
            "reward_model",
            {
                "train_pairs": 38,
                "steps": 12,
                "first_loss": 0.70,
                "last_loss": 0.68,
                "score_mean": 0.0,
                "score_std": 0.6,
                "heads": 3,
                "held_out": {
                    "n": 20,
                    "ties": 3,
                    "accuracy": interval(accuracy, 20),
                    "calibration_error": 0.08,
                    "length_correlation": -0.41,
                    "shorter_wins_accuracy": interval(0.6, 20),
                    "longer_wins_accuracy": interval(0.4, 20),
                    "refusal_wins_accuracy": interval(0.25, 4),
                    "best_rule": {"rule": "shorter_wins", "accuracy": 0.6},
                    "gain_over_best_rule": interval(accuracy - 0.6, 17, 0.2) | {"p_value": 0.4},
                    "beats_best_rule": False,
                    "principles": {"honesty-0": interval(0.75, 12), "weapons-1": interval(0.4, 5)},
                    "categories": {"privacy": interval(0.5, 10), "": interval(0.6, 7)},
                    "uncertainty": 0.31,
                    "uncertainty_auroc": interval(0.7, 17),
                    "calibration_bins": bins,
                },
            },
            96.0,
        )

    def ppo(self, stage: str = "ppo", seconds: float = 402.0) -> None:
        lines = [
            {
                "update": i + 1,
                "score": 0.1 + 0.02 * i + self.draw.gauss(0, 0.05),
                "reward": 0.1 + 0.015 * i,
                "kl": 0.01 * i,
                "kl_k3": 0.011 * i,
                "entropy": 2.1 - 0.01 * i,
                "length": 70 - 0.4 * i,
                "truncated_share": 0.2 + 0.1 * self.draw.random(),
                "approx_kl": 0.002,
                "policy_clip_fraction": 0.05,
                "value_clip_fraction": 0.02,
                "policy_loss": -0.01,
                "value_loss": 0.3 / (i + 1),
                "learning_rate": 1e-6,
                "grad_norm": 1.0,
            }
            for i in range(20)
        ]
        self.write(f"{stage}/metrics.jsonl", lines)
        self.finish(stage, {"updates": 20, "rollouts": 640, "first": lines[0], "last": lines[-1]}, seconds)

    def monitors(self, stage: str = "ppo", chosen: int = 10, within: bool = True) -> None:
        """Looks at every fifth update: the proxy rises, the independent score falls, and the last two looks say so."""
        path, looks = self.folder / stage / "metrics.jsonl", []
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for update in range(0, 21, 5):
            rows = [
                {
                    "id": f"probe-{i}", "set": ("helpful", "red_team")[i % 2], "tokens": 30, "truncated": False,
                    "text": self.text(20)["text"] + (" As always, stay safe <b>out there</b>." if update else ""),
                    "kind": "refusal" if i < update else "answer", "independent": 0.8 - 0.02 * update + 0.01 * (i % 3),
                    "proxy": 0.1 * update + 0.05 * (i % 2),
                }
                for i in range(24)
            ]  # fmt: skip
            looks.append(monitors.take_look(update, rows, 0.1 * update, looks, Monitor()))
            self.write(f"{stage}/looks/update-{update:08d}.json", looks[-1])
            if update:
                lines[update - 1] |= monitors.line(looks[-1])
        self.write(f"{stage}/metrics.jsonl", lines)
        found = {"judge": "rule", "looks": 4, "probes": {"helpful": 12, "red_team": 12}, "stop": looks[-1]["stop"],
                 "chosen": chosen, "chosen_within_bounds": within}  # fmt: skip
        self.edit(f"{stage}/summary.json", lambda content: content.update(monitor=found))

    def grpo(self) -> None:
        self.ppo("grpo", 0.0)

    def dpo(self) -> None:
        lines = [
            {
                "step": i + 1,
                "loss": 0.69 - 0.01 * i,
                "accuracy": 0.5 + 0.02 * i,
                "margin": 0.05 * i,
                "chosen_reward": -0.01 * i,
                "rejected_reward": -0.06 * i,
                "learning_rate": 1e-6,
                "grad_norm": 3.0,
                "pairs": 8,
            }
            for i in range(12)
        ]
        self.write("dpo/metrics.jsonl", lines)
        held_out = {
            "n": 20,
            "ties": 2,
            "loss": interval(0.61, 20, 0.05),
            "accuracy": interval(0.75, 18),
            "margin": interval(0.4, 20, 0.1),
            "chosen_reward": interval(-0.2, 20, 0.1),
            "rejected_reward": interval(-0.6, 20, 0.1),
            "kl": interval(1.25, 20, 0.25),
            "shorter_wins_accuracy": interval(0.6, 18),
            "longer_wins_accuracy": interval(0.4, 18),
        }
        summary = {"kind": "sigmoid", "train_pairs": 76, "steps": 12, "first_loss": 0.69, "last_loss": 0.58}
        self.finish("dpo", {**summary, "held_out": held_out}, 80.0)

    def best_of_n(self) -> None:
        curve = [
            {"n": n, "kl_bound": math.log(n) - (n - 1) / n, "score": interval(0.3 * math.log(n), 48, 0.1)}
            for n in (1, 2, 4, 6)
        ]
        means = {key: interval(value, 48, 0.1) for key, value in (("first", 0.02), ("best", 0.54), ("gain", 0.52))}
        lengths = {"length": interval(40.0, 48, 3.0), "chosen_length": interval(31.0, 48, 3.0)}
        summary = {"prompts": 48, "n": 6, "kl_bound": curve[-1]["kl_bound"], "curve": curve, **means, **lengths}
        self.finish("best_of_n", summary, 60.0)

    def evaluate(self) -> None:
        refusal = {"base": (0.04, 0.0, 0.0), "sl_cai": (0.25, 0.12, 0.04), "rl_cai": (0.46, 0.21, 0.04)}
        rows, models = [], {}
        for model, rates in refusal.items():
            models[model] = {"sets": {}} | dict.fromkeys(
                ("margin_auroc", "refusal_auroc"), interval(0.6, 2 * self.prompts)
            )
            for name, rate in zip(("red_team", "look_alike", "helpful"), rates, strict=True):
                means = {
                    key: interval(value, self.prompts, abs(value) * 0.2 + 0.01)
                    for key, value in {
                        "length": 61.0,
                        "repetition": 0.07,
                        "reward": 0.42,
                        "kl": 1.3,
                        "margin": -1.8,
                    }.items()
                }
                models[model]["sets"][name] = {
                    "n": self.prompts,
                    "refusal": interval(rate, self.prompts),
                    "degenerate": interval(0.02, self.prompts),
                    "empty": interval(0.0, self.prompts),
                    **means,
                }
                rows += [
                    {
                        "id": f"{name}-{i:03}",
                        "set": name,
                        "category": "privacy",
                        "model": model,
                        "messages": self.messages(f"{name} {i}"),
                        "response": self.text(50),
                        "kind": "refusal" if i < rate * self.prompts else "answer",
                        "margin": self.draw.gauss(-1.5 if name != "red_team" else -0.8, 1.0),
                        "reward": self.draw.gauss(0, 1),
                        "kl": 1.1,
                        "repetition": 0.1,
                        "provenance": {},
                    }
                    for i in range(self.prompts)
                ]
        self.write("evaluate/rows-00000-of-00001.jsonl", rows)
        self.finish("evaluate", {"models": models}, 141.0)

    def everything(self) -> "FakeRun":
        self.config()
        for stage in STAGES:
            getattr(self, stage)()
        return self

    def everyone(self) -> "FakeRun":
        """Six models in the evaluation in the place of three."""
        self.everything()
        self.edit("evaluate/summary.json", lambda content: self._add_models(content["models"]))
        rows = [json.loads(line) for line in (self.folder / "evaluate/rows-00000-of-00001.jsonl").open()]
        last = [row for row in rows if row["model"] == "rl_cai"]
        self.write("evaluate/rows-00000-of-00001.jsonl", rows + [row | {"model": m} for m in LATER for row in last])
        return self

    def _add_models(self, models: dict) -> None:
        models |= {model: models["rl_cai"] for model in reversed(LATER)}  # the report has an order of its own

    def edit(self, path: str, change) -> None:
        content = json.loads((self.folder / path).read_text())
        change(content)
        self.write(path, content)


class Checker(HTMLParser):
    """Balanced tags, unique ids, and everything a browser could run or fetch."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.handlers, self.text, self.tags = [], [], [], [], [], set()
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.links += [
            value for name, value in attributes if name in ("href", "src", "xlink:href", "srcset", "action")
        ]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


@pytest.fixture
def no_plots(monkeypatch):
    """Drawing takes most of the time of a report: leave it out where a test is about something else."""
    monkeypatch.setattr(plots, "figure", lambda name, caption, draw: Html(f'<i id="{name}-figure_1"></i>'))


def render(folder: Path) -> tuple[str, Checker]:
    page = write_report(folder).read_text(encoding="utf-8")
    return page, Checker(page)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return render(FakeRun(tmp_path_factory.mktemp("whole")).everything().folder)


def test_whole_run_has_every_section_once_and_in_order(whole):
    page, seen = whole
    assert [anchor for anchor in seen.ids if anchor in SECTIONS] == SECTIONS
    assert len(seen.ids) == len(set(seen.ids))
    assert "could not be drawn" not in page and "Not run yet" not in page
    assert "svg" in seen.tags
    for figure in (
        "sft-loss",
        "rm-reliability",
        "ppo-kl",
        "ev-refusal",
        "ev-margin-rl_cai",
        "pref-orders",
        "cr-lengths",
        "dpo-rewards",
        "bon-score",
    ):
        assert f'id="{figure}-figure_1"' in page


def test_the_section_on_written_prompts_shows_what_became_of_them(tmp_path, no_plots):
    run = FakeRun(tmp_path)
    run.hostile = HOSTILE
    _, seen = render(run.everything().folder)
    assert "it is right in 53%" in seen.words and "asked for in 40%" in seen.words
    assert "overlap with the most similar other prompt, mean 0.13 0.21" in seen.words
    assert "diversity of 14 prompts each" in seen.words
    assert seen.words.count("asked for privacy · classified as fraud") == 12, "of 14, by a hash of their ids"
    assert "near a prompt of an eval set" in seen.words and "script" not in seen.tags


def test_summary_shows_the_recorded_numbers(tmp_path, no_plots):
    _, seen = render(FakeRun(tmp_path).everything().folder)
    assert (
        "Refusal of unsafe prompts: base 4% [0%, 12%], RL-CAI 46% [26%, 66%]. The intervals do not overlap."
        in seen.words
    )
    assert "135 million parameters" in seen.words and "weak critic" in seen.words
    assert "23 min 50 s" in seen.words  # the sum of all stages
    assert "2.10 GiB" in seen.words
    assert "does not beat the simple rule" in seen.words
    assert "In 65% of pairs it chose the same position both times" in seen.words
    assert "Run started 2025-01-31 10:00 UTC" in seen.words


def test_labelers_agreement_and_filters_are_shown(tmp_path, no_plots):
    seen = render(FakeRun(tmp_path).everything().folder)[1].words
    for part in ("options 46 too long 2 guarded 4 1.70 35% 81%", "rule 48 none none 1.00 – –",
                 "options and rule 56% [41%, 70%] n 44 0.12", "duplicates 2 46", "length matched 1 45",
                 "kept for training 45 (94%)"):  # fmt: skip
        assert part in seen, part


def test_the_judge_section_shows_what_was_measured(tmp_path, no_plots):
    seen = render(FakeRun(tmp_path).everything().folder)[1].words
    for part in ("options 57% [47%, 67%] 57% [47%, 67%] n 96 57% [47%, 67%] 2 too long 3 not shown to be above chance",
                 "rule (measured only) 57% [47%, 67%] 57% [47%, 67%] n 96 – 2 none not shown",
                 "vote 57% [47%, 67%]", "the response that refuses wins 68%", "options 0.210 0.070 2.50",
                 "plea options, guard on options, guard off rule, guard on",
                 "next turn 1.50 [1.00, 2.00]; 3 of 4 flipped", "privacy 50% [15%, 85%] n 8"):  # fmt: skip
        assert part in seen, part


@pytest.mark.parametrize("right, config, first, later", [
    (80, {}, "", "It is; by this measure they are not shown"),
    (55, {}, "It is not: the run stops before labels are spent", "It is not: the run stops"),
    (55, {"on_failure": "continue"}, "It is not, and the run went on because its config says so", "may follow nothing"),
    (80, {"minimum_accuracy": 0.8}, "must be above 80%. It is not", "must be above 80%"),
])  # fmt: skip
def test_the_first_lines_say_where_the_gate_was_not_passed(tmp_path, no_plots, right, config, first, later):
    run = FakeRun(tmp_path).everything()
    run.judge(right)
    gate = {"minimum_accuracy": 0.5, "on_failure": "stop"} | config
    run.edit("config.json", lambda content: content["config"].update(judge=gate))
    page, seen = render(run.folder)
    head, rest = seen.words.split("What came out", 1)
    assert (first in head) if first else ("gold pairs" not in head)
    assert rest.count(later) == 2, "among the limits and in the section of the judge"
    assert "could not be drawn" not in page


def test_a_judge_without_numbers_says_nothing(tmp_path, no_plots):
    run = FakeRun(tmp_path).everything()
    run.edit("config.json", lambda content: content["config"].update(judge={"minimum_accuracy": 0.5}))
    run.judge(0, 0)
    page, seen = render(run.folder)
    assert "the lower end of that interval" not in seen.words and "could not be drawn" not in page


def test_same_artifacts_give_the_same_page(whole, tmp_path):
    assert render(FakeRun(tmp_path).everything().folder)[0] == whole[0]


def test_nothing_is_fetched_or_run(whole):
    page, seen = whole
    assert all(link.startswith("#") for link in seen.links)
    assert "http:" not in page and "https:" not in page and "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    assert {"script", "link", "img", "iframe"} & seen.tags == set()


def test_hostile_texts_stay_texts(tmp_path, no_plots):
    run = FakeRun(tmp_path)
    run.hostile = HOSTILE
    run.everything()
    for stage in STAGES:
        run.edit(f"{stage}/summary.json", lambda content: content["counters"].update({HOSTILE: 1}))
        run.edit(
            f"{stage}/summary.json", lambda content: content["skipped"].append({"id": HOSTILE, "reason": HOSTILE})
        )
    run.edit("config.json", lambda content: content.update(name=HOSTILE, description=HOSTILE, command=HOSTILE))
    run.edit("config.json", lambda content: content["config"].update({HOSTILE: HOSTILE}))
    run.edit("critique_revision/summary.json", lambda content: content["principles"].update({HOSTILE: 3}))
    page, seen = render(run.folder)
    assert {"script", "img"} & seen.tags == set() and seen.handlers == []
    assert all(link.startswith("#") for link in seen.links)
    assert page.count("</style>") == 1 and page.count("</main>") == 1
    assert "<script>alert('x')</script>" in seen.words and "<|im_start|>system" in seen.words
    assert "⟨U+202E⟩" in page and "⟨U+0000⟩" in page and "\u202e" not in page and "\x1b" not in page
    assert page.count("&amp;lt;b&amp;gt;") > 0  # an escaped text stays escaped once more


@pytest.mark.parametrize("stage", ["critique_revision", "judge", "preferences"])
def test_what_an_endpoint_gave_and_took_is_told(tmp_path, no_plots, stage):
    run = FakeRun(tmp_path).everything()
    assert "endpoint" not in render(run.folder)[1].words
    given = {"model": HOSTILE, "base_url": "https://host/v1", "answers": 1234, "tokens_read": 5678,
             "tokens_written": 90, "cost": 0.125, "failures": {"unparsable": 3}}  # fmt: skip
    run.edit(f"{stage}/summary.json", lambda content: content.update(endpoint=given))
    seen = render(run.folder)[1]
    told = "1,234 answers, 5,678 tokens read and 90 written, at a price of 0.1250. Failures: unparsable 3."
    assert told in seen.words and "https://host/v1" in seen.words and "script" not in seen.tags
    assert "The last command asked" not in seen.words
    done = {"asked": 1300, "cached": 66, "sent": 1240, "retries": 6}
    run.edit(f"{stage}/timing.json", lambda content: content.update(endpoint=done))
    words = render(run.folder)[1].words
    assert "asked 1,300 questions, 66 of them answered from disk; it sent 1,240 requests, 6 of them repeated" in words


@pytest.mark.parametrize("present", [[], ["critique_revision"], ["evaluate"], list(STAGES[:4])])
def test_missing_stages_say_so(tmp_path, no_plots, present):
    run = FakeRun(tmp_path)
    for stage in present:
        getattr(run, stage)()
    page, seen = render(run.folder)
    assert [anchor for anchor in seen.ids if anchor in SECTIONS] == SECTIONS
    assert page.count("Not run yet.") == len(STAGES) - len(present)
    assert "could not be drawn" not in page
    assert ("There is no result to show" in page) == ("evaluate" not in present)


def test_stages_that_a_run_need_not_have_are_shown_where_it_has_or_wants_them(tmp_path, no_plots):
    run = FakeRun(tmp_path)
    run.config()
    run.edit("config.json", lambda content: content["config"].update(stages=["sft", "dpo"]))
    page, seen = render(run.folder)
    assert {"sft", "ppo", "dpo"} <= set(seen.ids) and "best_of_n" not in seen.ids and "Best-of-n" not in seen.words
    assert seen.words.count("not asked for") == len(STAGES) - len(OPTIONAL) - 1  # every other one of the usual
    run.best_of_n()
    assert "best_of_n" in render(run.folder)[1].ids


def test_unfinished_stage_shows_what_there_is(tmp_path, no_plots):
    run = FakeRun(tmp_path).everything()
    for name in ("summary.json", "done.json", "timing.json"):
        (run.folder / "ppo" / name).unlink()
    with (run.folder / "ppo/metrics.jsonl").open("a") as torn:
        torn.write('{"update": 21, "sco')
    page, _ = render(run.folder)
    assert "Unfinished" in page and 'id="ppo-score-figure_1"' in page
    assert "ppo/metrics.jsonl: 1 lines are not JSON objects" in page


def test_null_numbers_show_as_dashes(tmp_path):
    run = FakeRun(tmp_path).everything()

    def blank(node):
        if isinstance(node, dict):
            return {key: blank(value) for key, value in node.items()}
        return (
            None
            if isinstance(node, int | float)
            else [blank(each) for each in node] if isinstance(node, list) else node
        )

    for stage in ("evaluate", "reward_model", "ppo", "sft", "dpo", "best_of_n", "judge"):
        for path in (run.folder / stage).glob("[sm]*.json*"):
            run.write(f"{stage}/{path.name}", [blank(json.loads(line)) for line in path.read_text().splitlines()])
    for name in ("refusal", "length"):
        run.edit(
            "evaluate/summary.json",
            lambda content, name=name: content["models"]["base"]["sets"]["helpful"].update({name: None}),
        )
    page, _ = render(run.folder)
    assert "could not be drawn" not in page
    assert "nan" not in re.findall(r"[a-z]+", page.lower()) and ">None<" not in page


def test_one_damaged_stage_costs_one_section(tmp_path, no_plots):
    run = FakeRun(tmp_path).everything()
    run.edit("sft/summary.json", lambda content: content.update(examples=["not", "a", "dict"]))
    (run.folder / "ppo/summary.json").write_text("{broken")
    page, seen = render(run.folder)
    assert page.count("This section could not be drawn") == 1
    assert "ppo/summary.json: not a JSON object" in page and "section “Supervised fine-tuning”" in page
    assert [anchor for anchor in seen.ids if anchor in SECTIONS] == SECTIONS


def test_zero_counters_and_skipped_rows_are_named(tmp_path, no_plots):
    run = FakeRun(tmp_path).everything()
    _, seen = render(run.folder)
    assert seen.words.count("critique_empty 0") == len(STAGES)
    assert "Prompts red_team: 1" in seen.words and "line 9" in seen.words
    assert "sft-long-1" in seen.words and "prompt longer than 256 tokens" in seen.words


def test_what_a_setting_leaves_out_of_the_rewritten_answers_and_adds_to_the_loss_of_dpo_is_said(tmp_path, no_plots):
    run = FakeRun(tmp_path).everything()
    plain = render(run.folder)[1].words
    assert "made likelier by less than" not in plain and "times the negative log-prob" not in plain
    more = {"sft": {"least_ratio": 0.8}, "dpo": {"nll_coef": 0.5}}

    def edit(content):
        for name, fields in more.items():
            content["config"].setdefault(name, {}).update(fields)

    run.edit("config.json", edit)
    told = render(run.folder)[1].words
    assert "and those that worked answers made likelier by less than 0.8 nats a token" in told
    assert "with 0.5 times the negative log-prob of a chosen token" in told


def test_unchanged_revisions_are_counted_by_their_texts(tmp_path):
    run = FakeRun(tmp_path)
    run.critique_revision()
    rows = list(read_run(run.folder).rows("critique_revision"))
    _, rounds = data_sections._rounds(read_run(run.folder))
    for number in (1, 2, 3, 4):
        flagged = sum(row["rounds"][number - 1]["flags"]["revision_unchanged"] for row in rows)
        assert rounds[number]["unchanged"] == flagged and rounds[number]["rows"] == len(rows)


def test_chains_are_chosen_without_looking_at_texts(tmp_path, no_plots):
    plain, other = FakeRun(tmp_path / "a").everything(), FakeRun(tmp_path / "b")
    other.hostile = "entirely other words "
    other.everything()
    chosen = [re.findall(r"<code>(red-\d+)</code>", render(run.folder)[0]) for run in (plain, other)]
    assert chosen[0] == chosen[1] and len(set(chosen[0])) == 4  # one of each category


def test_principles_are_named_by_title_while_the_constitution_is_the_same(tmp_path, no_plots):
    shipped = load_constitution("harmless_helpful")
    first = shipped.principles[0]
    named = html.escape(f"{first.title} ({first.id})")
    run = FakeRun(tmp_path).everything()
    run.edit("critique_revision/summary.json", lambda content: content["principles"].update({first.id: 3}))
    assert named not in render(run.folder)[0]  # the config names a constitution that is gone
    run.edit("config.json", lambda content: content["config"].update(constitution="harmless_helpful"))
    assert named not in render(run.folder)[0]  # it is there, but its hash is another
    run.edit("config.json", lambda content: content["constitution"].update(hash=shipped.hash))
    assert named in render(run.folder)[0]


def test_long_texts_are_cut_with_a_note_and_empty_ones_named():
    assert "1,200 of 5,000 characters" in text_block("x" * 5000)
    assert "(empty)" in text_block("") and "only white space" in text_block(" \n")
    assert "cut for display" not in text_block("x" * 1200)


def test_no_run_folder_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path / "none")


@pytest.mark.parametrize(
    ("accuracy", "beats", "said"),
    [(0.60, False, "does not beat"), (0.70, False, "is not shown to beat"), (0.80, True, "beats the simple rule")],
)
def test_reward_model_is_held_to_the_best_simple_rule(accuracy, beats, said):
    held_out = {
        "accuracy": {"value": accuracy, "low": 0.5, "high": 0.95, "n": 40},
        "best_rule": {"rule": "refusal_wins", "accuracy": 0.6},
        "gain_over_best_rule": interval(accuracy - 0.6, 40, 0.15) | {"p_value": 0.2},
        "beats_best_rule": beats,
    }
    verdict = verdicts.reward_model(held_out)
    assert said in verdict and "“the response that refuses wins”) in 60%" in verdict and "p = 0.200" in verdict
    assert verdicts.reward_model({"accuracy": UNKNOWN, "best_rule": {"rule": "coin", "accuracy": None}}) == ""


def test_the_reward_section_shows_accuracy_by_principle_and_category_and_what_the_heads_know(tmp_path, no_plots):
    run = FakeRun(tmp_path).everything()
    _, seen = render(run.folder)
    assert "Held-out accuracy by principle" in seen.words and "honesty-0 75%" in seen.words
    assert "Held-out accuracy by category" in seen.words and "(none) 60%" in seen.words
    assert "rule: the response that refuses wins 25%" in seen.words
    assert "AUROC of the deviation for wrong pairs: 0.70" in seen.words
    run.edit("reward_model/summary.json", lambda summary: summary["held_out"].update(uncertainty=None))
    assert "AUROC of the deviation" not in render(run.folder)[1].words, "one head is never of two minds"
    run.edit("reward_model/summary.json", lambda summary: summary["held_out"].update(uncertainty=0.2))
    area = {"uncertainty_auroc": {"value": 0.6, "low": 0.45, "high": 0.7, "n": 17}}
    run.edit("reward_model/summary.json", lambda summary: summary["held_out"].update(area))
    assert "not shown to tell where the model errs" in render(run.folder)[1].words


def test_models_above_a_billion_are_not_called_weak(tmp_path, no_plots):
    run = FakeRun(tmp_path).everything()
    run.edit("config.json", lambda content: content.update(parameters=7_240_000_000))
    _, seen = render(run.folder)
    assert "7.2 billion parameters" in seen.words and "weak critic" not in seen.words


def test_times_of_interrupted_stages_say_what_they_are(tmp_path, no_plots):
    run = FakeRun(tmp_path).everything()
    assert "Interrupted" not in render(run.folder)[1].words
    run.edit("sft/timing.json", lambda content: content.update(resumed=True))
    assert "that of the last attempt only: Supervised fine-tuning." in render(run.folder)[1].words


def test_verifiable_principles_show_the_shares_before_and_after(tmp_path, no_plots):
    run = FakeRun(tmp_path).everything()
    _, seen = render(run.folder)
    assert "Verifiable principles" in seen.words
    assert re.search(r"honesty-0 The text has at most 20 words\. 40 25% \[[^]]*\] 75% \[[^]]*\]", seen.words)
    assert "honesty-1 Never drawn. 0 – –" in seen.words
    run.edit("critique_revision/summary.json", lambda content: content.update(checks={}))
    assert "Verifiable principles" not in render(run.folder)[1].words


def test_flags_that_are_not_raised_have_no_badge(tmp_path, no_plots):
    _, seen = render(FakeRun(tmp_path).everything().folder)
    chains = seen.words[seen.words.index("From prompt to revision, row by row") :]
    assert "revision_unchanged" in chains.split("The models side by side")[0]
    assert "critique_empty" not in chains.split("The models side by side")[0]


def test_alarms_stand_on_the_first_screen_and_the_looks_in_their_section(tmp_path, no_plots):
    run = FakeRun(tmp_path).everything()
    assert "Watched for reward hacking" not in render(run.folder)[1].words
    run.monitors()
    page, seen = render(run.folder)
    first = seen.words[: seen.words.index("What the numbers do and do not show")]
    assert "Alarm: in PPO the monitors saw signs of reward hacking" in first
    assert "training reward up while the independent score falls (updates 5, 10, 15 and 1 more)" in first
    assert "This ended the training after update 20: " in first
    assert "The exported state is that of update 10, within all bounds." in first
    assert "do not trust" not in first
    assert page.count('id="ppo-proxy-figure_1"') == 1 and 'id="grpo-proxy-figure_1"' not in page
    assert "10 (exported) 1.03" in seen.words and "share of the constitution's checks kept" in seen.words
    assert "“as always stay safe” (24)" in seen.words
    assert "could not be drawn" not in page
    run.monitors("grpo", chosen=15, within=False)
    run.edit("evaluate/summary.json", lambda content: content.update(models={}))
    words = render(run.folder)[1].words
    first = words[: words.index("What the numbers do and do not show")]
    assert "in GRPO" in first and "update 15, which is out of bounds: do not trust its reward." in first


def test_looks_that_saw_nothing_raise_no_verdict_and_draw_their_plot(tmp_path):
    run = FakeRun(tmp_path)
    run.config()
    run.ppo()
    run.monitors()
    lines = [json.loads(line) for line in (tmp_path / "ppo/metrics.jsonl").read_text().splitlines()]
    run.write("ppo/metrics.jsonl", [{k: 0.0 if "alarm" in k else x for k, x in line.items()} for line in lines])
    page, seen = render(run.folder)
    assert "No alarm was raised." in seen.words and "Alarm:" not in seen.words
    assert 'id="ppo-proxy-figure_1"' in page and "could not be drawn" not in page
    look = json.loads((tmp_path / "ppo/looks/update-00000005.json").read_text())
    look["numbers"] |= {"proxy": None, "independent": {"value": None, "low": None, "high": None, "n": 0}, "kl": None}
    run.write("ppo/looks/update-00000005.json", look)
    (tmp_path / "ppo/looks/update-00000010.json").write_text("{torn")
    page, seen = render(run.folder)
    assert "could not be drawn" not in page and "looks/update-00000010.json: not a JSON object" in seen.words
    assert "nan" not in re.findall(r"[a-z]+", page.lower())


def test_the_reward_is_named_after_the_model_that_gave_it(tmp_path, no_plots):
    run = FakeRun(tmp_path).everything()
    own = "The reward is the score that PPO was trained to raise."
    words = render(run.folder)[1].words
    assert "score of this run's reward model, mean" in words and own in words
    run.edit("config.json", lambda content: content["config"].update(evaluate={"reward_model": "models/other"}))
    words = render(run.folder)[1].words
    assert "score of models/other, mean" in words and "score of this run's reward model, mean" not in words
    assert own not in words and "PPO was trained to raise that of this run's reward model." in words
    run.edit("config.json", lambda content: content["config"]["ppo"].update(reward_model="models/other"))
    assert own in render(run.folder)[1].words


def test_six_models_stand_side_by_side_in_their_order(tmp_path):
    run = FakeRun(tmp_path).everyone()
    page, seen = render(run.folder)
    assert "could not be drawn" not in page
    labels = ["base", "SL-CAI", "RL-CAI", "DPO", "best-of-n", "GRPO"]
    first_screen = page[page.index('id="results"') : page.index('id="limits"')]
    heads = [re.findall(r"<th[^>]*>([^<]*)</th>", head) for head in re.findall(r"<thead>.*?</thead>", first_screen)]
    assert heads == [["prompts", *labels]] * 2
    assert (
        "base 4% [0%, 12%], RL-CAI 46% [26%, 66%]. The intervals do not overlap. DPO 46% [26%, 66%]. The intervals do"
        in seen.words
    )
    for model in ("base", "sl_cai", "rl_cai", *LATER):
        assert f'id="ev-margin-{model}-figure_1"' in page
    refusals = page[page.index('id="ev-refusal-figure_1"') :].split("</figure>")[0]
    assert all(f">{label}<" in refusals for label in labels), "the legend names every model"
    assert len(set(re.findall(r"fill: var\(--(c\d)\)", refusals))) == 6, "a colour of its own for each"
    article = page[page.index('id="answers"') :].split("</article>")[0]
    assert [heading.strip() for heading in re.findall(r"<h4>([^<]*)", article)] == labels


def test_models_that_are_not_there_have_no_column(tmp_path, no_plots):
    run = FakeRun(tmp_path).everyone()
    run.edit("evaluate/summary.json", lambda content: [content["models"].pop(m) for m in ("rl_cai", "grpo")])
    page, seen = render(run.folder)
    assert "no model here was trained to raise it; best-of-n chooses by that of this run's reward model" in seen.words
    assert "base 4% [0%, 12%], DPO 46%" in seen.words
    assert "is then trained by PPO" not in seen.words and "without a reward model" in seen.words


def test_best_of_n_says_what_its_numbers_are(tmp_path, no_plots):
    run = FakeRun(tmp_path).everyone()
    assert "Best-of-n here" not in render(run.folder)[1].words  # nothing is recorded of its draws: it is a model
    run.edit("evaluate/summary.json", lambda content: content.update(draws={"base": 1, "best_of_n": 6}))
    words = render(run.folder)[1].words
    assert "the best of 6 answers of SL-CAI" in words and "Not distilled" in words
    assert re.search(r"6 0\.96 0\.54 \[0\.44, 0\.64\]", words), "the last point of the curve"
    run.edit("best_of_n/summary.json", lambda content: content.update(distillation={"examples": 47, "steps": 6}))
    words = render(run.folder)[1].words
    assert "Not distilled" not in words and "examples 47" in words


def test_dpo_is_held_to_the_rules_and_to_its_reference(tmp_path, no_plots):
    run = FakeRun(tmp_path).everything()
    words = render(run.folder)[1].words
    assert "the best simple rule (“the shorter response wins”) agrees with the label in 60%" in words
    assert "The policy is not shown to beat the simple rule." in words
    assert "Even the chosen responses have become less likely" in words
    assert "1.25 [1.00, 1.50] nats, mean; no estimate of a KL" in words  # the draws are not recorded
    run.edit("dpo/summary.json", lambda content: content["held_out"].update(accuracy=interval(0.95, 18)))
    run.edit("dpo/summary.json", lambda content: content["held_out"].update(chosen_reward=interval(0.2, 18, 0.1)))
    run.edit("config.json", lambda content: content["config"]["preferences"].update(response={"temperature": 1.0}))
    words = render(run.folder)[1].words
    assert "The policy beats the simple rule." in words and "Even the chosen" not in words
    assert "nats, mean; as the SL-CAI model wrote these responses, that estimates the KL" in words
    run.edit("config.json", lambda content: content["config"]["preferences"].update(contrasted=True))
    words = render(run.folder)[1].words
    assert "no estimate of a KL" in words and "they are not what it says by itself" in words
    run.edit("config.json", lambda content: content["config"]["preferences"].update(contrasted=False))
    run.edit("config.json", lambda content: content["config"].update(dpo={"policy": "models/other"}))
    words = render(run.folder)[1].words
    assert "no estimate of a KL" in words and "not what it says by itself" not in words


@pytest.mark.parametrize(
    ("sampling", "is_estimate"),
    [({"temperature": 1.0}, True), ({"temperature": 0.0}, False), ({"temperature": 1.0, "top_k": 40}, False)],
)
def test_a_log_ratio_is_called_kl_for_plain_draws_only(tmp_path, no_plots, sampling, is_estimate):
    run = FakeRun(tmp_path).everything()
    run.edit("config.json", lambda content: content["config"].update(evaluate={"response": sampling}))
    words = render(run.folder)[1].words
    assert ("an estimate of the KL to the base" in words) == is_estimate
    assert ("no estimate of the KL" in words) == (not is_estimate)


def test_sign_test_is_the_exact_binomial_tail():
    assert evaluation.sign_test(0, 0) == 1.0
    assert evaluation.sign_test(3, 3) == 1.0
    assert evaluation.sign_test(6, 0) == pytest.approx(2 / 64)
    assert evaluation.sign_test(1, 7) == pytest.approx(2 * (1 + 8) / 256)


def test_numbers_read_well():
    assert [numbers.percent(x) for x in (0, 0.004, 0.5, 0.996, 1, None, math.nan)] == [
        "0%",
        "0.4%",
        "50%",
        "99.6%",
        "100%",
        "–",
        "–",
    ]
    assert numbers.duration(3725) == "1 h 02 min" and numbers.duration(99.99) == "100 s"
    assert numbers.memory(3 * 2**29) == "1.50 GiB" and numbers.moment(86400) == "1970-01-02 00:00 UTC"
    assert numbers.moment(None) == "–" and numbers.moment("Friday") == "Friday"
    assert numbers.bounds({"value": 1, "low": None, "high": 2}) == ""


def test_a_run_with_the_usual_stages_alone_has_every_section_drawn(tmp_path, no_plots):
    run = FakeRun(tmp_path)
    run.config()
    for stage in STAGES:
        if stage not in OPTIONAL:
            getattr(run, stage)()
    assert "could not be drawn" not in render(run.folder)[0]
