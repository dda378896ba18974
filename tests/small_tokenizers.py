"""Small tokenizers that cut text and write chats as the model families do, trained on a page of text."""

import json
import os
from functools import cache
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cai_jax.models.byte_tokenizer import byte_tokenizer

PAGE = (
    """The better response is (A) or (B). Which answer is better: A or B? Hello there, how are you today?
user assistant system model turn [INST] start end think tool call <s> </s> im_start im_end begin of text
I can help you with that. Here is what the other person said about the weather in the city, 1 2 3 4 5.
She doesn't know; he's been there before, and they'll come later. Grüße aus Köln, où êtes-vous, 你好 世界.
""".splitlines()
    * 4
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

CHATML = """{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant.<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + m['role'] + '
' + m['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

# A thinking family: the last assistant turn gets a <think> block; a </think> in a turn cuts what it follows.
THINKING = (
    "{%- for m in messages %}{%- set content = m.content %}"
    "{%- if m.role == 'assistant' %}{%- if '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\\n' }}{%- if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{- content.lstrip('\\n') + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if tools %}{{- '<tool_call></tool_call>' }}{%- endif %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# Brackets as plain letters, texts trimmed, the system text inside the first user turn.
INST_LETTERS = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set content = system + m['content'] if loop.first else m['content'] %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

# Brackets as control tokens, no system turns.
INST_TOKENS = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"
    " + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)


LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def special(*tokens, **flags):
    return [AddedToken(token, special=True, normalized=False, **flags) for token in tokens]


def plain(*tokens):
    return [AddedToken(token, special=False, normalized=False) for token in tokens]


def byte_level(chat_template, added, words, special_in_vocabulary, ignore_merges=False, **names):
    """Byte-level BPE. The control tokens of a family stand in the model's vocabulary or only beside it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    use_regex = not isinstance(words, pre_tokenizers.Split)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    inside = [token for token in added if token.special] if special_in_vocabulary else []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=inside, show_progress=False
    )
    tokenizer.train_from_iterator(PAGE, trainer)
    tokenizer.add_tokens(added)
    return wrapped(tokenizer, chat_template, **names)


def byte_fallback(chat_template, added, gemma=False, **names):
    """BPE as converted from sentencepiece: spaces written as U+2581, unknown letters as bytes."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    learner.train_from_iterator(PAGE, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    controls = [token.content for token in added]
    vocabulary = dict.fromkeys(["<unk>", *controls, *BYTES, "\u2581", *learned["vocab"]])
    model = models.BPE(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    to_text = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        to_text.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(to_text)
    tokenizer.add_tokens(added)
    # What such tokenizers add to any text of their own accord; a template writes it itself.
    start = controls.index(names["bos_token"]) + 1
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[names["bos_token"], "$A"], special_tokens=[(names["bos_token"], start)]
    )
    return wrapped(tokenizer, chat_template, unk_token="<unk>", **names)


def unigram(chat_template, added, **names):
    """Unigram, whose search could reach any token of the vocabulary, a control token too."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", *added], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(PAGE, trainer)
    return wrapped(tokenizer, chat_template, unk_token="<unk>", **names)


def letters(chat_template, added, **names):
    """BPE that knows few letters, writes <unk> for others, and whose merges would join letters to <s>."""
    known = sorted(set("".join(PAGE)) - set(" 你好世界")) + ["\u2581"]
    vocabulary = dict.fromkeys(["<unk>", *(token.content for token in added), *known, "<s", "ou"])
    model = models.BPE(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=[("<", "s"), ("<s", ">"), ("o", "u")],
        unk_token="<unk>",
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_tokens(added)
    return wrapped(tokenizer, chat_template, unk_token="<unk>", **names)


def wrapped(tokenizer, chat_template, **names):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        **names,
    )


def smollm2_folder() -> Path:
    cache_folder = os.environ.get("CAI_JAX_CACHE") or "~/.cache/cai_jax"
    return Path(cache_folder).expanduser() / "SmolLM2-135M-Instruct"


DIGITS = pre_tokenizers.Digits(individual_digits=True)
BUILDERS = {
    "random": byte_tokenizer,
    "chatml": lambda: byte_level(
        CHATML,
        special("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"),
        DIGITS,
        special_in_vocabulary=True,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    ),
    "thinking": lambda: byte_level(
        THINKING,
        [
            *special("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            *plain(
                "<tool_call>", "</tool_call>", "<think>", "</think>", "<|fim_prefix|>", "<table>", "assistant"
            ),
        ],
        pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated"),
        special_in_vocabulary=False,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    ),
    "llama2": lambda: byte_fallback(
        INST_LETTERS, special("<unk>", "<s>", "</s>"), bos_token="<s>", eos_token="</s>"
    ),
    "mistral": lambda: byte_fallback(
        INST_TOKENS,
        special("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
        bos_token="<s>",
        eos_token="</s>",
    ),
    "gemma": lambda: byte_fallback(
        GEMMA,
        [
            *special("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
            *plain("\n\n", "\n\n\n", "\u2581\u2581", "<table>"),
        ],
        gemma=True,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    ),
    "llama3": lambda: byte_level(
        LLAMA3,
        special(
            "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
        ),
        pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated"),
        special_in_vocabulary=False,
        ignore_merges=True,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
    ),
    "phi": lambda: byte_fallback(
        PHI,
        [
            *special("<unk>", "<s>", "</s>", "<|endoftext|>"),
            *special("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", rstrip=True),
        ],
        bos_token="<s>",
        eos_token="<|endoftext|>",
    ),
    "letters": lambda: letters(
        INST_TOKENS, special("<s>", "</s>", "[INST]", "[/INST]"), bos_token="<s>", eos_token="</s>"
    ),
    "unigram": lambda: unigram(CHATML, special("<|im_start|>", "<|im_end|>"), eos_token="<|im_end|>"),
}
BYTE_LEVEL = ("random", "chatml", "thinking", "llama3", "smollm2")
if smollm2_folder().is_dir():
    BUILDERS["smollm2"] = lambda: AutoTokenizer.from_pretrained(smollm2_folder())


@cache
def tokenizer_of(family: str):
    """The tokenizer of a family in BUILDERS."""
    return BUILDERS[family]()
