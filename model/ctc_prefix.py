"""CTC prefix probabilities: how likely is it that what was said begins with these bytes?

A prefix probability sums over all alignments of the bytes so far and everything that may follow (Watanabe et al. 2017,
https://ieeexplore.ieee.org/document/8068205, algorithm 2). How likely a prefix is with one more byte is a sum over its
own frames, so all next bytes are cheap to score; only a prefix that is itself extended needs a recursion over frames.

The recursion is linear, and runs in probabilities: a prefix stores blocks of BLOCK frames, and the logarithm of each
block's scale. Frames far apart may so differ by any factor, as in the log domain, yet nearly all arithmetic is products
and sums; a log-domain recursion takes three times as long. What is e^-700 of a frame next to it counts as nothing.

Of long audio a prefix keeps the WINDOW frames from where it may end onwards, and the window moves along with it: a step
costs the same at five minutes as at eighteen seconds, and all of decoding grows with the length, not with its square.
Audio that fits into one window is computed exactly.

Shape letters: B utterances, T encoder frames, W classes of the CTC head (the last is the blank), R rows of the search,
N = any number of prefixes, C frames of a block, K blocks of a window, H blocks of a hop (what a window moves by), S
hops, M = B W S, Y bytes of the longest token, V vocabulary. Frame t is the C-th row t % C, in block t // C.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

BLOCK = 16  # frames that share a scale
STRIDE = 64  # frames that a window moves by
WINDOW = 7 * STRIDE  # frames of 40 ms that a prefix may end in, and what follows it begin in
NEGLIGIBLE = 50.0  # nats below the likeliest frames: a prefix does not end so early
PAUSE = 25  # frames of certain silence that are kept of a longer one: a window must reach over every pause
IMPOSSIBLE = -1000.0  # a frame, in place of -inf where sums must stay defined
NOWHERE = -1e30  # the scale of a block in which a prefix cannot end, where -inf less -inf would be NaN
CERTAIN = -1e-3  # log probability of a blank from which on silence is certain


class Prefix(NamedTuple):
    """Forward variables of a byte prefix, float64: alignments of frames 0..t that end in its last byte (`on_CRK`) or in
    a blank (`blank_CRK`), both times e^scale; its log prefix probability, its last byte (-1: it is empty), the hop that
    its window starts at, and its utterance."""

    on_CRK: Tensor
    blank_CRK: Tensor
    scale_RK: Tensor
    score_R: Tensor
    last_R: Tensor
    hop_R: Tensor
    utterance_R: Tensor

    def of(self, rows_R: Tensor) -> "Prefix":
        by_frame = (value.index_select(1, rows_R) for value in self[:2])
        return Prefix(*by_frame, *(value[rows_R] for value in self[2:]))


def joined(prefixes: list[Prefix]) -> Prefix:
    """Return the rows of all prefixes, one after the other."""
    by_frame = (torch.cat(values, dim=1) for values in list(zip(*prefixes))[:2])
    return Prefix(*by_frame, *(torch.cat(values) for values in list(zip(*prefixes))[2:]))


class Frames(NamedTuple):
    """The probabilities of one class each over the frames of a window, and the logarithm of each block's product."""

    p_CNK: Tensor
    log_NK: Tensor


class CTCPrefixes:
    """Prefix probabilities of byte strings under the CTC head's output for each utterance.

    `log_probs_BTW` are log-probabilities, in any float type; frames beyond `lengths_B` do not count, whatever they
    hold. Longer audio than `window` frames (rounded up to whole strides) is looked at through windows.
    """

    def __init__(self, log_probs_BTW: Tensor, lengths_B: Tensor, *, window: int = WINDOW):
        log_probs_BTW = log_probs_BTW.double()
        if log_probs_BTW.shape[1] > window:
            log_probs_BTW, lengths_B = without_long_pauses(log_probs_BTW, lengths_B)
        B, T, self.classes = log_probs_BTW.shape
        past_BT = torch.arange(T, device=lengths_B.device) >= lengths_B[:, None]
        # Nothing can be said behind an utterance's end, so padding adds nothing to any sum.
        log_probs_BTW = log_probs_BTW.masked_fill(past_BT[..., None], -math.inf)
        if window >= T:  # one window, and one hop, hold it all
            hop, self.hops_of_window = max(1, -(-T // BLOCK)), 1
            self.hops = 1
        else:  # a window may end in padding
            hop, self.hops_of_window = STRIDE // BLOCK, -(-window // STRIDE)
            self.hops = -(-T // STRIDE) + self.hops_of_window
        log_probs_BTW = nn.functional.pad(log_probs_BTW, (0, 0, 0, self.hops * hop * BLOCK - T), value=-math.inf)
        shape = (B, self.hops, hop, BLOCK, self.classes)
        # By frame of a block first, so that a step of the recursion is one operation on neighbouring numbers.
        self.p_CMH = log_probs_BTW.exp().view(shape).permute(3, 0, 4, 1, 2).reshape(BLOCK, -1, hop)
        log_probs_BTW = log_probs_BTW.clamp_min(IMPOSSIBLE)
        self.log_MH = log_probs_BTW.view(shape).sum(3).permute(0, 3, 1, 2).reshape(-1, hop)
        self.blanks_BT = nn.functional.pad(log_probs_BTW[..., -1].cumsum(-1), (1, 0))  # of the first t frames
        self.lengths_B = lengths_B

    def empty(self) -> Prefix:
        """Return the empty prefix of every utterance: only blanks so far, and certain to be a prefix."""
        utterance_B = torch.arange(len(self.lengths_B), device=self.lengths_B.device)
        none_B, zero_B = utterance_B * 0 - 1, utterance_B * 0
        blanks = self._frames(utterance_B, none_B, zero_B, self.hops_of_window)
        nothing_CBK, scale_BK = torch.zeros_like(blanks.p_CNK), torch.full_like(blanks.log_NK, NOWHERE)
        certain_B = torch.zeros_like(scale_BK[:, 0])
        blank_CBK, scale_BK = _followed(nothing_CBK, scale_BK, blanks, certain_B)
        return Prefix(nothing_CBK, blank_CBK, scale_BK, certain_B, none_B, zero_B, utterance_B)

    def whole(self, prefix: Prefix) -> Tensor:
        """Return the log probability per row that the prefix is all that was said."""
        C, R, K = prefix.on_CRK.shape
        length_R, start_R = self.lengths_B[prefix.utterance_R], self._start(prefix)
        at_R = (length_R - 1 - start_R).clamp(0, C * K - 1)
        row_R = torch.arange(R, device=at_R.device)
        there = at_R % C, row_R, at_R // C
        there_R = (prefix.on_CRK[there] + prefix.blank_CRK[there]).log() + prefix.scale_RK[row_R, at_R // C]
        # Nothing but blanks from the end of the window to that of the utterance.
        blanks_RT = self.blanks_BT[prefix.utterance_R]
        rest_R = blanks_RT.gather(1, length_R[:, None]) - blanks_RT.gather(1, (start_R + at_R + 1)[:, None])
        ended_R = torch.where(length_R > start_R, there_R + rest_R[:, 0], -math.inf)
        # Of no audio at all, nothing was said.
        return torch.where((length_R == 0) & (prefix.last_R == -1), 0.0, ended_R)

    def scores(self, prefix: Prefix, rows_N: Tensor, bytes_N: Tensor) -> Tensor:
        """Return the log prefix probabilities of the prefixes in `rows_N` with one byte appended to each."""
        before_CNK, scale_NK, first_N = self._before(prefix, rows_N, bytes_N)
        frames = self._frames(prefix.utterance_R[rows_N], bytes_N, prefix.hop_R[rows_N], self.hops_of_window)
        return _score(before_CNK, scale_NK, frames, first_N)

    def extend(self, prefix: Prefix, rows_N: Tensor, bytes_N: Tensor, *, score_N: Tensor | None = None) -> Prefix:
        """Return the prefixes in `rows_N` with one byte appended to each. `score_N` are their `scores`, if known."""
        utterance_N, hop_N = prefix.utterance_R[rows_N], prefix.hop_R[rows_N]
        byte = self._frames(utterance_N, bytes_N, hop_N, self.hops_of_window)
        blank = self._frames(utterance_N, torch.full_like(bytes_N, -1), hop_N, self.hops_of_window)
        before_CNK, scale_NK, first_N = self._before(prefix, rows_N, bytes_N)
        if score_N is None:
            score_N = _score(before_CNK, scale_NK, byte, first_N)
        never_N = torch.full_like(first_N, -math.inf)
        states = _last_byte_and_blank(before_CNK, scale_NK, byte, blank, on_N=first_N, blank_N=never_N)
        return Prefix(*states, score_N, bytes_N, hop_N, utterance_N)

    def _before(self, prefix: Prefix, rows_N: Tensor, bytes_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return all alignments that the byte may follow: their scaled probabilities, scales, and before any frame."""
        # A byte may follow any alignment of the prefix, but itself only over a blank.
        both_CRK = torch.cat([prefix.on_CRK + prefix.blank_CRK, prefix.blank_CRK], dim=1)
        last_N = prefix.last_R[rows_N]
        before_CNK = both_CRK.index_select(1, rows_N + len(prefix.last_R) * (last_N == bytes_N))
        first_N = torch.where(last_N == -1, 0.0, -math.inf).to(before_CNK)
        return before_CNK, prefix.scale_RK[rows_N], first_N

    def moved_on(self, prefix: Prefix) -> Prefix:
        """Return the prefixes with windows that begin no more than STRIDE frames before they may first end."""
        if self.hops == 1:
            return prefix  # one window holds it all
        H = self.log_MH.shape[1]
        while True:
            early_R = prefix.scale_RK[:, :H].amax(1) < prefix.scale_RK.amax(1) - NEGLIGIBLE
            ends_R = self._start(prefix) + self.hops_of_window * STRIDE < self.lengths_B[prefix.utterance_R]
            moves_R = early_R & ends_R
            rows_N = moves_R.nonzero()[:, 0]
            if not len(rows_N):
                return prefix
            place_R = torch.where(
                moves_R, moves_R.cumsum(0) - 1 + len(moves_R), torch.arange(len(moves_R), device=rows_N.device)
            )
            prefix = joined([prefix, self._moved(prefix.of(rows_N))]).of(place_R)

    def _moved(self, prefix: Prefix) -> Prefix:
        """Move the windows by a hop: in its new frames a prefix that has ended before is followed by blanks."""
        H, next_R = self.log_MH.shape[1], prefix.hop_R + self.hops_of_window
        byte = self._frames(prefix.utterance_R, prefix.last_R, next_R, 1)
        blank = self._frames(prefix.utterance_R, torch.full_like(prefix.last_R, -1), next_R, 1)
        end_on_R, end_blank_R = prefix.on_CRK[-1, :, -1], prefix.blank_CRK[-1, :, -1]
        nothing_CRH, nowhere_RH = torch.zeros_like(byte.p_CNK), torch.full_like(byte.log_NK, NOWHERE)
        scale_R = prefix.scale_RK[:, -1]
        on_CRH, blank_CRH, scale_RH = _last_byte_and_blank(
            nothing_CRH,
            nowhere_RH,
            byte,
            blank,
            on_N=end_on_R.log() + scale_R,
            blank_N=(end_on_R + end_blank_R).log() + scale_R,
        )
        return prefix._replace(
            on_CRK=torch.cat([prefix.on_CRK[..., H:], on_CRH], dim=2),
            blank_CRK=torch.cat([prefix.blank_CRK[..., H:], blank_CRH], dim=2),
            scale_RK=torch.cat([prefix.scale_RK[:, H:], scale_RH], dim=1),
            hop_R=prefix.hop_R + 1,
        )

    def _start(self, prefix: Prefix) -> Tensor:
        return prefix.hop_R * STRIDE

    def _frames(self, utterance_N: Tensor, classes_N: Tensor, hop_N: Tensor, count: int) -> Frames:
        """Return `count` hops of frames of one class each, from hop `hop_N` on."""
        row_N = (utterance_N * self.classes + classes_N % self.classes) * self.hops + hop_N
        rows = (row_N[:, None] + torch.arange(count, device=row_N.device)).flatten()
        N, K = len(row_N), count * self.log_MH.shape[1]
        return Frames(self.p_CMH.index_select(1, rows).view(BLOCK, N, K), self.log_MH.index_select(0, rows).view(N, K))


def _score(before_CNK: Tensor, scale_NK: Tensor, byte: Frames, first_N: Tensor) -> Tensor:
    """Return log sum_t before_{t-1} byte_t, in which before_{-1} is e^first."""
    within_NK = (before_CNK[:-1] * byte.p_CNK[1:]).sum(0)
    within_NK[:, :-1] += before_CNK[-1, :, :-1] * byte.p_CNK[0, :, 1:]  # into the next block
    return torch.logaddexp((within_NK.log() + scale_NK).logsumexp(1), first_N + byte.p_CNK[0, :, 0].log())


def _last_byte_and_blank(
    before_CNK: Tensor, scale_NK: Tensor, byte: Frames, blank: Frames, *, on_N: Tensor, blank_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the alignments that end in the byte, in a blank after it, and their scale, the largest being 1 in each
    block. What enters before the first frame is e^on and e^blank."""
    on_CNK, on_NK = _followed(before_CNK, scale_NK, byte, on_N)
    blank_CNK, scale_NK = _followed(on_CNK, on_NK, blank, blank_N)
    shrunk_NK = (on_NK - scale_NK).exp()
    largest_NK = torch.maximum(on_CNK.amax(0) * shrunk_NK, blank_CNK.amax(0))
    there_NK = largest_NK > 0
    largest_NK = torch.where(there_NK, largest_NK, 1.0)
    scale_NK = torch.where(there_NK, scale_NK + largest_NK.log(), NOWHERE)
    return on_CNK * (shrunk_NK / largest_NK), blank_CNK / largest_NK, scale_NK


def _followed(entering_CNK: Tensor, scale_NK: Tensor, stay: Frames, first_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return x_t = stay_t (x_{t-1} + entering_{t-1}) and its scale; before the first frame the sum is e^first.

    All blocks run side by side, at first each as if nothing came from the one before it; what they end with is then
    passed on from block to block in logs, and the blocks run once more.
    """
    stays, sum_NK = stay.p_CNK.unbind(), entering_CNK[0]
    for entering, p in zip(entering_CNK[1:].unbind(), stays[1:]):
        sum_NK = torch.addcmul(entering, p, sum_NK)
    total_NK = stay.log_NK.cumsum(1)
    gained_NK = torch.cat([first_N[:, None], (sum_NK.log() + scale_NK - total_NK)[:, :-1]], dim=1)
    from_last_NK = gained_NK.logcumsumexp(1) + nn.functional.pad(total_NK[:, :-1], (1, 0))

    new_scale_NK = torch.maximum(scale_NK, from_last_NK)
    entering_CNK = entering_CNK * (scale_NK - new_scale_NK).exp()
    sums_CNK = torch.empty_like(entering_CNK)
    sums_CNK[0] = (from_last_NK - new_scale_NK).exp()
    for before, entering, p, after in zip(sums_CNK.unbind(), entering_CNK.unbind(), stays, sums_CNK[1:].unbind()):
        torch.addcmul(entering, p, before, out=after)
    return sums_CNK.mul_(stay.p_CNK), new_scale_NK


def without_long_pauses(log_probs_BTW: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the frames without those that continue PAUSE frames of certain silence, and the lengths left."""
    frame_T = torch.arange(log_probs_BTW.shape[1], device=lengths_B.device)
    spoken_BT = torch.where(log_probs_BTW[..., -1] < CERTAIN, frame_T, -1).cummax(1).values
    kept_BT = (frame_T - spoken_BT <= PAUSE) & (frame_T < lengths_B[:, None])
    pieces = [log_probs_TW[kept_T] for log_probs_TW, kept_T in zip(log_probs_BTW, kept_BT)]
    return nn.utils.rnn.pad_sequence(pieces, batch_first=True), kept_BT.sum(1)


class TokenBytes:
    """The bytes of every token, padded: bytes_VY and lengths_V. A special token has none: CTC cannot hear it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, device: torch.device | str = "cpu"):
        spelled = token_bytes(tokenizer)
        spelled += [b""] * (vocab_size - len(spelled))
        longest = max(map(len, spelled))
        self.bytes_VY = torch.tensor([[*s, *[0] * (longest - len(s))] for s in spelled], device=device)
        self.lengths_V = torch.tensor([len(s) for s in spelled], device=device)
        self.starts_with_space_V = torch.tensor([s[:1] == b" " for s in spelled], device=device)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Return the UTF-8 bytes of every token of a byte-level or SentencePiece vocabulary; b"" for special ones."""
    # Added tokens stand as they are written: DeepSeek's `<｜begin▁of▁sentence｜>` does not make it SentencePiece.
    added = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    ordinary = {i: name for i, name in enumerate(names) if i not in added and name is not None}
    table = None if any("▁" in name for name in ordinary.values()) else _byte_level_table()
    return [_bytes_of(ordinary[i], table) if i in ordinary else b"" for i in range(len(names))]


def _bytes_of(name: str, table: dict[str, int] | None) -> bytes:
    if table is not None and all(character in table for character in name):
        return bytes(table[character] for character in name)
    if len(name) == 6 and name.startswith("<0x"):  # SentencePiece's way to write a single byte
        return bytes([int(name[3:5], 16)])
    return name.replace("▁", " ").encode()


def _byte_level_table() -> dict[str, int]:
    """Return byte-level BPE's alphabet: printable bytes stand for themselves, the others for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
