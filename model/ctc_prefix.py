"""Joint decoding with CTC: what the CTC head heard of a hypothesis steers the LLM's search.

The score of a token is (1 - w) log p_LLM + w (log of the CTC's prefix probability with the token, less that without).
A prefix probability sums over all alignments of the bytes so far and everything that may follow (Watanabe et al. 2017,
https://ieeexplore.ieee.org/document/8068205, algorithm 2). It keeps an LLM from running on without listening, and an
LLM that knows the language corrects what CTC misspells. A small LLM gains most; 0 switches it off.

The recursion over frames is linear, so it is two cumulative sums in the log domain for each byte, over all rows,
candidates and frames at once. Not every token is scored: of the tokens that the LLM finds likeliest (400 of them)
CTC looks at the first two bytes, which many of them share; the best `candidates` by that are scored whole. An LLM that
hardly listens does not have the word that was said among its first 20.

Shape letters: B utterances, T encoder frames, W classes of the CTC head (the last is the blank), R rows of the search,
P tokens looked at, C candidates, N = any number of prefixes, Y bytes of the longest token, V vocabulary.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .decoding import MOST_CTC_CANDIDATES, StepScorer


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


class JointScorer:
    """An LLM's scorer and CTC prefixes as one step scorer."""

    def __init__(
        self,
        llm: StepScorer,
        ctc: CTCPrefixes,
        *,
        tokens: TokenBytes,
        end: int,
        weight: float,
        candidates: int,
    ):
        self.llm, self.ctc, self.tokens = llm, ctc, tokens
        self.end, self.weight, self.candidates = end, weight, candidates
        self.prefix = ctc.empty()

    def start(self, prefixes: list[Any]) -> Tensor:
        return self._joined(self.llm.start(prefixes))

    def step(self, tokens_R: Tensor) -> Tensor:
        rows_R = torch.arange(len(tokens_R), device=tokens_R.device)
        bytes_RY, lengths_R = self._spoken(rows_R, tokens_R)
        self.prefix = self._spelled_out(self.prefix, rows_R, bytes_RY, lengths_R, first=0)
        return self._joined(self.llm.step(tokens_R))

    def select(self, rows_R: Tensor) -> None:
        self.llm.select(rows_R)
        self.ctc.select(rows_R)
        self.prefix = self.prefix.of(rows_R)

    def _joined(self, llm_RV: Tensor) -> Tensor:
        """Return the joint scores_RV; -inf for all but the candidates and the end token."""
        R, V = llm_RV.shape
        llm_RP, token_RP = llm_RV.topk(min(MOST_CTC_CANDIDATES, V), dim=-1)
        rows_N = torch.arange(R, device=llm_RV.device).repeat_interleave(token_RP.shape[1])
        bytes_NY, lengths_N = self._spoken(rows_N, token_RP.flatten())
        begun, place_N = self._first_two_bytes(rows_N, bytes_NY, lengths_N)
        gained_RP = (begun.score_R[place_N] - self.prefix.score_R[rows_N]).view_as(llm_RP)
        gained_RP = gained_RP.masked_fill((lengths_N == 0).view_as(gained_RP), -math.inf)
        best_RC = self._mixed(llm_RP, gained_RP).topk(min(self.candidates, llm_RP.shape[1]), dim=-1).indices
        chosen_N = (best_RC + torch.arange(R, device=best_RC.device)[:, None] * llm_RP.shape[1]).flatten()
        whole = self._spelled_out(
            begun.of(place_N[chosen_N]), rows_N[chosen_N], bytes_NY[chosen_N], lengths_N[chosen_N], first=2
        )
        gained_RC = whole.score_R.view_as(best_RC) - self.prefix.score_R[:, None]
        gained_RC = gained_RC.masked_fill((lengths_N[chosen_N] == 0).view_as(best_RC), -math.inf)
        gained_RV = gained_RC.new_full((R, V), -math.inf).scatter(1, token_RP.gather(1, best_RC), gained_RC)
        gained_RV[:, self.end] = self.ctc.whole(self.prefix) - self.prefix.score_R
        return self._mixed(llm_RV, gained_RV).to(llm_RV.dtype)

    def _mixed(self, llm: Tensor, gained: Tensor) -> Tensor:
        # A prefix that CTC rules out gains nothing in any way; -inf less -inf would be NaN.
        gained = gained.nan_to_num(nan=-math.inf, posinf=0.0, neginf=-math.inf)
        return (1 - self.weight) * llm.double() + self.weight * gained

    def _spoken(self, rows_N: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return each token's bytes and how many they are. A space at the very start of a transcript is not spoken."""
        bytes_NY, lengths_N = self.tokens.bytes_VY[tokens_N], self.tokens.lengths_V[tokens_N]
        silent_N = (self.prefix.last_R[rows_N] == -1) & self.tokens.starts_with_space_V[tokens_N]
        bytes_NY = torch.where(silent_N[:, None], bytes_NY.roll(-1, dims=1), bytes_NY)
        return bytes_NY, lengths_N - silent_N.long()

    def _first_two_bytes(self, rows_N: Tensor, bytes_NY: Tensor, lengths_N: Tensor) -> tuple[Prefix, Tensor]:
        """Return the rows' prefixes with the first two bytes of each token, equal ones once, and which is token n's."""
        group_N, prefix, row_G = rows_N, self.prefix, torch.arange(len(self.prefix.last_R), device=rows_N.device)
        for y in range(min(2, bytes_NY.shape[1])):
            # 256 for "no further byte": such a group goes on as it is.
            byte_N = torch.where(y < lengths_N, bytes_NY[:, y], 256)
            key_G, group_N = torch.unique(group_N * 257 + byte_N, return_inverse=True)
            parent_G, byte_G = key_G // 257, key_G % 257
            row_G = row_G[parent_G]
            longer = (byte_G < 256).long()
            prefix = self._spelled_out(prefix.of(parent_G), row_G, byte_G[:, None], longer, first=0)
        return prefix, group_N

    def _spelled_out(
        self, prefix: Prefix, rows_N: Tensor, bytes_NY: Tensor, lengths_N: Tensor, *, first: int
    ) -> Prefix:
        """Return `prefix`, N of the rows `rows_N`, with the bytes from number `first` on appended to each."""
        prefix = Prefix(*(value.clone() for value in prefix))
        for y in range(first, int(lengths_N.max())):
            active = (y < lengths_N).nonzero()[:, 0]
            longer = self.ctc.extend(prefix.of(active), rows_N[active], bytes_NY[active, y])
            for old, new in zip(prefix, longer):
                old[active] = new
        return prefix
