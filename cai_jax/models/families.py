"""Model families: a Hugging Face config as the numbers of the one decoder, leaves as names of tensors.

A family is data. To add one: a row in FAMILIES (its defaults hold for keys that config.json leaves out) and,
where it differs, a line in `config_from_hf`, `_layer_types` or `tensor_names`. Defaults and layouts follow
the configs and checkpoints that transformers reads.

Letters: L layers, D model, F feed-forward, H query heads, K key/value heads, N head size, V vocabulary.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax.config import PROJECTIONS
from cai_jax.errors import UserError
from cai_jax.models import kernels
from cai_jax.models.hf_config import Reader


@dataclass(frozen=True)
class RopeKind:
    """How positions turn into angles. `factor` and the rest matter only where `scaling` says so."""

    theta: float
    scaling: str = "default"  # default | linear | llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """All that the decoder needs to know of a model. Hashable: a static argument of jitted functions."""

    family: str  # Hugging Face's model_type
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    activation: str  # silu | gelu_tanh
    norm_eps: float
    norm_offset: float  # norms multiply by offset + weight
    embed_scale: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    post_norms: bool  # a norm after attention and one after the feed-forward
    attn_softcap: float  # 0: off
    logit_softcap: float  # 0: off
    query_scale: float
    tie_embeddings: bool
    windows: tuple[int, ...]  # a layer: a query sees keys with q_pos - k_pos < window; 0: all
    rope_kinds: tuple[RopeKind, ...]
    rope_of_layer: tuple[int, ...]
    max_position: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    score_heads: int = 1  # of a reward model


@dataclass(frozen=True)
class Family:
    """Class names in transformers and the values of keys that a config.json leaves out."""

    policy_class: str
    reward_class: str
    defaults: dict


_COMMON = dict(
    num_hidden_layers=32, num_attention_heads=32, hidden_size=4096, hidden_act="silu", rms_norm_eps=1e-6,
    rope_theta=1e4, tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
)  # fmt: skip
_QWEN = _COMMON | dict(
    vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768,
    use_sliding_window=False, sliding_window=4096, max_window_layers=28,
)  # fmt: skip
_GEMMA = _COMMON | dict(
    hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8, head_dim=256,
    num_key_value_heads=4, hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True,
    query_pre_attn_scalar=256, sliding_window=4096, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip

FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaForSequenceClassification", _COMMON | dict(
        vocab_size=32000, intermediate_size=11008, max_position_embeddings=2048,
        bos_token_id=1, eos_token_id=2)),
    "mistral": Family("MistralForCausalLM", "MistralForSequenceClassification", _COMMON | dict(
        vocab_size=32000, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072,
        sliding_window=4096, bos_token_id=1, eos_token_id=2)),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2ForSequenceClassification", _QWEN),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3ForSequenceClassification", _QWEN | dict(head_dim=128)),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2ForSequenceClassification", _GEMMA | dict(
        vocab_size=256000, max_position_embeddings=8192, final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0)),
    "gemma3_text": Family("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification", _GEMMA | dict(
        vocab_size=262208, max_position_embeddings=131072, rope_theta=1e6, rope_local_base_freq=1e4,
        sliding_window_pattern=6)),
}  # fmt: skip
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_SCALINGS = ("default", "linear", "llama3")
TINY_FAMILIES = (*FAMILIES, "llama3", "gemma3")  # llama3: with rope scaling; gemma3: another name of gemma3_text


def config_from_hf(hf: dict, where: str) -> ModelConfig:
    """The config of a Hugging Face model: keys of transformers 4 and 5, its defaults for absent keys.

    `where` names the file in errors. Raises UserError for an architecture, activation, rope scaling or value
    that the decoder does not know.
    """
    family = _family_of(hf, where)
    hf = Reader(FAMILIES[family].defaults | hf, where)
    gemma = family in ("gemma2", "gemma3_text")
    d_model, n_layers, n_heads = map(hf.size, ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    n_kv_heads = hf.size("num_key_value_heads", n_heads)
    head_dim = hf.size("head_dim", d_model // n_heads)
    if n_heads % n_kv_heads or head_dim % 2:
        hf.fail(
            f"{n_heads} heads, {n_kv_heads} key/value heads, head size {head_dim}: "
            "make heads a multiple of key/value heads and the head size even"
        )
    attention_bias = bool(hf.get("attention_bias")) and family != "mistral"
    layer_types = _layer_types(hf, family, n_layers)
    rope_kinds = _rope_kinds(hf, family)
    return ModelConfig(
        family=family,
        vocab_size=hf.size("vocab_size"),
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=hf.size("intermediate_size"),
        activation=hf.choice("hidden_activation" if gemma else "hidden_act", _ACTIVATIONS),
        norm_eps=hf.number("rms_norm_eps"),
        norm_offset=1.0 if gemma else 0.0,
        embed_scale=math.sqrt(d_model) if gemma else 1.0,
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=family != "qwen2" and attention_bias,
        mlp_bias=family == "llama" and bool(hf.get("mlp_bias")),
        qk_norm=family in ("qwen3", "gemma3_text"),
        post_norms=gemma,
        # transformers reads attn_logit_softcapping for Gemma 2 alone
        attn_softcap=hf.number("attn_logit_softcapping", 0.0) if family == "gemma2" else 0.0,
        logit_softcap=hf.number("final_logit_softcapping", 0.0) if gemma else 0.0,
        query_scale=(hf.number("query_pre_attn_scalar") if gemma else head_dim) ** -0.5,
        tie_embeddings=bool(hf.get("tie_word_embeddings")),
        windows=tuple(_windows(hf, family, layer_types)),
        rope_kinds=rope_kinds,
        # one kind for all layers, or (Gemma 3) the first for full and the second for sliding attention
        rope_of_layer=tuple(int(len(rope_kinds) > 1 and kind == "sliding_attention") for kind in layer_types),
        max_position=hf.size("max_position_embeddings"),
        bos_id=hf.id("bos_token_id"),
        eos_ids=hf.ids("eos_token_id"),
        pad_id=hf.id("pad_token_id"),
    )


def _family_of(hf: dict, where: str) -> str:
    family, supported = hf.get("model_type"), ", ".join(FAMILIES)
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{where}: model_type {family!r} is not supported; supported: {supported}")
    known = FAMILIES[family]
    bare = known.policy_class.replace("ForCausalLM", "Model"), known.reward_class.split("For")[0] + "Model"
    for architecture in Reader(hf, where).texts("architectures"):
        if architecture not in (known.policy_class, known.reward_class, *bare):
            raise UserError(
                f"{where}: architecture '{architecture}' is not supported; "
                f"supported for {family}: {known.policy_class}, {known.reward_class}"
            )
    if hf.get("quantization_config"):
        raise UserError(f"{where}: quantised weights are not supported; use the unquantised checkpoint")
    if hf.get("use_bidirectional_attention"):
        raise UserError(f"{where}: use_bidirectional_attention is not supported; use a causal language model")
    return family


def _layer_types(hf: Reader, family: str, n_layers: int) -> list[str]:
    """'full_attention' or 'sliding_attention' for every layer, from the list or from the family's rule."""
    kinds = ("full_attention", "sliding_attention")
    if hf.get("layer_types") is not None and family in ("qwen2", "qwen3", "gemma2", "gemma3_text"):
        listed = hf.texts("layer_types")
        if len(listed) != n_layers or not set(listed) <= set(kinds):
            hf.fail(f"'layer_types' must name one of {', '.join(kinds)} for each of the {n_layers} layers")
        return listed
    if family == "mistral":
        return [kinds[1]] * n_layers
    if family in ("qwen2", "qwen3"):
        return [kinds[layer >= hf.number("max_window_layers")] for layer in range(n_layers)]
    if family in ("gemma2", "gemma3_text"):
        pattern = 2 if family == "gemma2" else hf.size("sliding_window_pattern")
        return [kinds[(layer + 1) % pattern > 0] for layer in range(n_layers)]
    return [kinds[0]] * n_layers


def _windows(hf: Reader, family: str, layer_types: list[str]) -> list[int]:
    switched_off = family in ("qwen2", "qwen3") and not hf.get("use_sliding_window")
    if switched_off or family == "llama" or hf.get("sliding_window") is None:
        return [0] * len(layer_types)
    window = hf.size("sliding_window")
    return [window if kind == "sliding_attention" else 0 for kind in layer_types]


def _rope_kinds(hf: Reader, family: str) -> tuple[RopeKind, ...]:
    """The rope of all layers; for Gemma 3 that of full and that of sliding attention."""
    written, old_scaling = hf.object("rope_parameters"), hf.object("rope_scaling")
    if family != "gemma3_text":
        return (_rope_kind(hf, {"rope_theta": hf.get("rope_theta")} | (old_scaling or written)),)
    by_kind = Reader(written, hf.where)
    full = {"rope_theta": hf.get("rope_theta")} | by_kind.object("full_attention") | old_scaling
    sliding = {"rope_theta": hf.get("rope_local_base_freq")} | by_kind.object("sliding_attention")
    return _rope_kind(hf, full), _rope_kind(hf, sliding)


def _rope_kind(hf: Reader, rope: dict) -> RopeKind:
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if "full_attention" in rope or scaling not in _SCALINGS or rope.get("partial_rotary_factor", 1.0) != 1.0:
        hf.fail(f"rope {rope} is not supported; supported rope types: {', '.join(_SCALINGS)}")
    rope = Reader({"original_max_position_embeddings": hf.get("max_position_embeddings")} | rope, hf.where)
    kind = RopeKind(theta=rope.number("rope_theta"), scaling=scaling)
    if scaling == "linear":
        return RopeKind(kind.theta, scaling, factor=rope.number("factor"))
    if scaling == "llama3":
        factors = (rope.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        return RopeKind(kind.theta, scaling, *factors, rope.size("original_max_position_embeddings"))
    return kind


def inverse_frequencies(kind: RopeKind, head_dim: int) -> np.ndarray:
    """Radians a position for each pair of a head's dimensions, `[N/2]`, in float32 as transformers computes.

    `llama3` is the rule of Llama 3.1: long waves are slowed by `factor`, short ones kept, the rest blended.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.float32(kind.theta) ** exponents
    if kind.scaling == "linear":
        return frequencies / np.float32(kind.factor)
    if kind.scaling == "llama3":
        turns = np.float32(kind.original_max_position) * frequencies / np.float32(2 * math.pi)
        blend = (turns - kind.low_freq_factor) / (kind.high_freq_factor - kind.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0).astype(np.float32)
        return (1 - blend) * frequencies / np.float32(kind.factor) + blend * frequencies
    return frequencies


@dataclass(frozen=True)
class HfTensor:
    """Where a leaf stands in a checkpoint. A stacked leaf has one tensor a layer: `name` holds `{layer}`."""

    name: str
    transposed: bool  # Hugging Face keeps [out, in], we [in, out]
    stacked: bool


def tensor_names(config: ModelConfig, kind: str) -> dict[str, HfTensor]:
    """Leaf name (`layers/q`) -> tensor of a Hugging Face checkpoint. `kind`: policy or reward."""
    named = {"embed": HfTensor("model.embed_tokens.weight", False, False)}

    def layer(leaf, module, transposed=False, suffix="weight"):
        named[f"layers/{leaf}"] = HfTensor(f"model.layers.{{layer}}.{module}.{suffix}", transposed, True)

    before_mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    layer("attn_norm", "input_layernorm")
    layer("mlp_norm", before_mlp)
    if config.post_norms:
        layer("attn_post_norm", "post_attention_layernorm")
        layer("mlp_post_norm", "post_feedforward_layernorm")
    for leaf in "qkvo":
        layer(leaf, f"self_attn.{leaf}_proj", transposed=True)
        if config.o_bias if leaf == "o" else config.qkv_bias:
            layer(f"{leaf}_bias", f"self_attn.{leaf}_proj", suffix="bias")
    if config.qk_norm:
        layer("q_norm", "self_attn.q_norm")
        layer("k_norm", "self_attn.k_norm")
    for leaf in ("gate", "up", "down"):
        layer(leaf, f"mlp.{leaf}_proj", transposed=True)
        if config.mlp_bias:
            layer(f"{leaf}_bias", f"mlp.{leaf}_proj", suffix="bias")
    named["final_norm"] = HfTensor("model.norm.weight", False, False)
    if kind == "reward":
        named["score"] = HfTensor("score.weight", True, False)
    elif not config.tie_embeddings:
        named["lm_head"] = HfTensor("lm_head.weight", True, False)
    return named


def leaf_shapes(config: ModelConfig, kind: str) -> dict[str, tuple[int, ...]]:
    """Leaf name -> shape, for the leaves of `tensor_names`."""
    depth, d_model, d_ff = config.n_layers, config.d_model, config.d_ff
    d_query, d_key = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    inputs_outputs = {
        "q": (d_model, d_query), "k": (d_model, d_key), "v": (d_model, d_key), "o": (d_query, d_model),
        "gate": (d_model, d_ff), "up": (d_model, d_ff), "down": (d_ff, d_model),
    }  # fmt: skip
    shapes = {
        "embed": (config.vocab_size, d_model), "final_norm": (d_model,),
        "lm_head": (d_model, config.vocab_size), "score": (d_model, config.score_heads),
        "layers/q_norm": (depth, config.head_dim), "layers/k_norm": (depth, config.head_dim),
    }  # fmt: skip
    for leaf, (inputs, outputs) in inputs_outputs.items():
        shapes[f"layers/{leaf}"], shapes[f"layers/{leaf}_bias"] = (depth, inputs, outputs), (depth, outputs)
    for leaf in ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"):
        shapes[f"layers/{leaf}"] = (depth, d_model)
    return {leaf: shapes[leaf] for leaf in tensor_names(config, kind)}


def nest(leaves: dict) -> dict:
    """The nested params of a flat dict by leaf name."""
    tree = {"layers": {}}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        (tree["layers"] if parents else tree)[last] = leaf
    return tree


def flatten(params: dict) -> dict:
    """The inverse of `nest`: leaf name -> leaf."""
    inner = {f"layers/{name}": leaf for name, leaf in params["layers"].items()}
    return {name: leaf for name, leaf in params.items() if name != "layers"} | inner


def param_shapes(config: ModelConfig, kind: str, dtype="float32") -> dict:
    """The params as a nested dict of `jax.ShapeDtypeStruct`; with dtype int8 as `load_model` stores them."""
    stored = "bfloat16" if dtype == "int8" else dtype
    params = nest({leaf: jax.ShapeDtypeStruct(shape, stored) for leaf, shape in leaf_shapes(config, kind).items()})
    if dtype == "int8":
        for name in PROJECTIONS:
            whole = jax.ShapeDtypeStruct(params["layers"][name].shape, "float32")
            params["layers"][name] = jax.eval_shape(kernels.quantize, whole)
    return params


def random_params(config: ModelConfig, kind: str, seed: int) -> dict:
    """Small random float32 params, the same for the same seed; norms and biases are not at their defaults."""
    rng = np.random.default_rng(seed)

    def draw(leaf, shape):
        if leaf.endswith("norm"):
            return 1.0 - config.norm_offset + 0.1 * rng.standard_normal(shape, np.float32)
        if leaf.endswith("bias"):
            return 0.1 * rng.standard_normal(shape, np.float32)
        fan_in = config.d_model if leaf == "embed" else shape[-2]
        return rng.standard_normal(shape, np.float32) / math.sqrt(fan_in)

    shapes = leaf_shapes(config, kind)
    return nest({leaf: jnp.asarray(draw(leaf, shapes[leaf]), jnp.float32) for leaf in sorted(shapes)})


def tiny_hf_config(family: str, vocab_size: int = 320) -> dict:
    """The config.json of a tiny model of one of TINY_FAMILIES."""
    if family not in TINY_FAMILIES:
        raise UserError(f"random:{family}: unknown family; known: {', '.join(TINY_FAMILIES)}")
    model_type = {"llama3": "llama", "gemma3": "gemma3_text"}.get(family, family)
    layers = 3 if model_type == "gemma3_text" else 2
    hf = dict(
        model_type=model_type, architectures=[FAMILIES[model_type].policy_class], vocab_size=vocab_size,
        hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=128, max_position_embeddings=1024, rms_norm_eps=1e-6, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, rope_theta=10000.0,
    )  # fmt: skip
    extra = {
        "llama3": dict(tie_word_embeddings=False, rope_scaling=dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=128)),
        "mistral": dict(sliding_window=256, tie_word_embeddings=False),
        "qwen3": dict(head_dim=32),
        "gemma2": dict(sliding_window=64, query_pre_attn_scalar=16),
        "gemma3_text": dict(sliding_window=64, sliding_window_pattern=3, query_pre_attn_scalar=16,
                            rope_theta=1000000.0, rope_local_base_freq=10000.0),
    }  # fmt: skip
    return hf | extra.get(family if family == "llama3" else model_type, {})


def tiny_config(family: str, vocab_size: int = 320) -> ModelConfig:
    """The config of `tiny_hf_config`."""
    return config_from_hf(tiny_hf_config(family, vocab_size), f"random:{family}")
