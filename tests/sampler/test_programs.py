"""The jitted programs, driven by the engine on token ids: against transformers, a full forward pass and themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax import Sampler, Sampling, load_model
from cai_jax.models.byte_tokenizer import byte_tokenizer
from cai_jax.models.transformer import forward
from cai_jax.sampler import Generate, Score, decode

FAMILIES = (
    "llama_tied", "llama_untied_rope3", "mistral_swa", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3_linear",
)  # fmt: skip


class OnTokens(Sampler):
    """A sampler whose conversations and prefixes are token ids already."""

    def _encode(self, conversation):
        return list(conversation)

    def _prefix_tokens(self, messages):
        return list(messages)


def on_tokens(folder, **options):
    model = dataclasses.replace(load_model(folder), tokenizer=byte_tokenizer())
    return OnTokens(model, **dict(max_length=256, rows=8, ignore_stops=True) | options)


def prompts_of(io):
    return [ids[mask > 0].tolist() for ids, mask in zip(io["left_ids"], io["left_mask"], strict=True)]


def logprobs_after(model, tokens, temperature=1.0):
    """`[T, V]` of every next token, by the full forward pass."""
    padded_BT = jnp.asarray([[*tokens, *[0] * (-len(tokens) % 64)]])  # few shapes; what comes behind changes nothing
    logits_TV = forward(model.config, model.params, padded_BT)[0, : len(tokens)]
    return np.asarray(jax.nn.log_softmax(logits_TV / temperature))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_transformers(oracles, family):
    io = np.load(oracles / family / "io.npz")
    sampler = on_tokens(oracles / family)
    greedy = Sampling(temperature=0.0, max_new_tokens=16)
    samples = sampler.run([only(Generate(prompt, greedy)) for prompt in prompts_of(io)], prompts_of(io)[1][:5])
    np.testing.assert_array_equal([sample.tokens for sample in samples], io["greedy_left_new"])


@pytest.mark.parametrize("family", ["llama_tied", "mistral_swa", "gemma2", "gemma3_text"])
def test_long_rows_over_many_blocks_and_a_prefix(oracles, family):
    """More tokens than a block and than any window, on a shared prefix longer than a window."""
    sampler = on_tokens(oracles / family)
    rng = np.random.default_rng(0)
    prefix = rng.integers(3, 120, 37).tolist()
    rows = [prefix + rng.integers(3, 120, n).tolist() for n in (1, 30, 90)]
    asked = [Generate(row, Sampling(max_new_tokens=40), seed=n) for n, row in enumerate(rows)]
    for row, sample in zip(rows, sampler.run(map(only, asked), prefix), strict=True):
        expected = logprobs_after(sampler.model, row + sample.tokens)[len(row) - 1 : -1]
        np.testing.assert_allclose(sample.logprobs, expected[np.arange(40), sample.tokens], atol=1e-4)
    assert sampler.counts.reused == 3 * len(prefix)


@pytest.mark.parametrize("family", ["llama_tied", "mistral_swa", "gemma2", "gemma3_text"])
def test_rows_go_from_one_shared_prefix_to_another(oracles, family):
    """Generations and scores on three prefixes and on none, beside slots on others: as a plain forward pass."""
    sampler = on_tokens(oracles / family)
    rng = np.random.default_rng(0)
    common = rng.integers(3, 120, 5).tolist()
    prefixes = [common + rng.integers(3, 120, n).tolist() for n in (32, 140, 9)]
    standing = [*prefixes, [119, 118]]

    def stands_on(n, turn):
        return standing[(n + turn * (1 + n % 3)) % 4]

    def program(n):
        found = []
        for turn in range(5):
            row = stands_on(n, turn) + np.random.default_rng([n, turn]).integers(3, 120, 7).tolist()
            if turn % 2:
                options = [[5, 6, 7], [5, 9], [11]]
                scores = yield Score(row, options)
                found += [(row, option, score) for option, score in zip(options, scores, strict=True)]
            else:
                sample = yield Generate(row, Sampling(max_new_tokens=9), seed=n)
                found.append((row, sample.tokens, sample.logprobs))
        return found

    shared = prefixes[0], [*prefixes[1:], prefixes[0]]
    rows = dict(sampler.stream(map(program, range(9)), *shared))
    ((_, alone),) = sampler.stream([program(4)], *shared)
    for (_, tokens, logprobs), (_, own_tokens, own) in zip(rows[4], alone, strict=True):
        assert tokens == own_tokens and np.array_equal(logprobs, own), "to the bit, whoever stands on other prefixes"
    for found in rows.values():
        for row, tokens, logprobs in found:
            expected = logprobs_after(sampler.model, [*row, *tokens])[len(row) - 1 : -1]
            np.testing.assert_allclose(logprobs, expected[np.arange(len(tokens)), tokens], atol=1e-4)
    assert sampler._cache.prefix_rooms == (256, 128, 128), "the prefix that came twice is there once"
    begun = [stands_on(n, turn) for n in range(9) for turn in range(5)]
    assert sampler.counts.reused >= sum(len(start) for start in begun if start in prefixes)
    assert sum(name == "prefill" for name, *_ in sampler.programs) == 1


def test_a_start_longer_than_a_slot_is_left_out(oracles):
    sampler = on_tokens(oracles / "llama_tied")
    row = [5, 6, 7, 8]
    plain = sampler.run([only(Score(row, [[9, 10]]))], row[:3])
    long = [5] * (sampler.max_length + 1)
    ((_, again),) = sampler.stream([only(Score(row, [[9, 10]]))], row[:3], more=[long])
    np.testing.assert_array_equal(again, plain[0])
    assert sampler._cache.prefix_rooms == (128,)


def test_starts_that_failed_to_run_are_run_again(oracles, monkeypatch):
    sampler = on_tokens(oracles / "llama_tied")
    row, starts = [3, 4, 9, 8], [[5, 6, 7], [3, 4]]  # it stands on the second
    expected = sampler.run([only(Score(row, [[9, 10]]))])
    share_one = sampler._share_one

    def share_first_alone(number, tokens):
        if number:
            raise KeyboardInterrupt
        share_one(number, tokens)

    monkeypatch.setattr(sampler, "_share_one", share_first_alone)
    with pytest.raises(KeyboardInterrupt):
        list(sampler.stream([only(Score(row, [[9, 10]]))], starts[0], more=[starts[1]]))
    monkeypatch.undo()
    ((_, again),) = sampler.stream([only(Score(row, [[9, 10]]))], starts[0], more=[starts[1]])
    np.testing.assert_allclose(again, expected[0], atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_sampled_tokens_are_those_of_a_full_forward_pass(oracles, temperature):
    io = np.load(oracles / "llama_tied" / "io.npz")
    sampler = on_tokens(oracles / "llama_tied")
    prompts = prompts_of(io)
    samples = sampler.generate(prompts, Sampling(temperature=temperature, top_p=0.9, max_new_tokens=16))
    for prompt, sample in zip(prompts, samples, strict=True):
        expected = logprobs_after(sampler.model, prompt + sample.tokens, temperature)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(sample.logprobs, expected[np.arange(16), sample.tokens], atol=1e-4)


@pytest.mark.parametrize("rows", [1, 8])
def test_bfloat16_operands_stay_near_float32(oracles, rows):
    """One slot alone takes another product than many do, and rows of the table are taken by their bits."""
    io = np.load(oracles / "llama_tied" / "io.npz")
    sampler = on_tokens(oracles / "llama_tied", dtype="bfloat16", rows=rows)
    prompts = prompts_of(io)
    samples = sampler.generate(prompts, Sampling(max_new_tokens=12))
    for prompt, sample in zip(prompts, samples, strict=True):
        expected = logprobs_after(sampler.model, prompt + sample.tokens)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(sample.logprobs, expected[np.arange(12), sample.tokens], atol=0.05)


def test_options_are_scored_as_if_each_stood_alone(oracles):
    """Of one token and of many, more than one pass holds, with common first tokens and twice the same."""
    sampler = on_tokens(oracles / "llama_tied", prefill_tokens=16)
    rng = np.random.default_rng(1)
    prompt = rng.integers(3, 120, 21).tolist()
    options = [rng.integers(3, 120, n).tolist() for n in (1, 2, 40, 3)] + [[n] for n in range(3, 23)]
    options += [[5, 6], [5, 7], [5, 6]]
    (scores,) = sampler.score_tokens([prompt], options)
    for option, got in zip(options, scores, strict=True):
        expected = logprobs_after(sampler.model, prompt + option)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(got, expected[np.arange(len(option)), option], atol=1e-4)


def test_the_repetition_penalty_sees_prompt_prefix_and_completion(oracles):
    """A penalty so strong that nothing seen is drawn again."""
    sampler = on_tokens(oracles / "llama_tied")
    prompt = list(range(3, 40))
    strong = Sampling(temperature=0.0, repetition_penalty=1e6, max_new_tokens=20)
    (sample,) = sampler.run([only(Generate(prompt, strong))], prompt[:30])
    tokens = sample.tokens
    logits = np.asarray(forward(sampler.model.config, sampler.model.params, jnp.asarray([prompt + tokens])))[0]
    for i, token in enumerate(tokens):
        row, seen = logits[len(prompt) - 1 + i].copy(), prompt + tokens[:i]
        row[seen] = np.where(row[seen] > 0, row[seen] / 1e6, row[seen] * 1e6)
        assert token == row.argmax()


def test_settings_are_traced_and_programs_are_few(oracles):
    sampler = on_tokens(oracles / "llama_tied")
    for n in (3, 40):
        sampler.generate([list(range(n))], Sampling(max_new_tokens=4))
    before = decode.decode._cache_size(), decode.prefill._cache_size()
    for sampling in (
        Sampling(temperature=0.3), Sampling(top_k=4), Sampling(top_p=0.5), Sampling(max_new_tokens=3),
        Sampling(min_p=0.2), Sampling(temperature=0.0), Sampling(repetition_penalty=1.5),
    ):  # fmt: skip
        sampler.generate([[3] * n for n in (1, 20, 32)], sampling)
    sampler.score([[3, 4]], [[5, 6], [7]])
    assert (decode.decode._cache_size(), decode.prefill._cache_size()) == before
    assert len(sampler.programs) == 2


def test_nothing_is_compiled_after_the_first_tenth_of_a_long_run(oracles):
    """Chains of every length over a shared prefix: what the first rows did not need is never needed."""
    sampler, rng = on_tokens(oracles / "llama_tied"), np.random.default_rng(0)
    prefix = rng.integers(3, 90, 40).tolist()
    compiled = {}

    def note(counts):
        compiled[counts.done] = sum(f._cache_size() for f in (decode.decode, decode.prefill, decode.share))

    def chain(length):
        sample = yield Generate([*prefix, *range(length)], Sampling(max_new_tokens=1 + length // 2), length)
        longer = [*prefix, *range(length), *sample.tokens, 5, 6]
        yield Score(longer, [[3], [4, 5]])
        return (yield Generate(longer, Sampling(max_new_tokens=3, top_k=3), length))

    sampler.on_progress = note
    sampler.run([chain(length) for length in rng.integers(1, 40, 60).tolist()], prefix)
    assert max(compiled) == 60 and compiled[60] == compiled[min(done for done in compiled if done >= 6)]


def only(request):
    return (yield request)


def chains(prefix, rng):
    """Rows that extend, rewind, leave and come back to the prefix, and score in between."""

    def chain(n):
        few = Sampling(max_new_tokens=9 + n % 5)
        prompt = rng_tokens[n]
        draft = yield Generate(prompt, few, seed=n)
        request = [*prefix, *prompt, *draft.tokens, 7, 8]
        critique = yield Generate(request, few, seed=n + 100)
        revision = yield Generate([*request, *critique.tokens, 9], few, seed=n + 200)
        both = yield Score([*prefix, *prompt, *revision.tokens], [[5], [6, 7, 8], [9, 5]])
        again = yield Generate([*prefix, *prompt, *revision.tokens, 7, 8], few, seed=n + 300)
        return draft.tokens, critique.tokens, revision.tokens, again.tokens, [x.tolist() for x in both]

    rng_tokens = [rng.integers(3, 120, 2 + 5 * n % 23).tolist() for n in range(11)]
    return [chain(n) for n in range(11)]


@pytest.mark.parametrize("options", [dict(reuse=False), dict(rows=16, chunk=3, prefill_tokens=32)])
def test_reuse_slots_and_chunks_change_no_text(oracles, options):
    """The same rows, whatever is reused, however many slots there are, however the work is cut."""
    prefix = list(range(40, 63))
    folder = oracles / "llama_tied"
    plain, other = on_tokens(folder), on_tokens(folder, **options)
    expected = plain.run(chains(prefix, np.random.default_rng(3)), prefix)
    got = other.run(chains(prefix, np.random.default_rng(3)), prefix)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine[:4] == theirs[:4]
        for a, b in zip(mine[4], theirs[4], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    assert plain.counts.reused > 500
    if options.get("reuse") is False:
        assert other.counts.reused == 0 and other.counts.prefilled > 2 * plain.counts.prefilled


def test_rows_are_taken_up_as_slots_get_free_and_come_out_as_they_end(oracles):
    sampler = on_tokens(oracles / "llama_tied")
    begun = []

    def row(n):
        begun.append(n)
        if n % 7 == 3:
            return "asked nothing"
        sample = yield Generate([3, 4, 5 + n], Sampling(max_new_tokens=40 if n == 0 else 4), seed=n)
        return len(sample.tokens)

    stream = sampler.stream(row(n) for n in range(40))
    first = [next(stream) for _ in range(8)]
    assert len(begun) < 30, "the rows of a long stage are not all begun at once"
    out = first + list(stream)
    assert sorted(place for place, _ in out) == list(range(40))
    assert dict(out)[3] == "asked nothing" and dict(out)[1] == 4 and dict(out)[0] == 40
    assert [place for place, _ in out].index(0) > 30, "a long row holds up nobody"


def test_a_stop_string_ends_a_row_and_is_not_part_of_its_text(oracles):
    sampler = on_tokens(oracles / "llama_tied")
    whole = sampler.generate([[3, 4, 5]], Sampling(max_new_tokens=30), seed=1)[0]
    stop = byte_tokenizer().decode(whole.tokens[11:13])
    assert stop and stop in whole.text
    for chunk in (32, 5):
        sampler.chunk = chunk
        (cut,) = sampler.generate([[3, 4, 5]], Sampling(max_new_tokens=30, stop=("no such text", stop)), seed=1)
        assert cut.text == whole.text[: whole.text.index(stop)] and not cut.truncated
        assert cut.tokens == whole.tokens[: len(cut.tokens)] and cut.logprobs == whole.logprobs[: len(cut.tokens)]
        assert stop in byte_tokenizer().decode(cut.tokens) and stop not in byte_tokenizer().decode(cut.tokens[:-1])
