"""What a run is: frozen dataclasses; a named run is a Python function that returns one."""

import os
from dataclasses import dataclass, field
from pathlib import Path

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")  # of every layer
LABELERS = ("options", "thought", "contrast", "rating", "rule", "external")
STAGES = (
    "red_team", "critique_revision", "sft", "judge", "preferences", "reward_model", "ppo", "dpo", "best_of_n", "grpo",
    "evaluate",
)  # fmt: skip
OPTIONAL = ("red_team", "judge", "dpo", "best_of_n", "grpo")  # stages that a run has where its config names them
ALARMS = ("kl", "refusal", "degenerate", "length", "boilerplate", "divergence")  # of the monitors


@dataclass(frozen=True)
class Model:
    """Where a run starts from and in which precision it computes."""

    source: str  # a Hugging Face folder, a hub id, a .gguf file, or random:<family> (tests)
    dtype: str = "float32"  # stored parameters and optimizer moments
    compute_dtype: str = "float32"  # operands of matrix products; products accumulate in float32
    remat: str = "none"  # training memory: "none" keeps all, "dots" the results of products, "full" layers' inputs only
    attention: str = "auto"  # "xla", "splash" (TPU), "cudnn" (GPU), or "auto": by device; all give the same


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; one of them may be -1: whatever is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class PromptSet:
    """A set of prompts: ours, a file, a folder saved by `datasets`, or a hub dataset."""

    path: str  # shipped:NAME | .jsonl .json .csv (each also .gz) | .parquet | folder | hub id
    split: str = ""  # keep rows whose "split" column says so; for a hub dataset, its split
    subset: str = ""  # of a hub dataset that has several: the name of one
    prompt: str = "prompt"  # column: a text, or a list of {role, content} (multi-turn context)
    id: str = "id"  # column; rows without one are numbered
    category: str = "category"  # column; rows without one have category ""
    limit: int = 0  # the first so many rows, spread over categories; 0: all


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run. Nothing in an eval set may stand in a train set."""

    red_team: PromptSet = PromptSet("shipped:red_team", split="train")
    helpful: PromptSet = PromptSet("shipped:helpful", split="train")
    eval_red_team: PromptSet = PromptSet("shipped:red_team", split="eval")
    eval_helpful: PromptSet = PromptSet("shipped:helpful", split="eval")
    eval_look_alike: PromptSet = PromptSet("shipped:look_alike", split="eval")


@dataclass(frozen=True)
class Sampling:
    """How one row is sampled. Temperature 0 is greedy; a filter at its default is off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()  # texts that end a row; they are not part of it


@dataclass(frozen=True)
class Sampler:
    """The shape of the sampler: rows decoded together, and the longest row in tokens."""

    rows: int = 32  # slots of the cache
    max_length: int = 1024
    prefill_tokens: int = 128  # run in one pass, on all devices together
    int8_weights: bool = False  # of the layers' projections
    int8_cache: bool = False  # keys and values


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible HTTP interface: what is meant where a labeler or a critic is "external".

    Bounds on spending hold for the run folder, over all commands; 0: none. Answers that are on disk cost nothing.
    """

    base_url: str = ""  # such as http://localhost:8000/v1
    model: str = ""  # its name there
    key_env: str = ""  # environment variable that holds the key, such as OPENAI_API_KEY; "": no key is sent
    limit_field: str = "max_tokens"  # what a request calls its limit; newer OpenAI models: max_completion_tokens
    requests_at_once: int = 8
    requests_per_minute: float = 0.0  # 0: as fast as answers come
    timeout: float = 60.0  # seconds, for a whole answer
    retries: int = 5  # after 429, 5xx, a timeout or a broken connection, with growing waits
    max_requests: int = 0  # with those that are repeated
    max_tokens_total: int = 0  # read and written; a request that may pass it is not sent
    max_cost: float = 0.0  # in the currency of the prices
    price_read: float = 0.0  # of a million tokens that the model reads
    price_written: float = 0.0  # of a million tokens that it writes
    cache: str = ""  # folder of answers, which runs may share; "": endpoint/answers in the run folder
    logprobs: int = 5  # likeliest tokens asked for at each place of a verdict; 0: verdicts are read from texts alone
    samples: int = 1  # verdicts drawn at temperature 1 for each order, where there are no log-probs
    verdict_tokens: int = 8  # room for a verdict; models that reason before they answer need more


@dataclass(frozen=True)
class Optimizer:
    """AdamW with global-norm clipping and a warmup schedule."""

    learning_rate: float = 1e-5
    schedule: str = "cosine"  # cosine | linear | constant, after the warmup
    warmup_fraction: float = 0.1  # of all steps
    weight_decay: float = 0.0  # on matrices only
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0


@dataclass(frozen=True)
class Lora:
    """Adapters of low rank in place of full training (Hu et al. 2021, arXiv 2106.09685), in every stage that trains.

    The models stay frozen, and policy and reference, or value model and reward model, are one copy of them; a score
    head trains whole. Exported models have their adapters merged, and lie beside them in peft's format.
    """

    rank: int = 0  # 0: off, every weight trains
    alpha: float = 16.0  # an adapter counts alpha / rank
    targets: tuple[str, ...] = PROJECTIONS  # projections that get one


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
    response: Sampling = Sampling(max_new_tokens=128)
    critique: Sampling = Sampling(max_new_tokens=96)
    revision: Sampling = Sampling(max_new_tokens=128)
    critic: str = ""  # who writes the critiques; "": the model itself, external: the model at `endpoint`
    reviser: str = ""  # who writes the revisions, likewise
    rows_per_shard: int = 64


@dataclass(frozen=True)
class Sft:
    """Fine-tuning on the revisions of every round plus the model's own helpful answers."""

    mixer: tuple[str, ...] = ()  # SET=FRACTION of revisions, helpful, sets of conversations; (): all of the first two
    epochs: int = 1
    batch_size: int = 8  # packed sequences a step
    microbatches: int = 1
    sequence_length: int = 512
    helpful: Sampling = Sampling(max_new_tokens=128)
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
    """AI labels: two responses a prompt, compared under drawn principles."""

    policy: str = ""  # model that answers; "": the SL-CAI model of this run
    judge: str = ""  # model that labels; "": the model that the run starts from
    labelers: tuple[str, ...] = ("options",)  # of options, thought, contrast, rating, rule; several vote
    principles: int = 1  # drawn for a pair without repetition, their log-odds averaged; 0: all
    orders: str = "both"  # the responses are shown in both orders and averaged, or first: in one only
    guard: bool = True  # mask what imitates a verdict, a rating or a next turn before a judge reads a response
    thought: Thought = Thought()
    contrast: Contrast = Contrast()
    rating: Rating = Rating()
    rule: Rule = Rule()
    filters: Filters = Filters()
    response: Sampling = Sampling(max_new_tokens=128)
    pairs_per_prompt: int = 1
    rows_per_shard: int = 64


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
    reward: str = "model"  # score of a response by: model, a reward model; judge, a rating from 1 to 10; rule, checks
    reward_model: str = ""  # "": the reward model of this run
    judge: str = ""  # model that rates; "": the model that the run starts from
    principles: str = "drawn"  # for judge and rule: drawn, one for each prompt of an update; all, the mean over them
    value_trunk: str = "separate"  # a value model of its own, or shared: a value head on the policy
    updates: int = 100
    rollouts: int = 64  # rows an update
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
    reward: str = "model"  # as in Ppo, with the two below
    reward_model: str = ""  # "": the reward model of this run
    judge: str = ""  # model that rates; "": the model that the run starts from
    principles: str = "drawn"  # drawn or all
    updates: int = 100
    rollouts: int = 64  # rows an update
    group: int = 8  # of them to one prompt
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
