"""Chats as token ids. Text is data: only the chat template writes control tokens, whatever the messages say.

A control token is a special token of the tokenizer, an added token of the form <|...|>, or an added token
that the chat template itself writes (such as <think>). Two steps keep them out of reach of a message:

1. The template is rendered with a slot in place of each message's text, so every control token in the result
   was written by the template.
2. These control tokens get other names, drawn when the process starts, in the rendered text and in a copy
   of the tokenizer. Then the slots are filled, and the copy reads the whole: a control token's usual name
   inside a message is mere letters to it, and everything else is cut into tokens as before.

Where a family writes its turns in plain letters (the [INST] of Llama 2), no encoding can tell a message that
holds these letters from the template.
"""

import datetime
import functools
import json
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jinja2
from tokenizers import Tokenizer

from cai_jax.errors import UserError

ROLES = ("system", "user", "assistant")

# Unforgeable, since no text can know it. Token ids do not depend on it. U+F8F0 is a private-use character.
_MARK = "\uf8f0" + secrets.token_hex(16)
_SLOT = _MARK + "m{:06d}"
_ALIAS = _MARK + "t{:06d}"

# Some templates ask for the date of today. Tokens must not depend on the day a run is resumed, so they are told one
# and the same: the date that the template of Llama 3.1 falls back to. A macro, as `apply_chat_template` lets no
# function of ours through to the template; the newline after it belongs to its end and leaves no trace.
_TODAY = datetime.datetime(2024, 7, 26)
_CODES = "a A b B d -d e f H -H I -I j m -m M -M p S u w y Y".split()
_DATE_MACRO = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f".replace('%{code}', '{_TODAY.strftime('%' + code)}')" for code in _CODES)
    + " }}{% endmacro %}\n"
)


# ---------------------------------------------------------------- chats


def encode_chat(
    tokenizer, messages: list[dict], add_generation_prompt: bool = True, continue_final: bool = False
) -> list[int]:
    """The token ids of a conversation in the tokenizer's chat template.

    messages: [{"role": "system" | "user" | "assistant", "content": text}, ...].
    add_generation_prompt: end with the template's opening of an assistant turn.
    continue_final: the last message is an assistant turn and stays open, so that generation or scoring goes
    on after its text (add_generation_prompt is then without effect).

    Equal to tokenizer.apply_chat_template for messages that hold no control tokens; a control token inside a
    message is encoded as ordinary characters. Where the template refuses system turns or turns that do not
    alternate, neighbours of one role are joined by an empty line and, if it must be, a system text moves to
    the front of the next user turn. Raises UserError where there is no template, or it refuses the
    conversation all the same, or a message is malformed.
    """
    _check_messages(messages, continue_final)
    rendered, texts = _render(
        tokenizer, messages, add_generation_prompt and not continue_final, continue_final
    )
    if continue_final:
        rendered = rendered[: _end_of_last_text(rendered, texts, messages[-1]["content"])]
    return _armour(tokenizer).encode_rendered(rendered, texts)


def turn_end_id(tokenizer) -> int:
    """The one token that ends an assistant turn: the EOS that fine-tuning teaches.

    It is the first control token that the template writes after an assistant's text; where the template
    writes none, the tokenizer's EOS. Raises UserError where there is neither, or no template.
    """
    dialogue = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]
    rendered, texts = _render(tokenizer, dialogue, add_generation_prompt=False, slot_last=True)
    armour = _armour(tokenizer)
    if found := armour.pattern.search(rendered, _end_of_last_text(rendered, texts, "Hello.")):
        return armour.ids[found.group()]
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{_name(tokenizer)}: neither its chat template nor its tokenizer has a token that ends an "
            "assistant turn; set eos_token in tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def stop_ids(tokenizer, config_eos_ids: int | Iterable[int] | None) -> tuple[int, ...]:
    """The tokens that end a generation, sorted: turn_end_id and the model config's EOS (id, ids or None)."""
    configured = [config_eos_ids] if isinstance(config_eos_ids, int) else config_eos_ids or ()
    return tuple(sorted({*map(int, configured), turn_end_id(tokenizer)}))


# ---------------------------------------------------------------- plain text


def encode_text(tokenizer, text: str) -> list[int]:
    """The token ids of a text as ordinary characters: no BOS, no EOS, no control tokens."""
    _check_text(text, "the text")
    return _armour(tokenizer).encode(text)


def decode_text(tokenizer, tokens: Iterable[int]) -> str:
    """The text of token ids, without special tokens and with its spaces as they are."""
    return tokenizer.decode(
        [int(token) for token in tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def completion_ids(tokenizer, text: str, eos_id: int) -> list[int]:
    """What a model should write after a prompt that ends with the opening of an assistant turn.

    That is the text, then EOS. With eos_id = turn_end_id(tokenizer), and a template that writes text and end
    of turn right after the opening, encode_chat(prompt) + completion_ids(text) is the template's form of the
    whole dialogue, for a text without white space at its ends.
    """
    return [*encode_text(tokenizer, text), eos_id]


# ---------------------------------------------------------------- control tokens under other names


@dataclass(frozen=True, eq=False)
class _Armour:
    backend: Tokenizer  # the copy
    aliases: dict[str, str]  # of each control token
    ids: dict[str, int]  # of each control token
    pattern: re.Pattern  # a control token or a slot

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_rendered(self, rendered: str, texts: dict[int, str]) -> list[int]:
        """The ids of a rendered template, with texts[n] in slot n."""

        def fill(match: re.Match) -> str:
            slot = match.group("slot")
            return texts[int(slot)] if slot else self.aliases[match.group()]

        filled = self.pattern.sub(fill, rendered)  # in one pass: what fills a slot is not read again
        return self.encode(filled)


def _armour(tokenizer) -> _Armour:
    template = tokenizer.chat_template or ""
    if isinstance(template, dict):
        template = "\n".join(template.values())
    return _build_armour(tokenizer, template, len(tokenizer))


@functools.lru_cache(maxsize=8)
def _build_armour(tokenizer, template: str, vocabulary_size: int) -> _Armour:
    """template and vocabulary_size are what a tokenizer may change in its life; a change builds anew."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{_name(tokenizer)}: this needs a fast tokenizer; put a tokenizer.json in the model folder"
        )
    ids = {
        token.content: number
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special
        or token.content in tokenizer.all_special_tokens
        or _controls(token.content, template)
    }
    aliases = {token: _ALIAS.format(number) for number, token in enumerate(ids)}
    copy = Tokenizer.from_str(json.dumps(_renamed(json.loads(backend.to_str()), aliases)))
    moved = [token for token, number in ids.items() if copy.token_to_id(aliases[token]) != number]
    if moved:
        raise UserError(
            f"{_name(tokenizer)}: tokenizer.json gives {moved[0]!r} two ids; mend its added_tokens"
        )
    longest_first = sorted(ids, key=len, reverse=True)
    slot = re.escape(_MARK) + r"m(?P<slot>\d{6})"
    return _Armour(copy, aliases, ids, re.compile("|".join([slot, *map(re.escape, longest_first)])))


def _controls(token: str, template: str) -> bool:
    """Whether an added token that is not marked as special steers the model all the same.

    Words and runs of white space that stand in the template by chance do not.
    """
    if re.fullmatch(r"<[|\uff5c].+[|\uff5c]>", token):
        return True
    return token in template and not all(letter.isalnum() or letter.isspace() for letter in token)


def _renamed(tokenizer: dict, aliases: dict[str, str]) -> dict:
    """A tokenizer.json whose control tokens carry their aliases, everywhere and with the same ids."""
    model = tokenizer["model"]
    for token in tokenizer["added_tokens"]:
        token["content"] = aliases.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {aliases.get(token, token): number for token, number in model["vocab"].items()}
    else:  # Unigram
        model["vocab"] = [[aliases.get(token, token), score] for token, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [
            (left, right)
            for left, right in model["merges"]
            if aliases.keys().isdisjoint((left, right, left + right))
        ]
    if model.get("unk_token") in aliases:
        model["unk_token"] = aliases[model["unk_token"]]
    # A tokenizer keeps the truncation and padding of its last call.
    return tokenizer | {"model": model, "truncation": None, "padding": None}


# ---------------------------------------------------------------- templates


def _render(tokenizer, messages, add_generation_prompt: bool, slot_last: bool) -> tuple[str, dict[int, str]]:
    """The template's text with slots, and the text of each slot, in the first form the template takes."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{_name(tokenizer)}: its tokenizer has no chat template; take an instruction-tuned version of "
            "the model, or put a chat_template.jinja in its folder"
        )
    forms: tuple[Callable, ...] = (
        lambda turns: turns,
        _merge_neighbours,
        lambda turns: _merge_neighbours(_fold_system(turns)),
    )
    template = _dated(tokenizer.get_chat_template())
    reason = ""
    for form in forms:
        slotted, texts = _with_slots(form(messages), slot_last)
        try:
            rendered = tokenizer.apply_chat_template(
                slotted, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except jinja2.TemplateError as error:
            reason = reason or " ".join(str(error).split())
            continue
        if all(_SLOT.format(number) in rendered for number in texts):
            return rendered, texts
        reason = reason or "it leaves out the text of a turn"
    roles = ", ".join(message["role"] for message in messages)
    raise UserError(f"{_name(tokenizer)}: its chat template does not take the turns ({roles}): {reason}")


def _dated(template: str) -> str:
    """The template, where it asks for the date, with the fixed one at hand."""
    return _DATE_MACRO + template if "strftime_now" in template else template


def _with_slots(messages: list[dict], slot_last: bool) -> tuple[list[dict], dict[int, str]]:
    """Messages with slots for texts, and the texts.

    The white space around a text stays, for the template to keep or to trim. A message of white space stays
    as it is, so that a template sees that it is empty; the last one gets a slot all the same where the place
    of its text must be known.
    """
    slotted, texts = [], {}
    for number, message in enumerate(messages):
        content, slot = message["content"], _SLOT.format(number)
        if text := content.strip():
            texts[number] = text
            content = content.replace(text, slot, 1)
        elif slot_last and number == len(messages) - 1:
            texts[number] = content
            content = slot
        slotted.append({"role": message["role"], "content": content})
    return slotted, texts


def _end_of_last_text(rendered: str, texts: dict[int, str], content: str) -> int:
    """Where the last text ends, with the white space at its end if the template kept that."""
    slot = _SLOT.format(max(texts))
    end = rendered.rindex(slot) + len(slot)
    white_space = content[len(content.rstrip()) :] if content.strip() else ""
    return end + len(white_space) if rendered.startswith(white_space, end) else end


def _fold_system(messages: list[dict]) -> list[dict]:
    """Each system text at the front of the next user turn; a user turn of its own where none follows."""
    folded, waiting = [], []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message["content"])
        elif message["role"] == "user" and waiting:
            folded.append({"role": "user", "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            folded.append(message)
    return [*folded, {"role": "user", "content": "\n\n".join(waiting)}] if waiting else folded


def _merge_neighbours(messages: list[dict]) -> list[dict]:
    merged: list[dict] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            content = merged[-1]["content"] + "\n\n" + message["content"]
            merged[-1] = {"role": message["role"], "content": content}
        else:
            merged.append(message)
    return merged


# ---------------------------------------------------------------- checks


def _check_messages(messages: list[dict], continue_final: bool) -> None:
    if not messages:
        raise UserError("the conversation has no messages; give at least one user turn")
    for number, message in enumerate(messages, start=1):
        if message.get("role") not in ROLES:
            shown = repr(message.get("role"))[:60]
            raise UserError(f"message {number}: the role must be one of {', '.join(ROLES)}, not {shown}")
        _check_text(message.get("content"), f"message {number}")
    if continue_final and messages[-1]["role"] != "assistant":
        raise UserError(
            f"message {len(messages)}: only an assistant turn can be continued; make it the last one"
        )


def _check_text(text, where: str) -> None:
    if not isinstance(text, str):
        raise UserError(f"{where}: the content must be a text, not {type(text).__name__}")
    if half := re.search("[\ud800-\udfff]", text):
        shown = f"U+{ord(half.group()):04X}"
        raise UserError(f"{where}: holds {shown}, half of a character (a lone surrogate); remove it")


def _name(tokenizer) -> str:
    return tokenizer.name_or_path or "this model"
