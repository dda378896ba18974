"""PPO and DPO objectives on a small model: recorded log-probs, the temperature of the rollouts, padding, pairs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax import Sampler, Sampling, forward, load_model
from cai_jax.chat import encode_chat
from cai_jax.objectives import dpo
from cai_jax.objectives.model_losses import (
    completion_logprobs,
    completion_values,
    dpo_objective,
    pair_logprobs,
    ppo_objective,
    reward_objective,
)
from cai_jax.training.batches import pair_rows, right_padded


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def policy():
    return load_model("random:llama")


def arrays(prompts, completions, prompt_length, room):
    tokens = np.zeros((len(prompts), prompt_length + room), np.int32)
    positions = np.full_like(tokens, -1)
    mask = np.zeros((len(prompts), room), np.int32)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start, end = prompt_length - len(prompt), prompt_length + len(completion)
        tokens[row, start:end] = [*prompt, *completion]
        positions[row, start:end] = np.arange(end - start)
        mask[row, : len(completion)] = 1
    return jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(mask)


def test_scoring_at_the_temperature_of_the_rollouts_gives_their_log_probs(policy):
    """Sampling at T != 1 and scoring at T = 1 is a known fault: the first ratio is then not 1."""
    chats = [[{"role": "user", "content": text}] for text in ("Hi", "Tell me of the sea.")]
    samples = Sampler(policy, max_length=256, rows=2).generate(chats, Sampling(temperature=0.6, max_new_tokens=10))
    prompts = [encode_chat(policy.tokenizer, chat) for chat in chats]
    rollout = arrays(prompts, [sample.tokens for sample in samples], max(map(len, prompts)), 10)
    at_06, _ = completion_logprobs(policy.config, policy.params, *rollout, temperature=0.6)
    at_1, _ = completion_logprobs(policy.config, policy.params, *rollout)
    for row, sample in enumerate(samples):
        np.testing.assert_allclose(at_06[row, : len(sample.tokens)], sample.logprobs, atol=1e-4)
        assert np.abs(np.asarray(at_1[row, : len(sample.tokens)]) - sample.logprobs).max() > 1e-2


def ppo_batch(policy, prompt_length, room):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 200, n).tolist() for n in (5, 8)]
    completions = [rng.integers(3, 200, n).tolist() for n in (4, 6)]
    tokens, positions, mask = arrays(prompts, completions, prompt_length, room)
    old, _ = completion_logprobs(policy.config, policy.params, tokens, positions, mask)
    noise = jnp.asarray(np.random.default_rng(1).normal(0, 0.3, (2, 6)), jnp.float32)
    pad = ((0, 0), (0, room - 6))
    values = jnp.pad(noise, pad)
    return {
        "tokens": tokens, "positions": positions, "mask": mask, "old_logprobs": old, "old_values": values,
        "advantages": jnp.pad(noise[::-1], pad), "returns": values + 0.5,
    }  # fmt: skip


def test_recorded_log_probs_drive_the_ratio_and_padding_does_not(policy):
    """'Old' log-probs recomputed with the current params would leave the ratio at 1 and the clip idle."""
    value = load_model("random:llama", kind="reward", seed=3)
    params = {"policy": policy.params, "value": value.params}
    objective = ppo_objective(
        policy.config, value.config, temperature=1.0, clip=0.2, value_clip=0.2, value_coef=0.1
    )
    short, long = ppo_batch(policy, 8, 6), ppo_batch(policy, 20, 11)
    results = [objective(params, batch) for batch in (short, long)]
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-4)
    assert results[0][1] == results[1][1] == 10
    assert abs(float(results[0][2]["approx_kl"])) < 1e-6 and float(results[0][2]["policy_clip_fraction"]) == 0
    moved = objective(params, {**short, "old_logprobs": short["old_logprobs"] - 0.5})
    assert float(moved[2]["approx_kl"]) / 10 == pytest.approx(0.125, rel=1e-3)
    assert float(moved[2]["policy_clip_fraction"]) > 0


def test_values_are_read_before_each_token(policy):
    value = load_model("random:llama", kind="reward", seed=3)
    tokens, positions, mask = arrays([[5, 6, 7]], [[8, 9]], 3, 2)
    before = completion_values(value.config, value.params, tokens, positions, mask)
    changed = completion_values(value.config, value.params, tokens.at[0, 4].set(100), positions, mask)
    np.testing.assert_array_equal(before, changed)  # the last token is not seen by any value
    changed = completion_values(value.config, value.params, tokens.at[0, 3].set(100), positions, mask)
    assert before[0, 0] == changed[0, 0] and before[0, 1] != changed[0, 1]


# DPO on pairs in one row


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpo_of_a_pair_in_one_row_is_dpo_of_its_two_texts(policy, kind):
    rng = np.random.default_rng(2)
    pairs = [[rng.integers(3, 200, rng.integers(3, 8)).tolist() for _ in "pab"] for _ in range(3)]
    reference = load_model("random:llama", seed=5)

    def slowly(params):
        """Log-probs of each response after its prompt, a row a text."""
        texts = [prompt + response for prompt, *responses in pairs for response in responses]
        logits = jax.jit(forward, static_argnums=0)(policy.config, params, right_padded(texts, 16)[0])
        rows, table = iter(jax.nn.log_softmax(logits)), []
        for prompt, *responses in pairs:
            for response in responses:
                at = next(rows)[len(prompt) - 1 : len(prompt) + len(response) - 1]
                chosen = at[np.arange(len(response)), np.asarray(response)]
                table.append(float(chosen.mean() if kind == "ipo" else chosen.sum()))
        return np.reshape(table, (3, 2))

    ours, theirs = slowly(policy.params), slowly(reference.params)
    batch = {**pair_rows([*pairs, ([], [], [])], 32), "real": np.array([1, 1, 1, 0])}
    ref_logprobs = pair_logprobs(policy.config, reference.params, batch, kind)
    np.testing.assert_allclose(ref_logprobs[:3], theirs, atol=1e-4)
    objective = dpo_objective(policy.config, beta=0.3, kind=kind)
    loss, count, sums = objective(policy.params, {**batch, "ref_logprobs": ref_logprobs})
    want = dpo.loss(*ours.T, *theirs.T, 0.3, kind)
    assert count == 3
    np.testing.assert_allclose(loss / count, want, rtol=1e-4)
    np.testing.assert_allclose(sums["margin"], 0.3 * np.sum((ours - theirs) @ [1, -1]), rtol=1e-3)
    held, _, sums = dpo_objective(policy.config, beta=0.3, kind=kind, nll_coef=0.5)(
        policy.params, {**batch, "ref_logprobs": ref_logprobs}
    )
    of_a_token = ours[:, 0] / (1 if kind == "ipo" else [len(chosen) for _, chosen, _ in pairs])
    np.testing.assert_allclose(sums["nll"], -of_a_token.sum(), rtol=1e-4)
    np.testing.assert_allclose(held, loss - 0.5 * of_a_token.sum(), rtol=1e-4)


def test_soft_labels_of_dpo_come_with_the_rows(policy):
    rng = np.random.default_rng(4)
    pairs = [[rng.integers(3, 200, 4).tolist() for _ in "pab"] for _ in range(2)]
    batch = {**pair_rows(pairs, 16), "real": np.ones(2)}
    batch["ref_logprobs"] = pair_logprobs(policy.config, load_model("random:llama", seed=5).params, batch)
    hard, soft = (
        dpo_objective(policy.config, beta=0.3)(policy.params, batch | more)[0]
        for more in ({}, {"smoothing": np.array([0.0, 0.4], np.float32)})
    )
    ours = pair_logprobs(policy.config, policy.params, batch)
    want = dpo.terms(*ours.T, *batch["ref_logprobs"].T, 0.3, smoothing=np.array([0.0, 0.4]))
    np.testing.assert_allclose(soft, want.sum(), rtol=1e-5)
    assert abs(float(hard - soft)) > 1e-3


def test_a_dpo_step_from_the_reference_prefers_the_chosen_response(policy):
    rng = np.random.default_rng(3)
    pairs = [[rng.integers(3, 200, 5).tolist() for _ in "pab"] for _ in range(2)]
    batch = {**pair_rows(pairs, 16), "real": np.ones(2)}
    batch["ref_logprobs"] = pair_logprobs(policy.config, policy.params, batch)
    objective = dpo_objective(policy.config, beta=0.1)
    (loss, slopes), (_, sums) = gradient_step(objective, policy.params, batch)
    np.testing.assert_allclose(loss / 2, np.log(2), rtol=1e-6)  # no gap to the reference yet
    moved = jax.tree.map(lambda x, slope: x - 0.05 * slope, policy.params, slopes)
    later, _, sums = objective(moved, batch)
    assert later < loss and sums["accuracy"] == 2


def gradient_step(objective, params, batch):
    def run(params):
        loss, count, sums = objective(params, batch)
        return loss, (count, sums)

    (loss, more), slopes = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    return (loss, slopes), more


# Reward objective with several heads


def test_each_head_learns_from_its_own_sample_of_the_pairs():
    """The loss of an ensemble is the mean of its heads' losses, each weighted as that head counts the pairs."""
    ensemble = load_model("random:llama", kind="reward", seed=3, heads=3)
    rng = np.random.default_rng(4)
    pairs = [[rng.integers(3, 200, rng.integers(3, 8)).tolist() for _ in "pab"] for _ in range(4)]
    batch = {
        **pair_rows([*pairs, ([], [], [])], 32), "probability": np.float32([0.9, 0.2, 0.5, 1, 0]),
        "real": np.int32([1, 1, 1, 1, 0]),
        "head_weights": np.float32([[1, 0, 2], [0, 1, 1], [3, 1, 0], [1, 1, 1], [0, 0, 0]]),
    }  # fmt: skip
    options = {"center": 0.01, "margin": 0.5, "tie": 1e-3}
    objective = reward_objective(ensemble.config, **options)
    (loss, _), (count, sums) = gradient_step(objective, ensemble.params, batch)
    one = jax.jit(reward_objective(replace(ensemble.config, score_heads=1), **options))
    slowly = 0.0
    for head in range(3):
        alone = {**ensemble.params, "score": ensemble.params["score"][:, head : head + 1]}
        for row in range(4):
            single = {name: batch[name][row : row + 1] for name in batch if name != "head_weights"}
            slowly += batch["head_weights"][row, head] * float(one(alone, single)[0]) / 3
    assert count == 4 and sums["decided_share"] == 3
    assert float(loss) == pytest.approx(slowly, rel=1e-4)
    batch["head_weights"] *= np.float32([1, 0, 1])
    slope = gradient_step(objective, ensemble.params, batch)[0][1]["score"]
    assert np.abs(slope[:, 1]).max() == 0 < np.abs(slope[:, 0]).max(), "a head that counts no pair does not move"
