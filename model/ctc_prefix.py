"""CTC prefix probabilities: how likely is it that what was said begins with these bytes?

A prefix probability sums over all alignments of the bytes so far and everything that may follow (Watanabe et al. 2017,
https://ieeexplore.ieee.org/document/8068205, algorithm 2). The recursion over frames is linear, so it is two cumulative
sums in the log domain for each byte, over all rows, candidates and frames at once.

Of long audio a prefix keeps the WINDOW frames from where it may end onwards, and the window moves along with it: a step
costs the same at five minutes as at sixteen seconds, and all of decoding grows with the length, not with its square.
Audio that fits into one window is computed exactly.

Shape letters: B utterances, T encoder frames, W classes of the CTC head (the last is the blank), R rows of the search,
N = any number of prefixes, F frames of a window, Y bytes of the longest token, V vocabulary.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

WINDOW = 400  # frames of 40 ms that a prefix may end in, and what follows it begin in
STRIDE = 64  # frames that a window moves by
NEGLIGIBLE = 50.0  # nats below the likeliest frame: a prefix does not end so early
PAUSE = 25  # frames of certain silence that are kept of a longer one: a window must reach over every pause
IMPOSSIBLE = -1000.0  # a frame, in place of -inf where sums must stay defined
CERTAIN = -1e-3  # log probability of a blank from which on silence is certain


class Prefix(NamedTuple):
    """Forward variables of a byte prefix, log domain, float64: alignments of frames 0..t that end in its last byte
    (`on_RF`) or in a blank (`blank_RF`), its prefix probability, its last byte (-1: it is empty), and the frame that
    its window starts at."""

    on_RF: Tensor
    blank_RF: Tensor
    score_R: Tensor
    last_R: Tensor
    start_R: Tensor

    def of(self, rows_R: Tensor) -> "Prefix":
        return Prefix(*(value[rows_R] for value in self))


class CTCPrefixes:
    """Prefix probabilities of byte strings under the CTC head's output for each row's utterance."""

    def __init__(self, log_probs_BTW: Tensor, lengths_B: Tensor, *, window: int = WINDOW):
        log_probs_BTW = log_probs_BTW.double()
        if log_probs_BTW.shape[1] > window:
            log_probs_BTW, lengths_B = without_long_pauses(log_probs_BTW, lengths_B)
        T = log_probs_BTW.shape[1]
        self.window = min(window, T)
        past_BT = torch.arange(T, device=lengths_B.device) >= lengths_B[:, None]
        # Nothing can be said behind an utterance's end, so padding adds nothing to any sum.
        log_probs_BTW = log_probs_BTW.masked_fill(past_BT[..., None], -math.inf)
        # By class first: what is looked up is always one class over neighbouring frames. A window may end in padding.
        log_probs_BWT = log_probs_BTW.transpose(1, 2).contiguous()
        if self.window < T:
            log_probs_BWT = nn.functional.pad(log_probs_BWT, (0, self.window + STRIDE), value=-math.inf)
        self.log_probs_BWT = log_probs_BWT
        self.blanks_BT = log_probs_BWT[:, -1].clamp_min(IMPOSSIBLE).cumsum(-1)
        self.last_frame_B = lengths_B - 1
        self.utterance_R = torch.arange(len(lengths_B), device=lengths_B.device)

    def select(self, rows_R: Tensor) -> None:
        self.utterance_R = self.utterance_R[rows_R]

    def empty(self) -> Prefix:
        """Return the empty prefix of every row: only blanks so far, and certain to be a prefix."""
        blank_RF = self.log_probs_BWT[self.utterance_R, -1, : self.window].cumsum(-1)
        none_RF, zero_R = torch.full_like(blank_RF, -math.inf), torch.zeros_like(blank_RF[:, 0])
        return Prefix(none_RF, blank_RF, zero_R, zero_R.long() - 1, zero_R.long())

    def whole(self, prefix: Prefix) -> Tensor:
        """Return the log probability per row that the prefix is all that was said."""
        last_R = self.last_frame_B[self.utterance_R]
        at_R = (last_R - prefix.start_R).clamp(0, self.window - 1)
        there_R = torch.logaddexp(prefix.on_RF, prefix.blank_RF).gather(1, at_R[:, None])[:, 0]
        # Nothing but blanks from the end of the window to that of the utterance.
        blanks_RT = self.blanks_BT[self.utterance_R]
        rest_R = blanks_RT.gather(1, last_R[:, None]) - blanks_RT.gather(1, (prefix.start_R + at_R)[:, None])
        return torch.where(last_R >= prefix.start_R, there_R + rest_R[:, 0], -math.inf)

    def extend(self, prefix: Prefix, rows_N: Tensor, bytes_N: Tensor) -> Prefix:
        """Return `prefix` (N of them, of the rows `rows_N`) with one byte appended to each."""
        byte_NF = self._frames(rows_N, bytes_N, prefix.start_R, self.window)
        blank_NF = self._frames(rows_N, torch.full_like(bytes_N, -1), prefix.start_R, self.window)
        # A byte may follow any alignment of the prefix, but itself only over a blank.
        on_NF = prefix.on_RF.masked_fill((prefix.last_R == bytes_N)[:, None], -math.inf)
        before_NF = torch.logaddexp(prefix.blank_RF, on_NF)
        first_N1 = torch.where(prefix.last_R == -1, 0.0, -math.inf)[:, None].to(before_NF)
        before_NF = torch.cat([first_N1, before_NF[:, :-1]], dim=1)
        new_on_NF = _decay(before_NF, byte_NF)
        entered_NF = torch.cat([torch.full_like(first_N1, -math.inf), new_on_NF[:, :-1]], dim=1)
        return Prefix(
            on_RF=new_on_NF,
            blank_RF=_decay(entered_NF, blank_NF),
            score_R=(before_NF + byte_NF).logsumexp(-1),
            last_R=bytes_N,
            start_R=prefix.start_R,
        )

    def moved_on(self, prefix: Prefix) -> Prefix:
        """Return the rows' prefixes with windows that begin no more than STRIDE frames before they may first end."""
        if self.window + STRIDE >= self.log_probs_BWT.shape[-1]:
            return prefix  # one window holds it all
        while True:
            mass_RF = torch.logaddexp(prefix.on_RF, prefix.blank_RF)
            early_RF = mass_RF[:, :STRIDE] < mass_RF.amax(1, keepdim=True) - NEGLIGIBLE
            ends_R = prefix.start_R + self.window <= self.last_frame_B[self.utterance_R]
            rows_N = (early_RF.all(1) & ends_R).nonzero()[:, 0]
            if not len(rows_N):
                return prefix
            prefix = self._moved(prefix, rows_N)

    def _moved(self, prefix: Prefix, rows_N: Tensor) -> Prefix:
        """Move the windows of these rows: in its new frames a prefix that has ended before is followed by blanks."""
        old = prefix.of(rows_N)
        end_N = old.start_R + self.window
        byte_NS = self._frames(rows_N, old.last_R, end_N, STRIDE)
        blank_NS = self._frames(rows_N, torch.full_like(old.last_R, -1), end_N, STRIDE)
        on_NS = old.on_RF[:, -1:] + byte_NS.cumsum(-1)
        ended_N1 = torch.logaddexp(old.on_RF[:, -1:], old.blank_RF[:, -1:])
        blank_NS = _decay(torch.cat([ended_N1, on_NS[:, :-1]], dim=1), blank_NS)
        on_RF, blank_RF, start_R = prefix.on_RF.clone(), prefix.blank_RF.clone(), prefix.start_R.clone()
        on_RF[rows_N] = torch.cat([old.on_RF[:, STRIDE:], on_NS], dim=1)
        blank_RF[rows_N] = torch.cat([old.blank_RF[:, STRIDE:], blank_NS], dim=1)
        start_R[rows_N] += STRIDE
        return prefix._replace(on_RF=on_RF, blank_RF=blank_RF, start_R=start_R)

    def _frames(self, rows_N: Tensor, classes_N: Tensor, start_N: Tensor, count: int) -> Tensor:
        """Return the log probabilities [N, count] of one class each, from frame `start_N` on."""
        if self.window == self.log_probs_BWT.shape[-1]:
            return self.log_probs_BWT[self.utterance_R[rows_N], classes_N]
        frames_NF = start_N[:, None] + torch.arange(count, device=start_N.device)
        return self.log_probs_BWT[self.utterance_R[rows_N, None], classes_N[:, None], frames_NF]


def _decay(entering_NF: Tensor, stay_NF: Tensor) -> Tensor:
    """Return x_t = stay_t (x_{t-1} + entering_t), all in logs: what enters at s is worth the product of stay_s..t."""
    # A certain impossibility (-inf) would make the sum below undefined; e^-1000 a frame is as impossible in float64.
    total_NF = stay_NF.clamp_min(IMPOSSIBLE).cumsum(-1)
    shifted_NF = nn.functional.pad(total_NF[:, :-1], (1, 0))
    return torch.logcumsumexp(entering_NF - shifted_NF, dim=-1) + total_NF


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
