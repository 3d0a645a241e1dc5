"""CTC prefix probabilities: how likely is it that what was said begins with these bytes?

A prefix probability sums over all alignments of the bytes so far and everything that may follow (Watanabe et al. 2017,
https://ieeexplore.ieee.org/document/8068205, algorithm 2). The recursion over frames is linear, so it is two cumulative
sums in the log domain for each byte, over all rows, candidates and frames at once.

Shape letters: B utterances, T encoder frames, W classes of the CTC head (the last is the blank), R rows of the search,
N = any number of prefixes, Y bytes of the longest token, V vocabulary.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


class Prefix(NamedTuple):
    """Forward variables of a byte prefix, log domain, float64: alignments of frames 0..t that end in its last byte
    (`on_RT`) or in a blank (`blank_RT`), its prefix probability, and its last byte (-1: it is empty)."""

    on_RT: Tensor
    blank_RT: Tensor
    score_R: Tensor
    last_R: Tensor

    def of(self, rows_R: Tensor) -> "Prefix":
        return Prefix(*(value[rows_R] for value in self))


class CTCPrefixes:
    """Prefix probabilities of byte strings under the CTC head's output for each row's utterance."""

    def __init__(self, log_probs_BTW: Tensor, lengths_B: Tensor):
        log_probs_BTW = log_probs_BTW.double()
        T = log_probs_BTW.shape[1]
        past_BT = torch.arange(T, device=lengths_B.device) >= lengths_B[:, None]
        # Nothing can be said behind an utterance's end, so padding adds nothing to any sum.
        log_probs_BTW = log_probs_BTW.masked_fill(past_BT[..., None], -math.inf)
        # By class first: what is looked up is always one class over all frames. A row is an utterance, by number.
        self.log_probs_BWT = log_probs_BTW.transpose(1, 2).contiguous()
        self.last_frame_B = lengths_B - 1
        self.utterance_R = torch.arange(len(lengths_B), device=lengths_B.device)

    def select(self, rows_R: Tensor) -> None:
        self.utterance_R = self.utterance_R[rows_R]

    def empty(self) -> Prefix:
        """Return the empty prefix of every row: only blanks so far, and certain to be a prefix."""
        blank_RT = self.log_probs_BWT[self.utterance_R, -1].cumsum(-1)
        none_RT = torch.full_like(blank_RT, -math.inf)
        return Prefix(none_RT, blank_RT, torch.zeros_like(blank_RT[:, 0]), torch.full_like(blank_RT[:, 0], -1).long())

    def whole(self, prefix: Prefix) -> Tensor:
        """Return the log probability per row that the prefix is all that was said."""
        return torch.logaddexp(prefix.on_RT, prefix.blank_RT).gather(1, self.last_frame_B[self.utterance_R, None])[:, 0]

    def extend(self, prefix: Prefix, rows_N: Tensor, bytes_N: Tensor) -> Prefix:
        """Return `prefix` (N of them, of the rows `rows_N`) with one byte appended to each."""
        byte_NT = self.log_probs_BWT[self.utterance_R[rows_N], bytes_N]
        blank_NT = self.log_probs_BWT[self.utterance_R[rows_N], -1]
        # A byte may follow any alignment of the prefix, but itself only over a blank.
        on_NT = prefix.on_RT.masked_fill((prefix.last_R == bytes_N)[:, None], -math.inf)
        before_NT = torch.logaddexp(prefix.blank_RT, on_NT)
        first_N1 = torch.where(prefix.last_R == -1, 0.0, -math.inf)[:, None].to(before_NT)
        before_NT = torch.cat([first_N1, before_NT[:, :-1]], dim=1)
        new_on_NT = _decay(before_NT, byte_NT)
        entered_NT = torch.cat([torch.full_like(first_N1, -math.inf), new_on_NT[:, :-1]], dim=1)
        return Prefix(
            on_RT=new_on_NT,
            blank_RT=_decay(entered_NT, blank_NT),
            score_R=(before_NT + byte_NT).logsumexp(-1),
            last_R=bytes_N,
        )


def _decay(entering_NT: Tensor, stay_NT: Tensor) -> Tensor:
    """Return x_t = stay_t (x_{t-1} + entering_t), all in logs: what enters at s is worth the product of stay_s..t."""
    # A certain impossibility (-inf) would make the sum below undefined; e^-1000 a frame is as impossible in float64.
    total_NT = stay_NT.clamp_min(-1000.0).cumsum(-1)
    shifted_NT = torch.nn.functional.pad(total_NT[:, :-1], (1, 0))
    return torch.logcumsumexp(entering_NT - shifted_NT, dim=-1) + total_NT


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
