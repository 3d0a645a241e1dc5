"""MWER and GRPO against closed forms and finite differences, on the edges, and on a bandit with a known optimum."""

import math

import pytest
import torch

from seedling.stages.reinforcement.objectives import (
    expected_risk,
    group_advantages,
    grpo_loss,
    mwer_loss,
    usable,
)

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


@pytest.fixture
def lists():
    """Scores, risks and flags of five lists in fp64: full, shorter, with a hole, of one, of none."""
    draws = torch.Generator().manual_seed(0)
    scores_BN = torch.randn(5, 6, generator=draws, dtype=torch.float64) * 2 - 20
    risks_BN = torch.randint(0, 9, (5, 6), generator=draws).double()
    valid_BN = torch.ones(5, 6, dtype=torch.bool)
    valid_BN[1, 4:] = valid_BN[2, 1] = valid_BN[3, 1:] = valid_BN[4] = False
    return scores_BN.requires_grad_(), risks_BN, valid_BN


def gradient(loss_B, of):
    return torch.autograd.grad(loss_B.sum(), of, retain_graph=True)[0]


def lone(scores, risks):
    """One list in plain Python: the loss as in the paper, its exact gradient, and the expected risk."""
    weights = [math.exp(score - max(scores)) for score in scores]
    probs = [weight / sum(weights) for weight in weights]
    expected = sum(p * risk for p, risk in zip(probs, risks))
    n, mean = len(scores), sum(risks) / len(risks)
    loss = sum(p * (risk - mean) for p, risk in zip(probs, risks)) / n
    return loss, [p * (risk - expected) / n for p, risk in zip(probs, risks)], expected


# ---- MWER


def test_mwer_loss_and_gradient_are_the_closed_form(lists):
    scores_BN, risks_BN, valid_BN = lists
    loss_B = mwer_loss(scores_BN, risks_BN, valid_BN)
    grad_BN, expected_B = gradient(loss_B, scores_BN), expected_risk(scores_BN, risks_BN, valid_BN)
    for b in range(4):
        keep_N = valid_BN[b]
        loss, grad, expected = lone(scores_BN[b][keep_N].tolist(), risks_BN[b][keep_N].tolist())
        assert loss_B[b].item() == pytest.approx(loss, abs=1e-14)
        assert grad_BN[b][keep_N].tolist() == pytest.approx(grad, abs=1e-14)
        assert expected_B[b].item() == pytest.approx(expected, abs=1e-13)
    assert loss_B[4] == expected_B[4] == 0
    assert not expected_B.requires_grad
    assert (grad_BN[~valid_BN] == 0).all()


def test_mwer_gradient_is_that_of_finite_differences(lists):
    scores_BN, risks_BN, valid_BN = lists
    assert torch.autograd.gradcheck(lambda s: mwer_loss(s, risks_BN, valid_BN), scores_BN, rtol=1e-6, atol=1e-9)


def test_mwer_gradients_of_a_list_sum_to_zero_and_a_constant_risk_changes_nothing(lists):
    scores_BN, risks_BN, valid_BN = lists
    loss_B = mwer_loss(scores_BN, risks_BN, valid_BN)
    grad_BN = gradient(loss_B, scores_BN)
    assert grad_BN.abs().max() > 0.01
    assert grad_BN.sum(1).abs().max() < 1e-15
    shifted_B = mwer_loss(scores_BN, risks_BN + 1000, valid_BN)
    assert torch.equal(shifted_B, loss_B)
    assert torch.equal(gradient(shifted_B, scores_BN), grad_BN)


@pytest.mark.parametrize("risk", [0.0, 3.0, 0.1, 1e6 / 3])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_risks_or_a_single_hypothesis_give_exactly_zero(risk, n, dtype):
    scores_BN = torch.linspace(-9, -1, n, dtype=dtype)[None].requires_grad_()
    loss_B = mwer_loss(scores_BN, torch.full((1, n), risk, dtype=dtype), torch.ones(1, n, dtype=torch.bool))
    assert loss_B.tolist() == [0.0]
    assert (gradient(loss_B, scores_BN) == 0).all()


def test_scores_of_very_long_hypotheses_neither_overflow_nor_underflow(lists):
    scores_BN, risks_BN, valid_BN = lists
    near_BN = mwer_loss(scores_BN, risks_BN, valid_BN)
    assert torch.allclose(mwer_loss(scores_BN - 1e4, risks_BN, valid_BN), near_BN, rtol=1e-9, atol=1e-10)
    for scores in ([-1e4, -2e4, -1e4], [0.0, -1e4, -3e38], [3e38, -3e38, 0.0]):
        scores_1N = torch.tensor([scores], requires_grad=True)
        loss_1 = mwer_loss(scores_1N, torch.tensor([[1.0, 2.0, 5.0]]), torch.ones(1, 3, dtype=torch.bool))
        loss, grad, _ = lone(scores, [1.0, 2.0, 5.0])
        assert loss_1.item() == pytest.approx(loss, rel=1e-6)
        assert gradient(loss_1, scores_1N)[0].tolist() == pytest.approx(grad, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_leaves_the_list_as_if_it_had_never_been_there(lists, bad):
    scores_BN, risks_BN, valid_BN = lists
    with torch.no_grad():
        broken_BN = scores_BN.clone()
        broken_BN[0, 2] = broken_BN[1, 0] = bad
        broken_BN[4] = bad
    broken_BN.requires_grad_()
    kept_BN = valid_BN.clone()
    kept_BN[0, 2] = kept_BN[1, 0] = False
    assert torch.equal(usable(broken_BN, torch.ones_like(valid_BN)), broken_BN.isfinite())
    loss_B, wanted_B = mwer_loss(broken_BN, risks_BN, valid_BN), mwer_loss(scores_BN, risks_BN, kept_BN)
    assert torch.equal(loss_B, wanted_B)
    assert torch.equal(gradient(loss_B, broken_BN), gradient(wanted_B, scores_BN))
    assert torch.equal(expected_risk(broken_BN, risks_BN, valid_BN), expected_risk(scores_BN, risks_BN, kept_BN))


def test_what_stands_at_padding_is_never_read(lists):
    scores_BN, risks_BN, valid_BN = lists
    wanted_B = mwer_loss(scores_BN, risks_BN, valid_BN)
    for rubbish in (math.nan, math.inf, 1e30):
        other_BN = scores_BN.detach().masked_fill(~valid_BN, rubbish).requires_grad_()
        loss_B = mwer_loss(other_BN, risks_BN.masked_fill(~valid_BN, rubbish), valid_BN)
        assert torch.equal(loss_B, wanted_B)
        assert torch.equal(gradient(loss_B, other_BN), gradient(wanted_B, scores_BN))


def test_half_precision_scores_are_summed_in_float32():
    scores_BN = torch.tensor([[-3.0, -4.0, -5.0]])
    risks_BN, valid_BN = torch.tensor([[0.0, 1.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool)
    loss_B = mwer_loss(scores_BN.bfloat16(), risks_BN, valid_BN)
    assert loss_B.dtype == torch.float32
    assert torch.equal(loss_B, mwer_loss(scores_BN, risks_BN, valid_BN))


@pytest.mark.parametrize("shape", [(2, 0, 0), (2, 0, 3), (2, 3, 0), (0, 3, 2), (0, 0, 0)])
def test_batches_with_nothing_in_them_have_a_loss_of_zero_that_can_be_derived(shape):
    log_probs_BNT = torch.zeros(shape, requires_grad=True)
    numbers_BN, valid_BN = torch.zeros(shape[:2]), torch.zeros(shape[:2], dtype=torch.bool)
    mask_BNT = torch.zeros(shape, dtype=torch.bool)
    mwer_B = mwer_loss(log_probs_BNT.sum(2), numbers_BN, valid_BN)
    advantages_BN = group_advantages(numbers_BN, valid_BN)
    grpo_B, fraction = grpo_loss(log_probs_BNT, log_probs_BNT.detach(), advantages_BN, mask_BNT, **CLIP)
    expected_B = expected_risk(log_probs_BNT.sum(2), numbers_BN, valid_BN)
    assert mwer_B.tolist() == grpo_B.tolist() == expected_B.tolist() == [0.0] * shape[0]
    assert fraction == 0
    for loss_B in (mwer_B, grpo_B):
        assert (gradient(loss_B, log_probs_BNT) == 0).all()


def test_descent_moves_probability_to_the_hypothesis_with_the_lowest_risk():
    scores_BN = torch.tensor([[-1.0, -2.0, -3.0, -4.0]], dtype=torch.float64)
    risks_BN, valid_BN = torch.tensor([[3.0, 2.0, 0.0, 5.0]]), torch.ones(1, 4, dtype=torch.bool)
    before = expected_risk(scores_BN, risks_BN, valid_BN).item()
    for _ in range(60):
        scores_BN.requires_grad_()
        grad_BN = gradient(mwer_loss(scores_BN, risks_BN, valid_BN), scores_BN)
        scores_BN = scores_BN.detach() - 5 * grad_BN
        after = expected_risk(scores_BN, risks_BN, valid_BN).item()
        assert after < before
        before = after
    assert before < 0.05


# ---- advantages


def test_advantages_are_standard_scores_of_each_list(lists):
    _, rewards_BN, valid_BN = lists
    advantages_BN = group_advantages(rewards_BN, valid_BN, eps=1e-12)
    plain_BN = group_advantages(rewards_BN, valid_BN, scale=False)
    for b in range(3):
        rewards = rewards_BN[b][valid_BN[b]]
        wanted = (rewards - rewards.mean()) / rewards.std(correction=0)
        assert torch.allclose(advantages_BN[b][valid_BN[b]], wanted, atol=1e-9)
        assert torch.allclose(plain_BN[b][valid_BN[b]], rewards - rewards.mean(), atol=1e-12)
    assert (advantages_BN[~valid_BN] == 0).all()
    assert (advantages_BN[3:] == 0).all()
    assert (plain_BN[3:] == 0).all()


@pytest.mark.parametrize("reward", [0.1, -1 / 3, 7.0])
def test_equal_rewards_have_no_advantage_at_all(reward):
    for n in range(1, 9):
        rewards_BN, valid_BN = torch.full((1, n), reward), torch.ones(1, n, dtype=torch.bool)
        for scale in (True, False):
            assert (group_advantages(rewards_BN, valid_BN, scale=scale) == 0).all()


def test_rewards_that_differ_by_rounding_alone_are_not_blown_up():
    rewards_BN = torch.tensor([[0.3, 0.1 + 0.2, 0.3]], dtype=torch.float64)
    assert rewards_BN.unique().numel() == 2
    assert group_advantages(rewards_BN, torch.ones(1, 3, dtype=torch.bool)).abs().max() < 1e-10


# ---- GRPO


@pytest.fixture
def tokens():
    """Log-probabilities of three lists of four hypotheses with one to five tokens, and a mask."""
    draws = torch.Generator().manual_seed(1)
    policy_BNT = -torch.rand(3, 4, 5, generator=draws, dtype=torch.float64) * 3
    old_BNT = policy_BNT + 0.6 * torch.randn(3, 4, 5, generator=draws, dtype=torch.float64)
    lengths_BN = torch.randint(1, 6, (3, 4), generator=draws)
    lengths_BN[1, 2:] = 0  # a shorter list
    advantages_BN = torch.randn(3, 4, generator=draws, dtype=torch.float64)
    return policy_BNT.requires_grad_(), old_BNT, advantages_BN, torch.arange(5) < lengths_BN[..., None]


def written_out(policy, old, advantages, mask, *, clip_low, clip_high, reference=None, kl_weight=0.0):
    """One list in plain Python: the mean over tokens, then over hypotheses."""
    means, cut = [], 0
    for n, advantage in enumerate(advantages):
        losses = []
        for t in [t for t, there in enumerate(mask[n]) if there]:
            ratio = math.exp(policy[n][t] - old[n][t])
            bounded = min(max(ratio, 1 - clip_low), 1 + clip_high)
            cut += (advantage > 0 and ratio > 1 + clip_high) or (advantage < 0 and ratio < 1 - clip_low)
            loss = -min(ratio * advantage, bounded * advantage)
            if kl_weight:
                q = math.exp(reference[n][t] - policy[n][t])
                loss += kl_weight * (q - math.log(q) - 1)
            losses.append(loss)
        if losses:
            means.append(sum(losses) / len(losses))
    return sum(means) / len(means), cut


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_grpo_is_the_formula_written_out(tokens, kl_weight):
    policy_BNT, old_BNT, advantages_BN, mask_BNT = tokens
    reference_BNT = old_BNT - 0.2
    loss_B, fraction = grpo_loss(*tokens, **CLIP, reference_log_probs_BNT=reference_BNT, kl_weight=kl_weight)
    cuts = 0
    for b in range(3):
        sides = (x[b].tolist() for x in (policy_BNT, old_BNT, advantages_BN, mask_BNT))
        wanted, cut = written_out(*sides, **CLIP, reference=reference_BNT[b].tolist(), kl_weight=kl_weight)
        cuts += cut
        assert loss_B[b].item() == pytest.approx(wanted, abs=1e-12)
    assert 0 < cuts < mask_BNT.sum()
    assert fraction.item() == pytest.approx(cuts / mask_BNT.sum().item(), abs=1e-6)


def test_grpo_gradient_is_that_of_finite_differences(tokens):
    policy_BNT, old_BNT, advantages_BN, mask_BNT = tokens

    def loss(log_probs_BNT):
        more = {"reference_log_probs_BNT": old_BNT + 0.1, "kl_weight": 0.2}
        return grpo_loss(log_probs_BNT, old_BNT, advantages_BN, mask_BNT, **CLIP, **more)[0]

    assert torch.autograd.gradcheck(loss, policy_BNT, rtol=1e-6, atol=1e-9)


def test_at_ratio_one_the_gradient_is_reinforce():
    """Of logits: -(1/N) sum_i A_i (1/T_i) sum_t (onehot(y_it) - p_t), p the policy at each position."""
    N, T, V = 4, 3, 6
    draws = torch.Generator().manual_seed(2)
    logits_NTV = torch.randn(N, T, V, generator=draws, dtype=torch.float64, requires_grad=True)
    ids_NT = torch.randint(0, V, (N, T), generator=draws)
    lengths_N, advantages_N = torch.tensor([3, 1, 2, 3]), torch.tensor([1.0, -0.5, 2.0, -2.5], dtype=torch.float64)
    mask_NT = torch.arange(T) < lengths_N[:, None]
    log_probs_NT = logits_NTV.log_softmax(-1).gather(-1, ids_NT[..., None])[..., 0]
    inputs = (log_probs_NT, log_probs_NT.detach(), advantages_N, mask_NT)
    loss_B, fraction = grpo_loss(*(x[None] for x in inputs), **CLIP)
    onehot_NTV = torch.nn.functional.one_hot(ids_NT, V)
    share_NT = advantages_N[:, None] * mask_NT / lengths_N[:, None] / N
    wanted_NTV = -share_NT[..., None] * (onehot_NTV - logits_NTV.detach().softmax(-1))
    assert torch.allclose(gradient(loss_B, logits_NTV), wanted_NTV, atol=1e-15)
    assert fraction == 0


@pytest.mark.parametrize(
    "ratio, advantage, is_cut",
    [
        (1.27, 1.0, False),
        (1.29, 1.0, True),
        (1.29, -1.0, False),
        (0.81, -1.0, False),
        (0.79, -1.0, True),
        (0.79, 1.0, False),
    ],
)
def test_the_two_bounds_cut_only_what_has_gone_far_enough(ratio, advantage, is_cut):
    policy_BNT = torch.full((1, 2, 1), math.log(ratio), dtype=torch.float64, requires_grad=True)
    advantages_BN, mask_BNT = torch.full((1, 2), advantage).double(), torch.ones(1, 2, 1, dtype=torch.bool)
    loss_B, fraction = grpo_loss(policy_BNT, torch.zeros_like(policy_BNT), advantages_BN, mask_BNT, **CLIP)
    wanted = 0.0 if is_cut else -advantage * ratio / 2
    assert gradient(loss_B, policy_BNT).flatten().tolist() == pytest.approx([wanted, wanted], abs=1e-12)
    assert fraction.item() == is_cut


def test_every_hypothesis_counts_the_same_whatever_its_length(tokens):
    policy_BNT, old_BNT, advantages_BN, mask_BNT = tokens
    twice = [torch.cat([x, x], -1) for x in (policy_BNT, old_BNT, mask_BNT)]
    mask_BNT = torch.cat([mask_BNT, mask_BNT & (torch.arange(4) == 0)[:, None]], -1)  # the first is twice as long
    longer_B, _ = grpo_loss(twice[0], twice[1], advantages_BN, mask_BNT, **CLIP)
    assert torch.allclose(longer_B, grpo_loss(*tokens, **CLIP)[0], atol=1e-12)


def test_k3_has_the_kl_divergence_as_its_expectation():
    draws = torch.Generator().manual_seed(3)
    log_p_K, log_q_K = torch.randn(2, 7, generator=draws, dtype=torch.float64).log_softmax(-1)
    # A list for each arm, of the arm twice: its loss is what one draw of the arm contributes.
    policy_KN1, reference_KN1 = (x[:, None, None].expand(-1, 2, 1) for x in (log_p_K, log_q_K))
    advantages_KN, mask_KN1 = torch.zeros(7, 2), torch.ones(7, 2, 1, dtype=torch.bool)
    loss_K, _ = grpo_loss(
        policy_KN1,
        policy_KN1,
        advantages_KN,
        mask_KN1,
        **CLIP,
        reference_log_probs_BNT=reference_KN1,
        kl_weight=2.0,
    )
    kl = torch.nn.functional.kl_div(log_q_K, log_p_K, log_target=True, reduction="sum")
    assert (loss_K > 0).all()
    assert (log_p_K.exp() @ loss_K).item() == pytest.approx(2 * kl.item(), abs=1e-12)


def test_the_reference_policy_is_not_looked_at_unless_kl_has_a_weight(tokens):
    wanted_B, _ = grpo_loss(*tokens, **CLIP)
    loss_B, _ = grpo_loss(*tokens, **CLIP, reference_log_probs_BNT=torch.full_like(tokens[0], math.nan))
    assert torch.equal(loss_B, wanted_B)


def test_equal_rewards_give_exactly_zero_and_so_does_a_list_of_one(tokens):
    policy_BNT, old_BNT, _, mask_BNT = tokens
    advantages_BN = group_advantages(torch.full((3, 4), 0.1), mask_BNT.any(-1))
    loss_B, _ = grpo_loss(policy_BNT, old_BNT, advantages_BN, mask_BNT, **CLIP)
    assert (loss_B == 0).all()
    assert (gradient(loss_B, policy_BNT) == 0).all()
    loss_B, fraction = grpo_loss(policy_BNT[:, :1], old_BNT[:, :1], torch.ones(3, 1), mask_BNT[:, :1], **CLIP)
    assert (loss_B == 0).all()
    assert (gradient(loss_B, policy_BNT) == 0).all()
    assert fraction == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_token_that_is_not_finite_takes_its_hypothesis_out(tokens, bad):
    policy_BNT, old_BNT, advantages_BN, mask_BNT = tokens
    kept_BNT = mask_BNT.clone()
    kept_BNT[0, 1] = False
    wanted_B, wanted_fraction = grpo_loss(policy_BNT, old_BNT, advantages_BN, kept_BNT, **CLIP)
    for which in (0, 1):
        given = [policy_BNT.detach().clone(), old_BNT.clone()]
        given[which][0, 1, 0] = bad
        given[which][~mask_BNT] = bad  # padding holds anything
        given[0].requires_grad_()
        loss_B, fraction = grpo_loss(*given, advantages_BN, mask_BNT, **CLIP)
        assert torch.equal(loss_B, wanted_B)
        assert fraction == wanted_fraction
        assert torch.equal(gradient(loss_B, given[0]), gradient(wanted_B, policy_BNT))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("drift", [1e3, -1e3])
def test_policies_that_are_worlds_apart_have_finite_gradients(advantage, drift):
    policy_BNT = torch.full((1, 2, 3), drift, requires_grad=True)
    inputs = (torch.zeros(1, 2, 3), torch.full((1, 2), advantage), torch.ones(1, 2, 3, dtype=torch.bool))
    for more in ({}, {"reference_log_probs_BNT": torch.zeros(1, 2, 3), "kl_weight": 1.0}):
        loss_B, _ = grpo_loss(policy_BNT, *inputs, **CLIP, **more)
        assert loss_B.isfinite().all()
        assert gradient(loss_B, policy_BNT).isfinite().all()


def test_on_a_bandit_the_best_arm_is_found():
    """Ten arms, noise as large as the spread of their rewards; two updates for each list of 16 draws."""
    draws = torch.Generator().manual_seed(4)
    means_K = torch.linspace(0, 1, 10)[torch.randperm(10, generator=draws)]
    logits_K = torch.zeros(10, requires_grad=True)
    optimizer = torch.optim.Adam([logits_K], lr=0.1)
    mask_BNT, valid_BN = torch.ones(1, 16, 1, dtype=torch.bool), torch.ones(1, 16, dtype=torch.bool)
    for _ in range(200):
        arms_N = logits_K.detach().softmax(0).multinomial(16, replacement=True, generator=draws)
        rewards_N = means_K[arms_N] + 0.3 * torch.randn(16, generator=draws)
        old_BNT = logits_K.detach().log_softmax(0)[arms_N][None, :, None]
        for _ in range(2):
            policy_BNT = logits_K.log_softmax(0)[arms_N][None, :, None]
            loss_B, _ = grpo_loss(policy_BNT, old_BNT, group_advantages(rewards_N[None], valid_BN), mask_BNT, **CLIP)
            optimizer.zero_grad()
            loss_B.sum().backward()
            optimizer.step()
    probs_K = logits_K.detach().softmax(0)
    assert probs_K.argmax() == means_K.argmax()
    assert probs_K.max() > 0.95
