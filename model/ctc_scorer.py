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

from .ctc_prefix import CTCPrefixes, Prefix, TokenBytes, joined
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
        said = self._continued(tokens_R[:, None])
        rows_R = torch.arange(len(tokens_R), device=tokens_R.device)
        for y in range(int(said.lengths_N.max())):
            longer_R = y < said.lengths_N
            rows_N = longer_R.nonzero()[:, 0]
            place_R = torch.where(longer_R, longer_R.cumsum(0) - 1 + len(rows_R), rows_R)
            longer = self.ctc.extend(self.prefix, rows_N, said.bytes_NY[rows_N, y])
            self.prefix = longer if len(rows_N) == len(rows_R) else joined([self.prefix, longer]).of(place_R)
        self.prefix = self.ctc.moved_on(self.prefix)

    def select(self, rows_R: Tensor) -> None:
        """Keep these rows, in this order."""
        self.prefix = self.prefix.of(rows_R)

    def of(self, *proposals: Tensor) -> Tensor:
        """Return gained_RV, float64, -inf for all but the best `candidates` of each proposal and the end token.

        A proposal is log_probs_RV of an LLM: what one of them finds likely is scored, whatever the others say.
        """
        R, V = proposals[0].shape
        likeliest_RV = proposals[0] if len(proposals) == 1 else torch.stack(proposals).amax(0)
        token_RP = likeliest_RV.topk(min(MOST_CTC_CANDIDATES, V), dim=-1).indices
        P, C = token_RP.shape[1], min(self.candidates, token_RP.shape[1])
        begun = self._continued(token_RP)
        begun.spell(2)
        gained_RP = self._gained(token_RP, begun)

        best_RC = torch.cat([self.mixed(p.gather(1, token_RP), gained_RP).topk(C).indices for p in proposals], dim=1)
        whole = begun.of((best_RC + torch.arange(R, device=best_RC.device)[:, None] * P).flatten())
        whole.spell()
        token_RC = token_RP.gather(1, best_RC)
        gained_RV = torch.full((R, V), -math.inf, dtype=torch.float64, device=token_RC.device)
        gained_RV.scatter_(1, token_RC, self._gained(token_RC, whole))
        gained_RV[:, self.end] = self.ctc.whole(self.prefix) - self.prefix.score_R
        return gained_RV

    def mixed(self, llm: Tensor, gained: Tensor) -> Tensor:
        """Return the joint score of an LLM's log-probabilities and what CTC gains, float64."""
        # A prefix that CTC rules out gains nothing in any way; -inf less -inf would be NaN.
        gained = gained.nan_to_num(nan=-math.inf, posinf=0.0, neginf=-math.inf)
        return (1 - self.weight) * llm.double() + self.weight * gained

    def _continued(self, tokens_RN: Tensor) -> "Continuations":
        """Return the rows' prefixes, each about to be continued by the bytes of these tokens."""
        rows_N = torch.arange(len(tokens_RN), device=tokens_RN.device).repeat_interleave(tokens_RN.shape[1])
        tokens_N = tokens_RN.flatten()
        bytes_NY, lengths_N = self.tokens.bytes_VY[tokens_N], self.tokens.lengths_V[tokens_N]
        # A space at the very start of a transcript is not spoken.
        silent_N = (self.prefix.last_R[rows_N] == -1) & self.tokens.starts_with_space_V[tokens_N]
        bytes_NY = torch.where(silent_N[:, None], bytes_NY.roll(-1, dims=1), bytes_NY)
        return Continuations(self.ctc, self.prefix, rows_N, bytes_NY, lengths_N - silent_N.long())

    def _gained(self, tokens_RN: Tensor, spelled: "Continuations") -> Tensor:
        gained_RN = spelled.score_N.view_as(tokens_RN) - self.prefix.score_R[:, None]
        return gained_RN.masked_fill(self.tokens.lengths_V[tokens_RN] == 0, -math.inf)


class Continuations:
    """N byte strings, each a continuation of a prefix, spelled byte by byte.

    They make a tree: those of a prefix that begin alike share a node. To score a byte takes the node before it, and
    nodes are made only when a next byte needs them: most strings' last byte costs no recursion over frames.
    """

    def __init__(self, ctc: CTCPrefixes, prefix: Prefix, rows_N: Tensor, bytes_NY: Tensor, lengths_N: Tensor):
        self.ctc, self.nodes = ctc, prefix
        self.node_N, self.bytes_NY, self.lengths_N = rows_N, bytes_NY, lengths_N
        self.score_N = prefix.score_R[rows_N]  # of what has been spelled
        self.spelled = 0

    def of(self, strings_N: Tensor) -> "Continuations":
        """Return some of the strings, as far as they are spelled."""
        chosen = Continuations(
            self.ctc, self.nodes, self.node_N[strings_N], self.bytes_NY[strings_N], self.lengths_N[strings_N]
        )
        chosen.score_N, chosen.spelled = self.score_N[strings_N], self.spelled
        return chosen

    def spell(self, most: int | None = None) -> None:
        """Score the strings to their ends, or their first bytes, `most` of them."""
        longest = int(self.lengths_N.max())
        for y in range(self.spelled, longest if most is None else min(longest, most)):
            active_N = (y < self.lengths_N).nonzero()[:, 0]
            if y > 0:
                parent_G, byte_G, group_N = self._groups(active_N, y - 1)
                score_G = self.score_N.new_empty(len(parent_G)).index_put((group_N,), self.score_N[active_N])
                self.nodes = self.ctc.extend(self.nodes, parent_G, byte_G, score_N=score_G)
                self.node_N = self.node_N.index_put((active_N,), group_N)
            parent_G, byte_G, group_N = self._groups(active_N, y)
            self.score_N = self.score_N.index_put((active_N,), self.ctc.scores(self.nodes, parent_G, byte_G)[group_N])
            self.spelled = y + 1

    def _groups(self, strings_N: Tensor, y: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the different nodes and bytes number y of these strings, and which of these pairs is string n's."""
        keys_N = self.node_N[strings_N] * 256 + self.bytes_NY[strings_N, y]
        key_G, group_N = torch.unique(keys_N, return_inverse=True)
        return key_G // 256, key_G % 256, group_N


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
