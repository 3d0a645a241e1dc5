"""What makes hypotheses with a low risk, or a high reward, more likely: MWER and GRPO on scores alone.

MWER (https://arxiv.org/abs/1712.01818) lowers the expected risk over an N-best list, whose probabilities Phat sum to 1.
Their normaliser is differentiated: dL/ds_i = Phat_i (W_i - sum_j Phat_j W_j) / N. These gradients sum to 0 and do not
depend on the mean that is subtracted. GRPO (https://arxiv.org/abs/2402.03300) makes the tokens of those hypotheses more
likely that are better than the mean of their list.

A hypothesis whose score is not finite is out of its list, for the loss and for N, and gets a zero gradient. That keeps
these losses finite, not the network behind them: a zero times its infinity is not zero.

Shape letters: B utterances, N hypotheses of each (padded), T tokens of each (padded).
"""

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # nats; past it exp overflows sooner or later, and then its gradient is 0 * inf


def usable(scores_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Return which hypotheses stay in their lists: the valid ones with a finite score."""
    return valid_BN & scores_BN.isfinite()


def mwer_loss(scores_BN: Tensor, risks_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Return loss_B = (1/N) sum_i Phat_i (W_i - Wbar), N the list's length; 0 for lists of fewer than two.

    scores: log P(y|x), the SUM over tokens, with gradient; risks W: constants; valid: False at padding.
    """
    assert scores_BN.shape == risks_BN.shape == valid_BN.shape, "a risk and a flag for each score"
    valid_BN = usable(scores_BN, valid_BN)
    count_B = valid_BN.sum(1).clamp(min=1)
    probs_BN = _posteriors(scores_BN, valid_BN)
    return (probs_BN * _centred(risks_BN.to(probs_BN), valid_BN)).sum(1) / count_B


@torch.no_grad()
def expected_risk(scores_BN: Tensor, risks_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Return expected_B = sum_i Phat_i W_i; 0 for an empty list. No gradient."""
    valid_BN = usable(scores_BN, valid_BN)
    probs_BN = _posteriors(scores_BN, valid_BN)
    return (probs_BN * risks_BN.to(probs_BN).masked_fill(~valid_BN, 0)).sum(1)


def group_advantages(rewards_BN: Tensor, valid_BN: Tensor, *, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """Return rewards less their list's mean and, with `scale`, over its standard deviation (of the list itself) + eps.

    0 at padding, in lists of fewer than two, and exactly 0 where all rewards are equal.
    """
    centred_BN = _centred(rewards_BN, valid_BN)
    if not scale:
        return centred_BN
    variance_B1 = centred_BN.square().sum(1, keepdim=True) / valid_BN.sum(1, keepdim=True).clamp(min=1)
    return centred_BN / (variance_B1.sqrt() + eps)


def grpo_loss(
    log_probs_BNT: Tensor,
    old_log_probs_BNT: Tensor,
    advantages_BN: Tensor,
    mask_BNT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    reference_log_probs_BNT: Tensor | None = None,
    kl_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return loss_B, and the share of tokens whose gradient the clip has cut off.

    Of a token -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r its probability over that of the policy which has
    made the hypothesis, plus kl_weight times the k3 estimate of KL(policy || reference), q - log q - 1 with q the
    reference's probability over the policy's. The mean over a hypothesis's tokens, then over the list: every hypothesis
    counts the same, and one that loops to its limit of length does not outweigh the others.

    log_probs have a gradient; mask is False at padding, and nowhere True for a hypothesis that is not there.
    """
    assert reference_log_probs_BNT is not None or not kl_weight, "KL needs the reference policy's log-probabilities"
    given = [log_probs_BNT, old_log_probs_BNT, *([reference_log_probs_BNT] if kl_weight else [])]
    mask_BNT = _usable_tokens(given, mask_BNT)
    # Filled before any arithmetic: what is masked out only behind it still sends 0 * inf back.
    policy_BNT, old_BNT, *reference = (_full(x).masked_fill(~mask_BNT, 0) for x in given)
    advantages_BN1 = advantages_BN.to(policy_BNT).masked_fill(~mask_BNT.any(-1), 0)[..., None]
    ratio_BNT = (policy_BNT - old_BNT.detach()).clamp(max=MAX_LOG_RATIO).exp()
    clipped_BNT = ratio_BNT.clamp(1 - clip_low, 1 + clip_high)
    losses_BNT = -torch.minimum(ratio_BNT * advantages_BN1, clipped_BNT * advantages_BN1)
    if kl_weight:
        log_q_BNT = (reference[0].detach() - policy_BNT).clamp(max=MAX_LOG_RATIO)
        losses_BNT = losses_BNT + kl_weight * (log_q_BNT.exp() - log_q_BNT - 1)
    tokens_BN = mask_BNT.sum(-1)
    means_BN = (losses_BNT * mask_BNT).sum(-1) / tokens_BN.clamp(min=1)
    loss_B = means_BN.sum(1) / (tokens_BN > 0).sum(1).clamp(min=1)
    cut_BNT = ((clipped_BNT - ratio_BNT) * advantages_BN1 < 0) & mask_BNT
    return loss_B, cut_BNT.sum() / mask_BNT.sum().clamp(min=1)


def _usable_tokens(log_probs: list[Tensor], mask_BNT: Tensor) -> Tensor:
    """Return the mask without hypotheses that have a token that is not finite, and without lists of fewer than two."""
    finite_BN = torch.stack([(x_BNT.isfinite() | ~mask_BNT).all(-1) for x_BNT in log_probs]).all(0)
    mask_BNT = mask_BNT & finite_BN[..., None]
    enough_B = mask_BNT.any(-1).sum(1) > 1
    return mask_BNT & enough_B[:, None, None]


def _posteriors(scores_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Return the softmax over the valid scores of each list, at least in float32; 0 elsewhere."""
    scores_BN = _full(scores_BN)
    lowest = torch.finfo(scores_BN.dtype).min  # not -inf: a list without a valid score would be NaN
    return scores_BN.masked_fill(~valid_BN, lowest).softmax(1) * valid_BN


def _centred(values_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Return the valid values less their list's mean, and 0 elsewhere: exactly 0 where all are equal."""
    values_BN = _full(values_BN).masked_fill(~valid_BN, 0)
    first_B1 = (values_BN * (valid_BN & (valid_BN.cumsum(1) == 1))).sum(1, keepdim=True)
    above_BN = (values_BN - first_B1) * valid_BN  # the mean of three times 0.1 is not 0.1, that of three zeros is 0
    mean_B1 = above_BN.sum(1, keepdim=True) / valid_BN.sum(1, keepdim=True).clamp(min=1)
    return (above_BN - mean_B1) * valid_BN


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
