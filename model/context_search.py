"""Joint context search: one hypothesis, heard without the context and read with it (Seed-ASR, equation 1).

A search on a prompt with context copies words from the context that nobody said. Here every utterance with a context
has two prompts, and each step has two opinions on its next token: p0 without context and pc with it. What p0 finds
implausible is out (`context_prune`, `context_top_k`), and only the survivors S are ranked by both, a = alpha/(1+alpha):

    log form   a log pc(v) + (1 - a) log p0(v)        product of experts
    prob form  log(a pc(v) + (1 - a) p0(v))           mixture

Neither is renormalised. All others score -inf, the end token among them. What the repetition guard forbids is out
before that, or it could be the only survivor. Utterances without context are rows like any other and cost nothing more;
all prompts run in one forward pass of the LLM.

With a CTC head of weight w, CTC hears the hypothesis once and belongs to both halves: a token is pruned by the acoustic
score (1 - w) log p0 + w gain, and ranked by (1 - w) form(p0, pc) + w gain. What CTC scores is proposed by p0 and by pc:
a rare name that only the context makes likely gets the chance to be heard. It survives if it was.

Shape letters: R rows of the search, J those with a context, C tokens looked at, V vocabulary.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ctc_scorer import CTCGains
from .decoding import DecodeConfig, StepScorer, forbid_repeats


class ContextPrompt(NamedTuple):
    """An utterance's prompt without context, and the one with it; None: there is no context."""

    plain: Any
    with_context: Any | None


class ContextScorer:
    """A step scorer that asks an LLM's scorer twice about every row whose utterance has a context.

    The rows of `llm` are those of the search, followed by a second one for each of `paired_J`.
    """

    def __init__(self, llm: StepScorer, *, config: DecodeConfig, ctc: CTCGains | None = None):
        self.llm, self.config, self.ctc = llm, config, ctc
        self.paired_J: Tensor
        self.tokens_Rt: Tensor
        self.rows = 0

    def start(self, prefixes: list[ContextPrompt]) -> Tensor:
        self.rows = len(prefixes)
        paired = [row for row, prefix in enumerate(prefixes) if prefix.with_context is not None]
        log_probs = self.llm.start([p.plain for p in prefixes] + [prefixes[row].with_context for row in paired])
        self.paired_J = torch.tensor(paired, dtype=torch.long, device=log_probs.device)
        self.tokens_Rt = self.paired_J.new_empty(self.rows, 0)
        return self._joined(log_probs)

    def step(self, tokens_R: Tensor) -> Tensor:
        if self.ctc is not None:
            self.ctc.step(tokens_R)
        self.tokens_Rt = torch.cat([self.tokens_Rt, tokens_R[:, None]], dim=1)
        return self._joined(self.llm.step(torch.cat([tokens_R, tokens_R[self.paired_J]])))

    def select(self, rows_R: Tensor) -> None:
        if self.ctc is not None:
            self.ctc.select(rows_R)
        second_R = torch.full((self.rows,), -1, device=rows_R.device)
        second_R[self.paired_J] = torch.arange(self.rows, self.rows + len(self.paired_J), device=rows_R.device)
        second_R = second_R[rows_R]
        self.rows, self.paired_J = len(rows_R), (second_R >= 0).nonzero()[:, 0]
        self.tokens_Rt = self.tokens_Rt[rows_R]
        self.llm.select(torch.cat([rows_R, second_R[self.paired_J]]))

    def _joined(self, log_probs: Tensor) -> Tensor:
        """Return the scores_RV of what the LLM says about all rows and then about the paired ones again."""
        plain_RV, context_JV = log_probs[: self.rows], log_probs[self.rows :]
        gained_RV = None
        if self.ctc is None:
            heard_RV = plain_RV
        else:
            proposals = [plain_RV, plain_RV.index_copy(0, self.paired_J, context_JV)] if len(context_JV) else [plain_RV]
            gained_RV = self.ctc.of(*proposals)
            heard_RV = self.ctc.mixed(plain_RV, gained_RV).to(plain_RV.dtype)
        if not len(context_JV):
            return heard_RV
        forbid_repeats(heard_RV, self.tokens_Rt, max_repeats=self.config.max_repeats)
        return heard_RV.index_copy(0, self.paired_J, self._ranked(heard_RV, plain_RV, context_JV, gained_RV))

    def _ranked(self, heard_RV: Tensor, plain_RV: Tensor, context_JV: Tensor, gained_RV: Tensor | None) -> Tensor:
        """Return the paired rows' scores_JV: what survives pruning by `heard_RV`, scored by both halves."""
        config = self.config
        heard_JC, token_JC = self._most_likely(heard_RV[self.paired_J])
        plain_JC, context_JC = plain_RV[self.paired_J[:, None], token_JC], context_JV.gather(1, token_JC)
        score_JC = blend(plain_JC, context_JC, alpha=config.context_alpha, form=config.context_form)
        if self.ctc is not None:
            assert gained_RV is not None
            gained_JC = gained_RV[self.paired_J[:, None], token_JC]
            score_JC = self.ctc.mixed(score_JC, gained_JC).to(score_JC.dtype)
        pruned_JC = heard_JC < heard_JC.amax(-1, keepdim=True) - config.context_prune
        return torch.full_like(context_JV, -math.inf).scatter(1, token_JC, score_JC.masked_fill(pruned_JC, -math.inf))

    def _most_likely(self, heard_JV: Tensor) -> tuple[Tensor, Tensor]:
        """Return the heard_JC of the likeliest tokens, as many as may survive, and which they are."""
        V, top_k = heard_JV.shape[1], self.config.context_top_k
        if top_k:
            return heard_JV.topk(min(max(top_k, self.config.beam_size), V), dim=-1)
        return heard_JV, torch.arange(V, device=heard_JV.device).expand_as(heard_JV)


def blend(plain: Tensor, context: Tensor, *, alpha: float, form: str) -> Tensor:
    """Return the score of log-probabilities without and with context; alpha = inf takes the latter alone."""
    a = 1.0 if math.isinf(alpha) else alpha / (1 + alpha)
    if a in (0.0, 1.0):  # 0 * -inf would be NaN
        return context if a else plain
    if form == "log":
        return a * context + (1 - a) * plain
    return torch.logaddexp(context + math.log(a), plain + math.log(1 - a))
