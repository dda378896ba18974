"""The work that every engine is given: the prompts of the chain and of plain decoding, as JSON."""

import json
from pathlib import Path

from cai_jax.chat import encode_chat
from cai_jax.config import PromptSet
from cai_jax.prompt_sets import load_prompts
from cai_jax.prompts import critique_preamble

ROWS = 32
ROUNDS = 2
CHAIN_TOKENS = 64  # of a response, a critique, a revision
PLAIN_TOKENS = 128  # of a prompt, and of what follows it
PLAIN_ROWS = (1, 8, 32)
CONTEXT = 1536  # tokens that a row of the chain may come to; about 1,200 are usual
WORDS = "time river stone paper light house garden music winter travel market window letter bridge summer".split()
FILLER = "a"  # where a word is too long


def make_work(folder: Path, tokenizer, constitution, path: Path, rows: int = ROWS, plain_rows=PLAIN_ROWS) -> dict:
    """Write the work file `path` for the model in `folder`, and return what it holds (see peers/chain.py)."""
    prompts = load_prompts(PromptSet("shipped:red_team", split="train"), "red_team").rows
    if len(prompts) < 2 * rows:
        raise ValueError(f"{2 * rows} prompts are needed, {len(prompts)} are there")
    chains = [_chain(prompt, constitution, place) for place, prompt in enumerate(prompts[: 2 * rows])]
    work = {
        "model": str(folder),
        "preamble": critique_preamble(constitution, principles=_principles(constitution)),
        "chains": chains[:rows],
        "warm_up": chains[rows:],
        "new_tokens": CHAIN_TOKENS,
        "plain": [_point(tokenizer, count) for count in plain_rows],
        "context": CONTEXT,
    }
    path.write_text(json.dumps(work), encoding="utf-8")
    return work


def _principles(constitution):
    """Those of one aim, so that all rounds begin alike."""
    return [principle for principle in constitution.principles if principle.aim == constitution.principles[0].aim]


def _chain(prompt, constitution, place: int) -> dict:
    principles = _principles(constitution)
    drawn = [principles[(ROUNDS * place + number) % len(principles)] for number in range(ROUNDS)]
    return {
        "messages": [{"role": message["role"], "content": message["content"]} for message in prompt.messages],
        "rounds": [{"critique": p.critique_request, "revision": p.revision_request} for p in drawn],
    }


def _point(tokenizer, rows: int) -> dict:
    """Three sets of prompts of exactly PLAIN_TOKENS tokens, no two of them alike."""
    sets = []
    for part in range(3):
        conversations = [exact_conversation(tokenizer, part * rows + row) for row in range(rows)]
        sets.append({"conversations": conversations, "ids": [encode_chat(tokenizer, c) for c in conversations]})
    return {"rows": rows, "new_tokens": PLAIN_TOKENS, "sets": sets}


def exact_conversation(tokenizer, number: int, tokens: int = PLAIN_TOKENS) -> list[dict]:
    """A question of exactly so many tokens, its template and the start of an answer included; each number its own."""
    words = [str(number)]
    while True:
        conversation = [{"role": "user", "content": " ".join(words)}]
        missing = tokens - len(encode_chat(tokenizer, conversation))
        if missing == 0:
            return conversation
        if missing > 0:
            words.append(WORDS[(number + len(words)) % len(WORDS)])
        elif words[-1] != FILLER:
            words[-1] = FILLER
        else:
            raise ValueError(f"no prompt of {tokens} tokens from the words at hand for this tokenizer")
