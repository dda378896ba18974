"""The tokenizers of GGUF files as tokenizer.json: byte-level BPE (gpt2) and SentencePiece's BPE (llama)."""

from gguf.constants import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from cai_jax.models.gguf_file import GgufFile

_SPACE = "\u2581"  # SentencePiece's letter for a space
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level_tokenizer(file: GgufFile) -> Tokenizer:
    """Byte-level BPE with digits one by one (SmolLM), from the file's tokens and merges."""
    file.supports("tokenizer", file.get("tokenizer.ggml.model"), ("gpt2",))
    file.supports("pre-tokenizer", file.get("tokenizer.ggml.pre"), ("smollm",))
    tokens, kinds = file.tokens, _kinds(file)
    merges = [tuple(merge.split(" ")) for merge in file.get("tokenizer.ggml.merges")]
    try:
        tokenizer = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, merges))
    except Exception as error:  # the library raises plain Exception for a merge of unknown tokens
        file.fail(f"its tokens and merges do not fit ({error}); use a sound file")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = {TokenType.CONTROL: True, TokenType.USER_DEFINED: False}
    tokenizer.add_tokens([
        AddedToken(token, special=added[kind], normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in added
    ])
    _put_bos_first(tokenizer, file, default=False)
    return tokenizer


def sentencepiece_tokenizer(file: GgufFile) -> Tokenizer:
    """SentencePiece's BPE without a space in front (Gemma), from the file's tokens and their scores.

    Its ids are those of SentencePiece, but that it takes a control token's name in a text for the token, as every
    tokenizer of Hugging Face does.
    """
    file.supports("tokenizer", file.get("tokenizer.ggml.model"), ("llama",))
    file.supports("add_space_prefix", file.get("tokenizer.ggml.add_space_prefix", True), (False,))
    file.supports("remove_extra_whitespaces", file.get("tokenizer.ggml.remove_extra_whitespaces", False), (False,))
    file.supports("add_eos_token", file.get("tokenizer.ggml.add_eos_token", False), (False,))
    kinds = _kinds(file)
    tokens, unknown = _pieces(file, kinds), file.get("tokenizer.ggml.unknown_token_id")
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        BPE(vocab, _merges(file, kinds), unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # cuts nothing; Gemma's own file has it
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    # SentencePiece seeks user-defined tokens after the spaces have become its own letter, so they are `normalized`.
    added = {TokenType.CONTROL: dict(special=True, normalized=False),
             TokenType.USER_DEFINED: dict(special=False, normalized=True)}  # fmt: skip
    tokenizer.add_tokens([
        AddedToken(token, **added[kind]) for token, kind in zip(tokens, kinds, strict=True) if kind in added
    ])
    _put_bos_first(tokenizer, file, default=True)
    return tokenizer


def _pieces(file: GgufFile, kinds: list[int]) -> list[str]:
    """The tokens as SentencePiece has them, checked: each of a known type, one for every byte, none twice."""
    known = (TokenType.NORMAL, TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.BYTE)
    pieces = []
    for token, kind in zip(file.tokens, kinds, strict=True):
        if kind not in known:
            file.fail(f"token {token!r} is unused or of no known type ({kind}); use the model's Hugging Face folder")
        # llama.cpp writes spaces into user-defined tokens where SentencePiece has its own letter
        pieces.append(token.replace(" ", _SPACE) if kind == TokenType.USER_DEFINED else token)
    if missing := set(_BYTES).difference(pieces):
        file.fail(f"lacks the token {min(missing)}, and each byte needs one; use a complete file")
    if len(set(pieces)) != len(pieces):
        file.fail("its tokens repeat where a space is \u2581; use a sound file")
    return pieces


def _merges(file: GgufFile, kinds: list[int]) -> list[tuple[str, str]]:
    """Every split of a normal token into two normal ones, best score first, then by the ids of the parts.

    SentencePiece keeps no merges: of all neighbours it joins those that make the token with the best score.
    """
    scores = file.get("tokenizer.ggml.scores")
    if len(scores) != len(kinds):
        file.fail(f"has {len(kinds)} tokens and {len(scores)} scores; use a sound file")
    numbers = {token: number for number, token in enumerate(file.tokens) if kinds[number] == TokenType.NORMAL}
    merges = []
    for token, number in numbers.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in numbers and right in numbers:
                merges.append((-scores[number], numbers[left], numbers[right], left, right))
    return [merge[-2:] for merge in sorted(merges)]


def _kinds(file: GgufFile) -> list[int]:
    """The type of each token."""
    kinds = file.get("tokenizer.ggml.token_type")
    if not len(set(file.tokens)) == len(file.tokens) == len(kinds):
        file.fail("its tokens repeat, or some lack a type; use a sound file")
    return kinds


def _put_bos_first(tokenizer: Tokenizer, file: GgufFile, default: bool) -> None:
    if file.get("tokenizer.ggml.add_bos_token", default):
        number = file.get("tokenizer.ggml.bos_token_id")
        token = file.tokens[number]
        tokenizer.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=[(token, number)])
