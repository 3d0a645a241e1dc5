"""Windows of long audio: the prefix probabilities of all frames, at a cost that does not grow with them."""

import math

import pytest
import torch

from seedling.model.ctc_prefix import PAUSE, STRIDE, CTCPrefixes, without_long_pauses

W = 6  # five "bytes" and the blank


def spoken(*, seed: int, frames: int, pauses: dict[int, int] | None = None) -> tuple[torch.Tensor, list[int]]:
    """Return log_probs_TW of a head that is fairly sure of a random string of about frames / 4 bytes, and the string.

    `pauses` are {frame: frames of certain silence there}.
    """
    generator = torch.Generator().manual_seed(seed)
    logits_TW = 1.5 * torch.randn(frames, W, generator=generator)
    string, at = [], 1
    while at < frames - 1:
        string.append(int(torch.randint(W - 1, (), generator=generator)))
        logits_TW[at, string[-1]] += 7.0
        gap = int(torch.randint(2, 6, (), generator=generator))
        logits_TW[at + 1 : at + gap, -1] += 6.0
        at += gap
    pieces, before = [], 0
    silence_W = torch.tensor([-12.0] * (W - 1) + [0.0])
    for at, length in sorted((pauses or {}).items()):
        pieces += [logits_TW[before:at], silence_W.expand(length, W)]
        before = at
    return torch.cat([*pieces, logits_TW[before:]]).log_softmax(-1), string


def scores(ctc: CTCPrefixes, string: list[int]) -> list[list[float]]:
    """Return the score of every next byte along the string and, in the last place, of its end."""
    row, found = torch.zeros(1, dtype=torch.long), []
    prefix = ctc.empty()
    for byte in string:
        nexts = ctc.extend(prefix.of(row.expand(W - 1)), row.expand(W - 1), torch.arange(W - 1))
        found.append([*(nexts.score_R - prefix.score_R).tolist(), (ctc.whole(prefix) - prefix.score_R).item()])
        prefix = ctc.moved_on(ctc.extend(prefix, row, torch.tensor([byte])))
    found.append([(ctc.whole(prefix) - prefix.score_R).item()])
    return found


def assert_alike(found: list[list[float]], wanted: list[list[float]]) -> None:
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        for value, exact in zip(ours, theirs):
            # What is a hundred nats away is never chosen, and a window need not know how far away it is.
            assert value == pytest.approx(exact, abs=1e-3) or max(value, exact) < -30, (step, ours, theirs)


@pytest.mark.parametrize("seed", [0, 1])
def test_windows_give_the_scores_of_all_frames(seed):
    log_probs_TW, string = spoken(seed=seed, frames=900)
    given = log_probs_TW[None], torch.tensor([900])
    whole, windows = CTCPrefixes(*given, window=900), CTCPrefixes(*given, window=200)
    assert_alike(scores(windows, string), scores(whole, string))


def test_a_pause_longer_than_a_window_is_reached_over():
    log_probs_TW, string = spoken(seed=3, frames=400, pauses={150: 500, 300: 700})
    given = log_probs_TW[None], torch.tensor([1600])
    whole, windows = CTCPrefixes(*given, window=1600), CTCPrefixes(*given, window=200)
    for byte, ours, theirs in zip(string, scores(windows, string), scores(whole, string)):
        # Bytes that nobody said lose what noise would have given them in the frames left out; those said lose nothing.
        assert ours[byte] == pytest.approx(theirs[byte], abs=0.05)
        assert all(a < b + 0.05 for a, b in zip(ours, theirs))


def test_of_a_pause_a_second_is_kept():
    log_probs_TW, _ = spoken(seed=3, frames=40, pauses={20: 200})
    batch_BTW = torch.stack([log_probs_TW, log_probs_TW])
    kept_BTW, lengths_B = without_long_pauses(batch_BTW, torch.tensor([240, 120]))
    assert lengths_B[0] <= 40 + PAUSE and lengths_B[1] <= 20 + PAUSE
    assert torch.equal(kept_BTW[0, :20], log_probs_TW[:20]) and torch.equal(kept_BTW[0, -20:], log_probs_TW[-20:])


def test_rows_move_on_their_own_and_what_fits_a_window_is_exact():
    long_TW, string = spoken(seed=5, frames=600)
    short_TW, other = spoken(seed=6, frames=100)
    batch_BTW = torch.stack([long_TW, torch.nn.functional.pad(short_TW, (0, 0, 0, 500))])
    ctc = CTCPrefixes(batch_BTW, torch.tensor([600, 100]), window=200)
    alone = CTCPrefixes(short_TW[None], torch.tensor([100]))
    prefix, one, rows = ctc.empty(), alone.empty(), torch.arange(2)
    for a, b in zip(string, other):
        prefix = ctc.moved_on(ctc.extend(prefix, rows, torch.tensor([a, b])))
        one = alone.extend(one, rows[:1], torch.tensor([b]))
    assert prefix.score_R[1].item() == pytest.approx(one.score_R[0].item())
    assert ctc.whole(prefix)[1].item() == pytest.approx(alone.whole(one)[0].item())
    assert prefix.hop_R[1] == 0
    prefix = prefix.of(rows[:1])
    for a in string[len(other) :]:
        prefix = ctc.moved_on(ctc.extend(prefix, rows[:1], torch.tensor([a])))
        assert prefix.on_CRK.shape == (16, 1, 256 // 16)
    assert prefix.hop_R[0] * STRIDE >= 600 - 256 - STRIDE
    assert math.isfinite(ctc.whole(prefix)[0].item())
