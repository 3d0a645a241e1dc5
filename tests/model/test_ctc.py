"""CTC: brute force over all paths, torch's own loss, and targets that do not fit."""

import itertools
import math

import pytest
import torch

from seedling.model.ctc import CTCHead, bytes_text, ctc_loss_sum, frames_needed, greedy_decode, text_bytes


def collapse(path, blank):
    return [label for label, _ in itertools.groupby(path) if label != blank]


def brute_force(log_probs_TV, target):
    """Minus log of the sum over every path that collapses to the target."""
    T, V = log_probs_TV.shape
    paths = (p for p in itertools.product(range(V), repeat=T) if collapse(p, V - 1) == target)
    scores = [sum(log_probs_TV[t, label].item() for t, label in enumerate(path)) for path in paths]
    return -torch.tensor(scores, dtype=torch.float64).logsumexp(0).item()


@pytest.mark.parametrize("target", [[], [0], [1, 0], [1, 1], [0, 1, 0], [2, 2, 1]])
def test_the_loss_is_the_sum_over_all_paths(target):
    log_probs_BTV = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    result = ctc_loss_sum(log_probs_BTV, torch.tensor([4]), [target])
    assert result.loss_sum.item() == pytest.approx(brute_force(log_probs_BTV[0], target), rel=1e-5)
    assert result[1:] == (1, 0)


def test_a_batch_is_the_sum_of_its_utterances_whatever_the_padding():
    torch.manual_seed(0)
    head, lengths_B = CTCHead(8, 10), torch.tensor([20, 7, 13])
    targets = [[1, 2, 3, 3], [], [9, 0, 9]]
    log_probs_BTV = head(torch.randn(3, 20, 8))
    together = ctc_loss_sum(log_probs_BTV, lengths_B, targets)
    alone = [
        ctc_loss_sum(log_probs_BTV[b : b + 1, :length], lengths_B[b : b + 1], targets[b : b + 1]).loss_sum
        for b, length in enumerate(lengths_B)
    ]
    torch.testing.assert_close(together.loss_sum, sum(alone))
    torch_loss = torch.nn.functional.ctc_loss(
        log_probs_BTV.transpose(0, 1),
        torch.tensor([target + [0] * (4 - len(target)) for target in targets]),
        lengths_B,
        torch.tensor([4, 0, 3]),
        blank=10,
        reduction="none",
    )
    torch.testing.assert_close(together.loss_sum, torch_loss.sum())


def test_frames_needed_is_the_shortest_path_that_exists():
    for target in ([], [0], [0, 0], [0, 1], [0, 0, 0], [0, 1, 1, 0]):
        lengths = [T for T in range(7) if any(collapse(p, 2) == target for p in itertools.product(range(3), repeat=T))]
        assert frames_needed(target) == min(lengths)


def test_targets_that_do_not_fit_are_counted_and_leave_the_others_loss_and_gradient_alone():
    torch.manual_seed(0)
    logits_BTV = torch.randn(3, 6, 5, requires_grad=True)
    lengths_B, targets = torch.tensor([6, 3, 6]), [[1, 2], [1, 1, 2], [0, 3]]  # 1 1 2 needs 4 frames
    result = ctc_loss_sum(logits_BTV.log_softmax(-1), lengths_B, targets)
    assert result[1:] == (2, 1)
    result.loss_sum.backward()
    assert (logits_BTV.grad[1] == 0).all()
    kept_BTV = logits_BTV.detach()[[0, 2]].requires_grad_()
    expected = ctc_loss_sum(kept_BTV.log_softmax(-1), lengths_B[[0, 2]], [targets[0], targets[2]])
    expected.loss_sum.backward()
    torch.testing.assert_close(result.loss_sum, expected.loss_sum)
    torch.testing.assert_close(logits_BTV.grad[[0, 2]], kept_BTV.grad)


def test_a_batch_in_which_nothing_fits_has_zero_loss_with_a_gradient():
    logits_BTV = torch.randn(2, 1, 5, requires_grad=True)
    result = ctc_loss_sum(logits_BTV.log_softmax(-1), torch.tensor([1, 1]), [[1, 2], [0, 0]])
    result.loss_sum.backward()
    assert result.loss_sum.item() == 0 and result[1:] == (0, 2)
    assert (logits_BTV.grad == 0).all()


def test_a_label_of_probability_zero_stays_infinite_and_is_not_hidden():
    log_probs_BTV = torch.full((1, 3, 4), -math.inf)
    log_probs_BTV[..., 3] = 0.0
    assert ctc_loss_sum(log_probs_BTV, torch.tensor([3]), [[1]]).loss_sum.item() == math.inf


@pytest.mark.parametrize("target", [[4], [-1], [0, 5]])
def test_targets_outside_the_vocabulary_are_errors(target):
    with pytest.raises(ValueError, match=r"within 0 and vocab_size - 1 \(3\)"):
        ctc_loss_sum(torch.zeros(1, 9, 5), torch.tensor([9]), [target])


def test_the_head_gives_float32_probabilities_from_a_bf16_model():
    log_probs_BTV = CTCHead(8, 10).bfloat16()(torch.randn(2, 3, 8, dtype=torch.bfloat16))
    assert log_probs_BTV.shape == (2, 3, 11) and log_probs_BTV.dtype == torch.float32
    torch.testing.assert_close(log_probs_BTV.exp().sum(-1), torch.ones(2, 3))


def test_greedy_decoding_collapses_the_best_path_up_to_each_length():
    paths = [[2, 2, 3, 2, 0, 0, 3], [3, 3, 3, 3, 3, 3, 3], [1, 3, 1, 1, 0, 2, 2]]
    log_probs_BTV = torch.nn.functional.one_hot(torch.tensor(paths), 4).float().log_softmax(-1)
    assert greedy_decode(log_probs_BTV, torch.tensor([7, 7, 4])) == [[2, 2, 0], [], [1, 1]]


def test_any_text_becomes_bytes_and_comes_back():
    for text in ("call sara", "naïve façade", "打开空调", "صفر", ""):
        assert bytes_text(text_bytes(text)) == text
    assert bytes_text([255, 65]) == "\ufffdA"
