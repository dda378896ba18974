"""The monitors of PPO and GRPO at work: probes, answers, scores, and a file a look in `looks/`.

What a look measures and when it raises an alarm is in cai_jax/monitors.py. Probes are prompts of the train sets, never
of the eval sets: a state is stopped and chosen by them. Nothing of a look is kept in memory: the next one reads the
files of those before it, so a stage that was killed goes on as if it had not been.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from cai_jax import distributed, monitors
from cai_jax.chat import encode_chat
from cai_jax.config import ALARMS
from cai_jax.labelers.contrast import Contrast
from cai_jax.labelers.external import ExternalLabeler
from cai_jax.labelers.judge import Judge
from cai_jax.labelers.opinion import Pair
from cai_jax.models.heads import cautious
from cai_jax.models.pretrained import Model
from cai_jax.provenance import read_json, write_json
from cai_jax.sampler import Generate, Row, Sampler
from cai_jax.stages import rewards
from cai_jax.stages.labelling import sigmoid
from cai_jax.stages.rollouts import PROMPT_SETS, Prompts, Rollouts
from cai_jax.stages.rows import messages_of
from cai_jax.stages.scoring import score_heads, score_texts
from cai_jax.stages.updates import Monitor
from cai_jax.text_metrics import classify_response

LOOKS = "looks"


def monitor_of(context, folder, reference: Model, source: rewards.Source, prompts: Prompts) -> Monitor | None:
    """The monitor that the config asks for, its look at the reference taken; None where it asks for none."""
    if not context.config.monitor.every:
        return None
    probes = draw_probes(context, folder.stage, prompts)
    watch = Watch(context, folder, source, probes, _judge(context), reference.tokenizer)
    if not distributed.by_first((folder.path / LOOKS / _file(0)).exists):
        watch.look(0, lambda: context.sampler(reference), None)
    return watch


def draw_probes(context, stage: str, prompts: Prompts) -> list[tuple[str, object]]:
    """(set, prompt) of the probes: of each set those first in an order by key, which more prompts do not change."""
    probes = []
    for name in PROMPT_SETS:
        own = {prompt.id for prompt in context.prompts[name].rows}
        usable = [prompt for prompt in prompts.rows if prompt.id in own]
        usable.sort(key=lambda prompt: context.row_seed(stage, prompt.id, "probe"))
        probes += [(name, prompt) for prompt in usable[: context.config.monitor.probes]]
    return probes


def _judge(context) -> Model | None:
    """The model that gives the independent score; None where none of this run does."""
    settings = context.config.monitor
    if settings.judge == "model":
        return context.load(settings.model, "reward")
    if settings.judge in ("rating", "contrast"):
        return context.load(settings.model or context.config.model.source, "policy")
    return None


@dataclass(frozen=True, eq=False)
class Watch:
    """A `Monitor`: looks at the policy where a look is due, and says whether training is to end."""

    context: object
    folder: object
    source: rewards.Source
    probes: list[tuple[str, object]]
    judge: Model | None
    tokenizer: object  # the policy's

    def __call__(self, update: int, policy_sampler: Callable, rollouts: Rollouts, report: dict) -> tuple[dict, bool]:
        """Metrics of the look (none where it is not due), and whether an alarm has lasted."""
        settings, stage = self.context.config.monitor, self.folder.stage
        if update % settings.every and update < getattr(self.context.config, stage).updates:
            return {}, False
        look = self.look(update, policy_sampler, float(report["kl"]))
        if look["alarms"]:
            self.context.progress.log(f"{stage}: update {update}: alarm: {', '.join(look['alarms'])}")
        if look["stop"]:
            self.context.progress.log(
                f"{stage}: stops after update {update}: {', '.join(look['stop'])} raised at {settings.patience} looks "
                "in a row"
            )
        return monitors.line(look), bool(look["stop"])

    def look(self, update: int, sampler_of: Callable[[], Sampler], kl: float | None) -> dict:
        """Answer the probes with `sampler_of()`, score the answers, and write the look down.

        The sampler, with its weights and its cache, is gone before that of a judge is made.
        """
        earlier = looks_before(self.folder, update)
        samples = sampler_of().run([self._answer(prompt) for _, prompt in self.probes])
        texts = [sample.text for sample in samples]
        reference = [row["text"] for row in earlier[0]["rows"]] if earlier else texts
        proxy = self._proxy(samples)
        independent = self._independent(sampler_of, samples, reference)
        rows = [
            {
                "id": prompt.id, "set": name, "text": sample.text, "tokens": len(sample.tokens),
                "truncated": sample.truncated, "kind": classify_response(sample.text), "proxy": _known(trained),
                "independent": _known(apart),
            }
            for (name, prompt), sample, trained, apart in zip(self.probes, samples, proxy, independent, strict=True)
        ]  # fmt: skip
        look = monitors.take_look(update, rows, kl, earlier, self.context.config.monitor)
        write_json(self.folder.path / LOOKS / _file(update), look)
        return look

    def _answer(self, prompt) -> Row:
        seed = self.context.row_seed(self.folder.stage, prompt.id, "probe", "response")  # the same at every look
        return (yield Generate(messages_of(prompt), self.context.config.monitor.response, seed))

    def _proxy(self, samples: list) -> list[float]:
        """The training reward of every answer, without bias and penalties that PPO puts on rollouts."""
        stage = self.folder.stage
        if self.source.kind == "model":
            tokens = _conversations(self.tokenizer, self.probes, samples)
            heads_BK = score_heads(self.context, self.source.model.config, self.source.model.params, tokens)
            return list(cautious(heads_BK, getattr(self.context.config, stage).uncertainty_penalty))
        asked = Rollouts("monitor", [prompt for _, prompt in self.probes], [sample.text for sample in samples], {})
        return list(rewards.text_scores(self.context, stage, self.source, asked))

    def _independent(self, sampler_of: Callable, samples: list, reference_texts: list[str]) -> list[float | None]:
        """The judge's score of every answer; None for one that it cannot judge.

        rule: the share of the constitution's checks that it keeps. rating: 1 to 10. contrast: nats a token by which a
        request to keep the principle makes it likelier than one to break it. model: the score of a reward model.
        external: the probability that the model at the endpoint prefers it to the reference's answer.
        """
        context, kind = self.context, self.context.config.monitor.judge
        if kind == "rule":
            checked = [principle for principle in context.constitution.principles if principle.check]
            return [rewards.rule_score(sample.text, checked) for sample in samples]
        if kind == "model":
            tokens = _conversations(self.tokenizer, self.probes, samples)
            return list(score_texts(context, self.judge.config, self.judge.params, tokens))
        asked = sampler_of() if kind == "external" else context.sampler(self.judge)
        ask = self._question(kind, asked.max_length)
        return asked.run(
            ask(prompt, sample.text, there, self._principles(prompt))
            for (_, prompt), sample, there in zip(self.probes, samples, reference_texts, strict=True)
        )

    def _question(self, kind: str, max_length: int) -> Callable[..., Row]:
        """`(prompt, text, reference's text, principles) -> Row`: a row program that returns the score of the text."""
        if kind == "external":
            labeler = ExternalLabeler(self.context.endpoint, self.context.constitution)
            return partial(_preferred, labeler)
        if kind == "contrast":
            judge = Contrast(Judge(self.judge.tokenizer, self.judge.hash, max_length))
            return lambda prompt, text, _, principles: _ratio(judge, prompt, text, principles)
        rate = rewards.rater(self.judge, max_length)
        return lambda prompt, text, _, principles: rate(messages_of(prompt), text, principles)

    def _principles(self, prompt) -> list:
        """Those that the judge goes by for a probe, the same at every look."""
        principles = self.context.constitution.principles
        if self.context.config.monitor.principles == "all":
            return principles
        return [principles[self.context.row_seed(self.folder.stage, prompt.id, "monitor") % len(principles)]]


def _preferred(labeler: ExternalLabeler, prompt, text: str, reference_text: str, principles) -> Row:
    if text == reference_text:
        return 0.5
    opinion = yield from labeler.compare(Pair(prompt.id, messages_of(prompt), text, reference_text), principles, 0)
    return None if opinion.logit is None else sigmoid(opinion.logit)


def _ratio(labeler: Contrast, prompt, text: str, principles) -> Row:
    ratios_P1 = yield from labeler.ratios(messages_of(prompt), [text], principles)
    return None if ratios_P1 is None else float(np.mean(ratios_P1))


def _conversations(tokenizer, probes, samples) -> list[list[int]]:
    return [
        encode_chat(tokenizer, messages_of(prompt)) + sample.tokens
        for (_, prompt), sample in zip(probes, samples, strict=True)
    ]


def _known(score) -> float | None:
    return float(score) if score is not None and np.isfinite(score) else None


def looks_before(folder, update: int) -> list[dict]:
    """The looks at earlier updates, in their order, the reference's first; of the later ones' rows the scores alone."""
    return distributed.by_first(lambda: _read(folder, update))


def _read(folder, update: int) -> list[dict]:
    paths = sorted((folder.path / LOOKS).glob("update-*.json"))
    looks = [read_json(path) for path in paths if path.name < _file(update)]
    for look in looks[1:]:
        look["rows"] = [{name: row[name] for name in ("id", "set", "proxy", "independent")} for row in look["rows"]]
    return looks


def _file(update: int) -> str:
    return f"update-{update:08d}.json"


def summary(context, folder, metrics: list[dict]) -> dict:
    """What the summary of a stage says of its monitors; nothing where they are off.

    `alarms`: the updates at which each was raised; `stop`: those that ended the training; `unjudged`: answers of all
    looks that the independent judge gave no score; `chosen`: the update whose state is exported, and whether it was
    within bounds. Of `checkpoints.export=best` the choice is not known here.
    """
    settings = context.config.monitor
    if not settings.every:
        return {}
    looks = looks_before(folder, metrics[-1]["update"] + 1)
    last, every = metrics[-1]["update"], getattr(context.config, folder.stage).checkpoint_every
    export = context.config.checkpoints.export
    found = {
        "judge": settings.judge,
        "looks": len(looks) - 1,
        "probes": {name: sum(row["set"] == name for row in looks[0]["rows"]) for name in PROMPT_SETS},
        "alarms": {name: [look["update"] for look in looks if name in look["alarms"]] for name in ALARMS},
        "stop": looks[-1]["stop"],
        "unjudged": sum(row["independent"] is None for look in looks for row in look["rows"]),
    }
    if export != "best":
        update = monitors.chosen(metrics, every) if export == "frontier" else last
        within = {look["update"]: look["within_bounds"] for look in looks}
        found |= {"chosen": update, "chosen_within_bounds": within[update]}
    return {"monitor": found}
