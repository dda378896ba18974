"""The pieces of a config that are not one stage's: models, prompts, sampling, optimizers; for use by cai_jax.config."""

from dataclasses import dataclass

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")  # of every layer


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
    answer: str = "answer"  # column: a good answer, of which `evaluate` tells the loss; rows may have none
    more: tuple[str, ...] = ()  # PATH or PATH:SPLIT of further sets with the same columns, whose rows come after these
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
    max_length: int = 2048
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
