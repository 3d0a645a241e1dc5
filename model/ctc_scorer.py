"""Joint decoding with CTC: what the CTC head heard of a hypothesis steers the LLM's search.

The score of a token is (1 - w) log p_LLM + w (log of the CTC's prefix probability with the token, less that without).
It keeps an LLM from running on without listening, and an LLM that knows the language corrects what CTC misspells. A
small LLM gains most; 0 switches it off.

Not every token is scored: of the tokens that the LLM finds likeliest (400 of them) CTC looks at the first two bytes,
which many of them share; the best `candidates` by that are scored whole. An LLM that hardly listens does not have the
word that was said among its first 20.

Shape letters: R rows of the search, P tokens looked at, C candidates, N = any number of prefixes, G groups of them, Y
bytes of the longest token, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .ctc_prefix import CTCPrefixes, Prefix, TokenBytes
from .decoding import MOST_CTC_CANDIDATES, StepScorer


class CTCGains:
    """What CTC gains or loses by each next token. It follows the rows of a search, and whatever scores them may ask.

    `weight` is CTC's share of a score. The end token is always scored, and a token without bytes never.
    """

    def __init__(self, ctc: CTCPrefixes, *, tokens: TokenBytes, end: int, weight: float, candidates: int):
        self.ctc, self.tokens = ctc, tokens
        self.end, self.weight, self.candidates = end, weight, candidates
        self.prefix = ctc.empty()

    def step(self, tokens_R: Tensor) -> None:
        """Append one token to every row."""
        rows_R = torch.arange(len(tokens_R), device=tokens_R.device)
        bytes_RY, lengths_R = self._spoken(rows_R, tokens_R)
        self.prefix = self.ctc.moved_on(self._spelled_out(self.prefix, rows_R, bytes_RY, lengths_R, first=0))

    def select(self, rows_R: Tensor) -> None:
        """Keep these rows, in this order."""
        self.ctc.select(rows_R)
        self.prefix = self.prefix.of(rows_R)

    def of(self, *proposals: Tensor) -> Tensor:
        """Return gained_RV, float64, -inf for all but the best `candidates` of each proposal and the end token.

        A proposal is log_probs_RV of an LLM: what one of them finds likely is scored, whatever the others say.
        """
        R, V = proposals[0].shape
        likeliest_RV = proposals[0] if len(proposals) == 1 else torch.stack(proposals).amax(0)
        token_RP = likeliest_RV.topk(min(MOST_CTC_CANDIDATES, V), dim=-1).indices
        rows_N = torch.arange(R, device=token_RP.device).repeat_interleave(token_RP.shape[1])
        bytes_NY, lengths_N = self._spoken(rows_N, token_RP.flatten())
        begun, place_N = self._first_two_bytes(rows_N, bytes_NY, lengths_N)
        gained_RP = (begun.score_R[place_N] - self.prefix.score_R[rows_N]).view_as(token_RP)
        gained_RP = gained_RP.masked_fill(self.tokens.lengths_V[token_RP] == 0, -math.inf)

        C = min(self.candidates, token_RP.shape[1])
        best_RC = torch.cat([self.mixed(p.gather(1, token_RP), gained_RP).topk(C).indices for p in proposals], dim=1)
        chosen_N = (best_RC + torch.arange(R, device=best_RC.device)[:, None] * token_RP.shape[1]).flatten()
        whole = self._spelled_out(
            begun.of(place_N[chosen_N]), rows_N[chosen_N], bytes_NY[chosen_N], lengths_N[chosen_N], first=2
        )
        gained_RC = whole.score_R.view_as(best_RC) - self.prefix.score_R[:, None]
        token_RC = token_RP.gather(1, best_RC)
        gained_RC = gained_RC.masked_fill(self.tokens.lengths_V[token_RC] == 0, -math.inf)
        gained_RV = gained_RC.new_full((R, V), -math.inf).scatter(1, token_RC, gained_RC)
        gained_RV[:, self.end] = self.ctc.whole(self.prefix) - self.prefix.score_R
        return gained_RV

    def mixed(self, llm: Tensor, gained: Tensor) -> Tensor:
        """Return the joint score of an LLM's log-probabilities and what CTC gains, float64."""
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


class CTCScorer:
    """An LLM's scorer and the CTC head's gains as one step scorer."""

    def __init__(self, llm: StepScorer, ctc: CTCGains):
        self.llm, self.ctc = llm, ctc

    def start(self, prefixes: list[Any]) -> Tensor:
        return self._joined(self.llm.start(prefixes))

    def step(self, tokens_R: Tensor) -> Tensor:
        self.ctc.step(tokens_R)
        return self._joined(self.llm.step(tokens_R))

    def select(self, rows_R: Tensor) -> None:
        self.llm.select(rows_R)
        self.ctc.select(rows_R)

    def _joined(self, llm_RV: Tensor) -> Tensor:
        return self.ctc.mixed(llm_RV, self.ctc.of(llm_RV)).to(llm_RV.dtype)
