"""What a slot keeps of its tokens: always a start of what is asked, never more than the cache holds."""

from hypothesis import given
from hypothesis import strategies as st

from cai_jax.config import Sampling
from cai_jax.sampler.cache import STRIP
from cai_jax.sampler.slots import Slot, common_start

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def run_all(slot):
    """Run everything that waits, as the engine does; returns the number of tokens that were run."""
    count = 0
    while slot.runs:
        for strip in slot.next_strips(STRIP, 2):
            assert strip.window % STRIP == 0 and strip.offset + strip.count <= STRIP
            assert strip.window + strip.offset == strip.run.start + strip.first
            count += strip.count
            slot.ran(strip.run, strip.count)
    return count


@given(st.lists(TOKENS, min_size=1, max_size=3), st.lists(TOKENS, min_size=1, max_size=6), st.booleans())
def test_a_slot_holds_what_was_asked_and_runs_no_token_twice(prefixes, requests, reuse):
    slot, held = Slot(0), []
    for tokens in requests:
        kept = slot.write(tokens, prefixes, Sampling(), 0, reuse)
        best = max(common_start(start, tokens[:-1]) for start in [held, *prefixes]) if reuse else 0
        assert kept == best
        assert run_all(slot) == len(tokens) - 1 - kept
        held = prefixes[slot.prefix][: slot.shared] + slot.own
        assert held == tokens[:-1]
        slot.wrote([1, 2], [0.0, 0.0])
        held = prefixes[slot.prefix][: slot.shared] + slot.own
        assert held == [*tokens, 1]


@given(TOKENS, st.lists(TOKENS, min_size=1, max_size=5), st.integers(1, 3))
def test_every_token_of_every_option_is_asked_for_once(tokens, options, at_once):
    slot = Slot(0)
    slot.score(tokens, options, [[]], True, at_once)
    answers = {}
    while slot.runs:
        run = slot.runs[0]
        if run.start == len(tokens):
            assert slot.own[: run.start] == tokens, "an option runs right behind the conversation"
        for place, candidates in run.asked.items():
            assert len(candidates) <= at_once or place < len(run.tokens) - 1 or len(candidates) == 1
            before = (tokens[: run.start] + run.tokens)[: run.start + place + 1]
            for candidate in candidates:
                for option, at in run.into[place, candidate]:
                    assert (option, at) not in answers
                    assert before == tokens + options[option][:at] and candidate == options[option][at]
                    answers[option, at] = candidate
        while run.done < len(run.tokens):
            slot.ran(run, min(3, len(run.tokens) - run.done))
    assert set(answers) == {(n, i) for n, option in enumerate(options) for i in range(len(option))}
