import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax.objectives import dpo, pairwise, sft


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


# sft


def test_token_loss_is_a_mean_over_tokens_not_over_rows():
    logprobs_BT = jnp.array([[-1.0, -2.0, -3.0], [-10.0, -7.0, -7.0]])
    mask_BT = jnp.array([[1, 1, 1], [1, 0, 0]])
    np.testing.assert_allclose(sft.token_loss(logprobs_BT, mask_BT), 16 / 4)
    total, count = sft.token_loss_sums(logprobs_BT, mask_BT)
    assert (float(total), float(count)) == (16.0, 4.0)


def test_token_loss_is_blind_to_what_it_does_not_mark():
    logprobs_BT = jnp.array([[-1.0, jnp.nan], [-jnp.inf, -3.0]])
    mask_BT = jnp.array([[True, False], [False, True]])
    loss, gradient_BT = jax.value_and_grad(sft.token_loss)(logprobs_BT, mask_BT)
    assert float(loss) == 2.0
    np.testing.assert_array_equal(gradient_BT, [[-0.5, 0], [0, -0.5]])


def test_token_loss_of_nothing_is_zero():
    assert float(sft.token_loss(jnp.full((2, 2), jnp.nan), jnp.zeros((2, 2)))) == 0.0


# pairwise


@pytest.mark.parametrize("name", ["bt_plain", "bt_margin"])
def test_bradley_terry_agrees(oracle, name):
    want = oracle(name)
    loss = pairwise.bradley_terry(want["chosen_rewards"], want["rejected_rewards"], margin_B=want["margin"])
    np.testing.assert_allclose(loss, want["loss"], atol=1e-5)


def test_soft_label_formula_and_center():
    chosen_B, rejected_B = np.array([0.3, -1.2, 2.0]), np.array([1.1, -0.4, -3.0])
    probability_B = np.array([0.9, 0.5, 0.1])
    gap_B = chosen_B - rejected_B
    cross_B = -(probability_B * np.log(sigmoid(gap_B)) + (1 - probability_B) * np.log(sigmoid(-gap_B)))
    got = pairwise.bradley_terry(chosen_B, rejected_B, probability_B=probability_B)
    np.testing.assert_allclose(got, cross_B.mean(), rtol=1e-5)
    centred = pairwise.bradley_terry(chosen_B, rejected_B, probability_B=probability_B, center=0.01)
    np.testing.assert_allclose(centred, (cross_B + 0.01 * (chosen_B + rejected_B) ** 2).mean(), rtol=1e-5)


def test_swapping_the_pair_and_its_label_changes_nothing():
    chosen_B, rejected_B = jnp.array([0.3, -1.2]), jnp.array([1.1, 4.0])
    probability_B = jnp.array([0.8, 0.35])
    np.testing.assert_allclose(
        pairwise.bradley_terry_terms(chosen_B, rejected_B, probability_B),
        pairwise.bradley_terry_terms(rejected_B, chosen_B, 1 - probability_B),
        rtol=1e-6,
    )


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_the_least_loss_is_where_the_model_believes_the_label(margin):
    slope = jax.grad(lambda chosen: pairwise.bradley_terry(chosen[None], jnp.zeros(1), 0.8, margin))
    best = jnp.float32(margin + np.log(0.8 / 0.2))
    assert abs(float(slope(best))) < 1e-6
    assert float(slope(best - 0.1)) < -1e-3 and float(slope(best + 0.1)) > 1e-3


def test_certain_pairs_stay_finite():
    loss_B, gradient_B = jax.vmap(jax.value_and_grad(lambda c: pairwise.bradley_terry(c[None], jnp.zeros(1))))(
        jnp.array([-1e4, 1e4])
    )
    np.testing.assert_allclose(loss_B, [1e4, 0.0])
    np.testing.assert_allclose(gradient_B, [-1.0, 0.0])


# dpo

PAIRS = (np.array([-5.0, -9.0]), np.array([-7.0, -8.0]), np.array([-6.0, -8.5]), np.array([-6.5, -8.75]))
GAP_B = (PAIRS[0] - PAIRS[2]) - (PAIRS[1] - PAIRS[3])


def test_dpo_agrees(oracle):
    want = oracle("dpo_sigmoid")
    loss = dpo.loss(
        want["policy_chosen_logps"],
        want["policy_rejected_logps"],
        want["ref_chosen_logps"],
        want["ref_rejected_logps"],
        float(want["beta"]),
    )
    np.testing.assert_allclose(loss, want["loss"], atol=1e-5)


@pytest.mark.parametrize(
    "kind, smoothing, want_B",
    [
        ("sigmoid", 0.0, -np.log(sigmoid(0.3 * GAP_B))),
        ("sigmoid", 0.2, -0.8 * np.log(sigmoid(0.3 * GAP_B)) - 0.2 * np.log(sigmoid(-0.3 * GAP_B))),
        ("robust", 0.0, -np.log(sigmoid(0.3 * GAP_B))),
        ("robust", 0.2, (-0.8 * np.log(sigmoid(0.3 * GAP_B)) + 0.2 * np.log(sigmoid(-0.3 * GAP_B))) / 0.6),
        ("ipo", 0.0, (GAP_B - 1 / 0.6) ** 2),
        ("hinge", 0.0, np.maximum(0, 1 - 0.3 * GAP_B)),
    ],
)
def test_kinds(kind, smoothing, want_B):
    np.testing.assert_allclose(dpo.terms(*PAIRS, 0.3, kind, smoothing), want_B, rtol=1e-5)
    np.testing.assert_allclose(dpo.loss(*PAIRS, 0.3, kind, smoothing), want_B.mean(), rtol=1e-5)


def test_robust_is_unbiased_under_flipped_labels():
    chosen_B, rejected_B, ref_chosen_B, ref_rejected_B = PAIRS
    kept = dpo.loss(*PAIRS, 0.3, "robust", 0.25)
    flipped = dpo.loss(rejected_B, chosen_B, ref_rejected_B, ref_chosen_B, 0.3, "robust", 0.25)
    np.testing.assert_allclose(0.75 * kept + 0.25 * flipped, dpo.loss(*PAIRS, 0.3), rtol=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "robust"])
def test_every_pair_may_have_its_own_smoothing(kind):
    share_B = np.array([0.0, 0.2])
    one_by_one = [dpo.terms(*PAIRS, 0.3, kind, share)[row] for row, share in enumerate(share_B)]
    np.testing.assert_allclose(dpo.terms(*PAIRS, 0.3, kind, share_B), one_by_one, rtol=1e-6)
    alike = np.full(2, 0.2)
    np.testing.assert_allclose(dpo.loss(*PAIRS, 0.3, kind, alike), dpo.loss(*PAIRS, 0.3, kind, 0.2), rtol=1e-6)
    np.testing.assert_allclose(dpo.loss(*PAIRS, 0.3, kind, np.zeros(2)), dpo.loss(*PAIRS, 0.3, kind), rtol=1e-6)


def test_soft_labels_are_bradley_terry_on_the_implicit_rewards():
    probability_B = np.array([0.5, 0.9])
    chosen_B, rejected_B, ref_chosen_B, ref_rejected_B = PAIRS
    rewards = 0.3 * (chosen_B - ref_chosen_B), 0.3 * (rejected_B - ref_rejected_B)
    loss, slopes_B = jax.value_and_grad(lambda x: dpo.loss(x, *PAIRS[1:], 0.3, smoothing=1 - probability_B))(chosen_B)
    np.testing.assert_allclose(loss, pairwise.bradley_terry(*rewards, probability_B), rtol=1e-6)
    # The loss has its minimum where the policy is as sure as the label: at a logit of p, over beta.
    gap_B = np.log(probability_B / (1 - probability_B)) / 0.3
    best = ref_chosen_B + gap_B, ref_rejected_B, ref_chosen_B, ref_rejected_B
    at_best = jax.grad(lambda x: dpo.loss(x, *best[1:], 0.3, smoothing=1 - probability_B))(best[0])
    np.testing.assert_allclose(at_best, 0, atol=1e-7)
    assert np.abs(slopes_B).min() > 1e-3


def test_unknown_kind_and_useless_smoothing_are_refused():
    with pytest.raises(ValueError, match="sigmoid, ipo, hinge, robust"):
        dpo.loss(*PAIRS, 0.1, "sigmod")
    for kind in ("ipo", "hinge"):
        with pytest.raises(ValueError, match="smoothing"):
            dpo.loss(*PAIRS, 0.1, kind, smoothing=0.1)
        with pytest.raises(ValueError, match="smoothing"):
            dpo.loss(*PAIRS, 0.1, kind, smoothing=np.zeros(2))


# types


def test_integers_and_half_precision_are_raised_and_float64_is_kept():
    integers = jnp.array([1, 0]), jnp.array([0, 3])
    assert pairwise.bradley_terry(*integers).dtype == jnp.float32
    assert pairwise.bradley_terry(*(x.astype(jnp.bfloat16) for x in integers)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert pairwise.bradley_terry(np.ones(2), np.zeros(2)).dtype == jnp.float64
        assert dpo.loss(*PAIRS, 0.1).dtype == jnp.float64
        assert sft.token_loss(np.ones((1, 2)), np.ones((1, 2), bool)).dtype == jnp.float64


# margin by label


def test_a_margin_by_label_asks_for_scores_further_apart_where_the_label_is_surer():
    probability_B = jnp.array([0.5, 0.6, 0.9, 0.1, 1.0, 0.0])
    margin_B = pairwise.label_margin(probability_B, 0.5)
    logits = np.log(np.array([1, 1.5, 9, 1 / 9, 99, 1 / 99]))
    np.testing.assert_allclose(margin_B, 0.5 * logits, atol=1e-6)
    np.testing.assert_allclose(pairwise.label_margin(1 - probability_B, 0.5), -margin_B, atol=1e-6)
    slope = jax.grad(lambda gap: pairwise.bradley_terry(gap[None], jnp.zeros(1), 0.9, margin_B[2]))
    assert abs(float(slope(jnp.float32(1.5 * np.log(9))))) < 1e-6


def test_a_margin_leaves_the_loss_blind_to_the_order_of_a_pair():
    a_B, b_B, p_B = jnp.array([0.3, -1.2]), jnp.array([1.1, 4.0]), jnp.array([0.8, 0.35])
    one = pairwise.bradley_terry_terms(a_B, b_B, p_B, pairwise.label_margin(p_B, 0.7))
    other = pairwise.bradley_terry_terms(b_B, a_B, 1 - p_B, pairwise.label_margin(1 - p_B, 0.7))
    np.testing.assert_allclose(one, other, rtol=1e-5)
