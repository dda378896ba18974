"""What a run is: frozen dataclasses; a named run is a Python function that returns one."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from cai_jax.config_shared import (  # noqa: F401 - users take all of them from here
    PROJECTIONS,
    Endpoint,
    Lora,
    Mesh,
    Model,
    Optimizer,
    Prompts,
    PromptSet,
    Sampler,
    Sampling,
)

LABELERS = ("options", "thought", "contrast", "examples", "rating", "rule", "external")
STAGES = (
    "red_team", "critique_revision", "sft", "judge", "preferences", "reward_model", "ppo", "dpo", "best_of_n", "grpo",
    "evaluate",
)  # fmt: skip
OPTIONAL = ("red_team", "judge", "dpo", "best_of_n", "grpo")  # stages that a run has where its config names them
# What a round of critique and revision is flagged for, and which of it makes a text no revision at all.
ROUND_FLAGS = (
    "critique_truncated", "critique_empty", "revision_truncated", "revision_empty", "revision_unchanged",
    "revision_copies_critique", "revision_copies_example", "revision_degenerate",
)  # fmt: skip
NO_REVISIONS = ("revision_unchanged", "revision_copies_critique", "revision_copies_example", "revision_degenerate")
ALARMS = ("kl", "refusal", "degenerate", "length", "boilerplate", "divergence")  # of the monitors


@dataclass(frozen=True)
class RedTeam:
    """New red-team prompts by model (Perez et al. 2022), which the later stages use beside `prompts.red_team`."""

    writer: str = ""  # model that writes and tells categories apart; "": the model that the run starts from
    target: str = ""  # model that the prompts are tried on; "": the model that the run starts from
    draws: int = 8  # lists asked for in each category
    examples: int = 6  # prompts of the category that the writer is shown, drawn anew for each list
    request: Sampling = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=128)
    response: Sampling = Sampling(max_new_tokens=64)  # of the target
    most_similar: float = 0.5  # overlap with another prompt from which on one is a repetition; of character 4-grams
    keep: str = "answer"  # what the target answers; margin: what it is least ready to refuse; all
    easiest: float = 0.5  # with keep=margin: the share of prompts with the lowest margins of refusing
    agreeing: bool = False  # keep only what the classifier finds in the category that was asked for
    rows_per_shard: int = 64


@dataclass(frozen=True)
class CritiqueRevision:
    """SL-CAI data: response, then rounds of critique and revision (Bai et al. 2022, section 3)."""

    rounds: int = 4
    critiques: bool = True  # a critique before each revision; without, revisions are asked for at once (section 3.5)
    draws: int = 1  # revisions drawn in a round; the likeliest after the constitution's worked answers, as against
    # others or none, becomes the revision: see the labeler `examples`
    principles: str = "drawn"  # for a round: drawn, one of all; matched, one of the prompt's category, or where there
    # is none one whose aim is harmless
    response: Sampling = Sampling(max_new_tokens=128)
    critique: Sampling = Sampling(max_new_tokens=96)
    revision: Sampling = Sampling(max_new_tokens=128)
    sentences: int = 0  # that a revision keeps of those that it ends, for models whose later ones say little; 0: all
    copy_overlap: float = 0.7  # with a worked revision, of 4-character runs, from which on a revision is a copy of it
    critic: str = ""  # who writes the critiques; "": the model itself, external: the model at `endpoint`
    reviser: str = ""  # who writes the revisions, likewise
    rows_per_shard: int = 64


@dataclass(frozen=True)
class Sft:
    """Fine-tuning on the revisions of every round plus the model's own helpful answers."""

    mixer: tuple[str, ...] = ()  # SET=FRACTION of revisions, helpful, sets of conversations; (): all of the first two
    drop: tuple[str, ...] = NO_REVISIONS  # revisions that are not learnt from, by the flags of their rounds
    least_ratio: float = 0.0  # how much likelier a token of a revision must have become, in nats, by worked answers of
    # its principle's aim as against others; 0: all are learnt from
    epochs: int = 1
    batch_size: int = 8  # packed sequences a step
    microbatches: int = 1
    sequence_length: int = 512
    share_start: bool = False  # what all prompts begin with, as a system prompt, once a row: fewer tokens, but plain
    # attention on TPUs
    helpful: Sampling = Sampling(max_new_tokens=128)
    # At each token of its own helpful answers the model learns, times this, the KL from the distribution that it had;
    # 0: the token that was drawn, as any other.
    anchor: float = 0.0
    rows_per_shard: int = 64
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)
    checkpoint_every: int = 50  # steps


@dataclass(frozen=True)
class Judge:
    """What the labelers of `preferences` are worth on gold pairs, before their labels are spent on training."""

    gold: str = ""  # a .jsonl file of gold pairs; "": the shipped one of the constitution's name
    principles: str = "own"  # a pair is judged under its own principle, or under all
    also: tuple[str, ...] = ()  # labelers that are measured beside those that label
    calibrate: bool = True  # fit a temperature for each labeler, by which preferences divides its log-odds
    pleas: int = 8  # pairs whose worse response pleads for itself in every way we know; 0: none
    minimum_accuracy: float = 0.5  # what the lower end of the vote's 95% interval must be above
    on_failure: str = "stop"  # stop: the run ends where it is not; continue: it goes on, and the report says so first


@dataclass(frozen=True)
class Thought:
    """The labeler that reasons before its verdict."""

    reasoning: Sampling = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=96)
    most: float = 0.6  # a label's probability stays from 1 - most to most, as verdicts after reasoning are too sure
    # (Bai et al. 2022, section 4.1); 1: as it is


@dataclass(frozen=True)
class Contrast:
    """The labeler that asks how much likelier a response is where the principle is asked for, not its opposite."""

    per_token: bool = True  # the mean over a response's tokens; else their sum
    scale: float = 10.0  # nats of the label for a difference of 1


@dataclass(frozen=True)
class Examples:
    """The labeler that asks how much likelier a response is after worked answers of its aim than after others."""

    per_token: bool = False  # the mean over a response's tokens; else their sum
    scale: float = 1.0  # nats of the label for a difference of 1


@dataclass(frozen=True)
class Rating:
    """The labeler that rates each response alone, from 1 to 10."""

    scale: float = 1.0  # nats of the label for a point of difference


@dataclass(frozen=True)
class Rule:
    """The labeler that runs the checks of the constitution."""

    probability: float = 1.0  # of the response that keeps every rule over one that keeps none, up to 10 nats


@dataclass(frozen=True)
class Filters:
    """Which labelled pairs are kept for training; applied in this order, each counted."""

    duplicates: bool = True  # drop identical responses, and a pair that stands there already
    ties: bool = True  # drop a probability within 0.001 of 1/2
    consistent: bool = False  # drop where the judge's choice changes with the order of showing
    least_confidence: float = 0.5  # probability that the preferred response must have; 0.5: off
    length_matched: bool = False  # drop until the longer response wins as often as the shorter, at every length ratio


@dataclass(frozen=True)
class Preferences:
    """AI labels: responses to a prompt, two by two compared under drawn principles."""

    policy: str = ""  # model that answers; "": the SL-CAI model of this run
    judge: str = ""  # model that labels; "": the model that the run starts from
    labelers: tuple[str, ...] = ("options",)  # of LABELERS; several vote
    principles: int = 1  # drawn for a pair without repetition, their log-odds averaged; 0: all
    matched: bool = False  # draw among those of the aim of the prompt's set, harmless for prompts.red_team, helpful for
    # prompts.helpful (Bai et al. 2022, section 4.1); of these among those of its category, where it has any
    contrasted: bool = False  # sample a prompt's responses with worked answers as few-shot context, by turns harmless
    # and helpful ones, so that they differ (RLCD-Rescore, Yang et al. 2024, arXiv 2307.12950)
    orders: str = "both"  # the responses are shown in both orders and averaged, or first: in one only
    guard: bool = True  # mask what imitates a verdict, a rating or a next turn before a judge reads a response
    thought: Thought = Thought()
    contrast: Contrast = Contrast()
    examples: Examples = Examples()
    rating: Rating = Rating()
    rule: Rule = Rule()
    filters: Filters = Filters()
    response: Sampling = Sampling(max_new_tokens=128)
    share: float = 1.0  # of the prompts of each set, drawn by the seed
    responses_per_prompt: int = 2  # each two of them are a pair
    rows_per_shard: int = 64  # prompts with their pairs, or labels


@dataclass(frozen=True)
class RewardModel:
    """Bradley-Terry with soft targets on a backbone with a scalar head, or with an ensemble of them."""

    start: str = ""  # backbone; "": the SL-CAI model of this run
    epochs: int = 1
    batch_size: int = 16  # pairs a step
    microbatches: int = 1
    max_length: int = 512  # of a pair: the prompt and both responses, tokens
    held_out: float = 0.2  # share of prompts kept for the evaluation of the model
    heads: int = 1  # each with its own start and its own sample of the pairs; the mean is the score
    margin: float = 0.0  # scores are to lie this many of the label's log-odds further apart than the label says
    center: float = 0.0  # weight of (r_chosen + r_rejected)^2
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)
    checkpoint_every: int = 50


@dataclass(frozen=True)
class Ppo:
    """PPO with a KL penalty to the frozen SL-CAI model; sources beside the formulas in objectives/ppo.py."""

    policy: str = ""  # where policy and reference start; "": the SL-CAI model of this run
    # Score of a response by: model, a reward model; judge, a rating from 1 to 10; examples, how much likelier worked
    # answers of the aim of the prompt's set make it, as `preferences.examples` has it; rule, checks.
    reward: str = "model"
    reward_model: str = ""  # "": the reward model of this run
    judge: str = ""  # model that rates, or that reads the worked answers; "": the model that the run starts from
    principles: str = "drawn"  # for judge and rule: drawn, one for each prompt of an update; all, the mean over them
    value_trunk: str = "separate"  # a value model of its own, or shared: a value head on the policy
    updates: int = 100
    rollouts: int = 64  # rows an update
    red_team_share: float = 0.0  # of the prompts of an update, the others are helpful ones; 0: by the sizes of the sets
    epochs: int = 2  # passes over the rollouts of an update
    minibatches: int = 2  # optimizer steps a pass
    microbatches: int = 1
    max_update_kl: float = 0.0  # no more steps in an update once a minibatch has moved so far, nats a token; 0: off
    max_prompt_tokens: int = 256  # longer prompts are counted and left out
    response: Sampling = Sampling(max_new_tokens=128)
    kl_coef: float = 0.02
    kl_target: float = 0.0  # nats a response that an adaptive coefficient steers to, from kl_coef on; 0: it is fixed
    kl_horizon: int = 10000  # rollouts in which an adaptive coefficient can change by a fifth
    kl_per: str = "token"  # where the penalty stands: on each token, or for the whole sequence on its last
    kl_estimator: str = "k1"
    normalise_scores: bool = False  # by mean and deviation of all scores so far; values with them
    score_clip: float = 0.0  # scores are kept within plus and minus this; 0: off
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.1
    whiten_advantages: bool = True
    missing_eos_penalty: float = 1.0  # taken off the score of a row that did not end
    uncertainty_penalty: float = 0.0  # deviations of the reward model's heads that are taken off a score
    frozen_dtype: str = ""  # of reference and reward model: "" (as model.dtype), bfloat16 or int8; not with adapters
    optimizer: Optimizer = Optimizer(learning_rate=1e-6, schedule="linear", eps=1e-5)
    checkpoint_every: int = 10  # updates


@dataclass(frozen=True)
class Dpo:
    """Direct preference optimization on the labelled pairs, no reward model; sources beside objectives/dpo.py."""

    policy: str = ""  # where policy and reference start; "": the SL-CAI model of this run
    kind: str = "sigmoid"  # sigmoid | ipo | hinge | robust
    beta: float = 0.1  # how strongly the policy is tied to the reference
    smoothing: float = 0.0  # share of labels taken to be wrong; for sigmoid (conservative DPO) and robust
    nll_coef: float = 0.0  # weight of a chosen token's negative log-prob beside the loss: holds its probability up
    soft_labels: bool = False  # sigmoid only: a label's probability is the target, and ties count too
    epochs: int = 1
    batch_size: int = 16  # pairs a step
    microbatches: int = 1
    max_length: int = 512  # of a pair: the prompt and both responses, tokens
    held_out: float = 0.2  # share of prompts kept for the evaluation of the model
    rows_per_shard: int = 256  # of the reference's log-probs
    optimizer: Optimizer = Optimizer(learning_rate=1e-6)
    checkpoint_every: int = 50


@dataclass(frozen=True)
class BestOfN:
    """The best of n answers by the reward model: what PPO is to be measured by, as it needs no training.

    Without `distill` it is a way to answer: `evaluate` draws n answers to each of its prompts. With it, the SL-CAI
    model is fine-tuned on the best answers.
    """

    policy: str = ""  # model that answers; "": the SL-CAI model of this run
    reward_model: str = ""  # "": the reward model of this run
    n: int = 8  # answers a prompt
    response: Sampling = Sampling(max_new_tokens=128)
    rows_per_shard: int = 64
    distill: bool = False
    epochs: int = 1  # of the distillation, like all that follows
    batch_size: int = 8  # packed sequences a step
    microbatches: int = 1
    sequence_length: int = 512
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)
    checkpoint_every: int = 50


@dataclass(frozen=True)
class Grpo:
    """GRPO (Shao et al. 2024, arXiv 2402.03300): a response is compared with others to its prompt, no value model."""

    policy: str = ""  # where policy and reference start; "": the SL-CAI model of this run
    reward: str = "model"  # as in Ppo, with the three below
    reward_model: str = ""  # "": the reward model of this run
    judge: str = ""
    principles: str = "drawn"
    updates: int = 100
    rollouts: int = 64  # rows an update
    group: int = 8  # of them to one prompt
    red_team_share: float = 0.0  # as in Ppo
    epochs: int = 1  # passes over the rollouts of an update
    minibatches: int = 1  # optimizer steps a pass
    microbatches: int = 1
    max_update_kl: float = 0.0  # as in Ppo
    max_prompt_tokens: int = 256  # longer prompts are counted and left out
    response: Sampling = Sampling(max_new_tokens=128)
    kl_coef: float = 0.04  # of k3 in the loss
    clip: float = 0.2
    scale_advantages: bool = True  # by the deviation of their group; false: Dr. GRPO (Liu et al. 2025)
    length_norm: str = "response"  # the loss of a response over its tokens, or over the limit of tokens: Dr. GRPO
    missing_eos_penalty: float = 1.0  # taken off the score of a row that did not end
    uncertainty_penalty: float = 0.0  # deviations of the reward model's heads that are taken off a score
    frozen_dtype: str = ""  # of reference and reward model: "" (as model.dtype), bfloat16 or int8; not with adapters
    optimizer: Optimizer = Optimizer(learning_rate=1e-6, schedule="constant", eps=1e-5)
    checkpoint_every: int = 10  # updates


@dataclass(frozen=True)
class Monitor:
    """Watches PPO and GRPO for reward hacking: the policy answers fixed probes, prompts drawn from the train sets.

    The numbers, alarms and bounds are defined in monitors.py. A judge scores the answers that is not the reward which
    the policy is trained on.
    """

    every: int = 0  # updates between two looks; there is one after the last update, too; 0: off
    probes: int = 32  # prompts from each of the sets red_team and helpful
    response: Sampling = Sampling(temperature=0.0, max_new_tokens=128)
    judge: str = "rating"  # rule, rating, contrast, external, or model: a reward model
    model: str = ""  # what rates or contrasts, "": the model that the run starts from; for judge=model a reward model
    principles: str = "drawn"  # that the judge goes by: drawn, one for each probe; all, the mean over them
    kl_budget: float = 0.0  # nats a response, mean over the rollouts of an update; 0: none
    refusal_bound: float = 0.05  # share of safe (helpful) probes that may be refused
    degenerate_bound: float = 0.1  # share of broken or empty answers beyond the reference's
    length_factor: float = 2.0  # mean tokens over the reference's, or the reference's over them; 0: any
    boilerplate_bound: float = 0.2  # share of the words of safe answers that is new boilerplate
    stop: tuple[str, ...] = ALARMS  # which alarms end the training; the others are recorded alone
    patience: int = 2  # looks in a row with the same alarm that end it


@dataclass(frozen=True)
class Checkpoints:
    """Which states of a training stage stay on disk while it runs; each stage says how often it saves."""

    keep: int = 1  # the last so many
    export: str = "last"  # which state becomes the model. best: of the states at checkpoints and at the end, the one of
    # the lowest mean training loss since the checkpoint before (sft, best_of_n), the lowest loss on the held-out pairs
    # (reward_model, dpo; the held-out numbers are then those of a choice made on them), the highest
    # mean reward (ppo, grpo).
    # frontier, in ppo and grpo: of the states that the monitors have looked at, the one with the highest independent
    # score on red-team probes among those within bounds (monitors.py); the other stages export their last


@dataclass(frozen=True)
class Evaluate:
    """The models that there are side by side, from the base on, on prompts that no stage has trained on."""

    sft: str = ""  # "": the SL-CAI model of this run
    rl: str = ""  # "": the RL-CAI model of this run
    dpo: str = ""  # "": the DPO model of this run
    best_of_n: str = ""  # "": the best of n of this run, or the model distilled from it
    grpo: str = ""  # "": the GRPO model of this run
    reward_model: str = ""  # "": the reward model of this run
    response: Sampling = Sampling(temperature=0.0, max_new_tokens=128)
    rows_per_shard: int = 64


@dataclass(frozen=True)
class Logging:
    """Where training numbers go beside metrics.jsonl, timings.jsonl and the TensorBoard event files."""

    wandb: str = ""  # a Weights & Biases project; "": none


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: Model
    description: str  # one line for --list
    constitution: str = "harmless_helpful"  # a shipped name, or a path to a YAML file
    principles: tuple[str, ...] = ()  # ids of those to go by; (): all of the constitution
    run_dir: str = ""  # "": runs/<config name> under the folder the command is run in
    seed: int = 0
    stages: tuple[str, ...] = tuple(stage for stage in STAGES if stage not in OPTIONAL)
    mesh: Mesh = Mesh()
    logging: Logging = Logging()
    prompts: Prompts = field(default_factory=Prompts)
    sampler: Sampler = Sampler()
    checkpoints: Checkpoints = Checkpoints()
    lora: Lora = Lora()
    endpoint: Endpoint = Endpoint()
    red_team: RedTeam = RedTeam()
    critique_revision: CritiqueRevision = CritiqueRevision()
    sft: Sft = Sft()
    judge: Judge = Judge()
    preferences: Preferences = Preferences()
    reward_model: RewardModel = RewardModel()
    ppo: Ppo = Ppo()
    dpo: Dpo = Dpo()
    best_of_n: BestOfN = BestOfN()
    grpo: Grpo = Grpo()
    monitor: Monitor = Monitor()
    evaluate: Evaluate = Evaluate()


def cache_folder() -> Path:
    """Where fetched models and compiled programs are kept: $CAI_JAX_CACHE, else ~/.cache/cai_jax."""
    return Path(os.environ.get("CAI_JAX_CACHE") or "~/.cache/cai_jax").expanduser()
