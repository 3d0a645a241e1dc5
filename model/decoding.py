"""Decoding: greedy and beam search over a step scorer, batched, with N-best lists.

Beam search follows `transformers.generate(num_beams=K)` for a batch of one: the same candidates, length penalty and
rules for stopping. Here every utterance keeps its own books, so that what it gets does not depend on the batch, and it
leaves the batch, cache included, as soon as it is done.

A step scorer is all that the search sees: an LLM (model/llm_scorer.py), one with a CTC head (model/ctc_scorer.py), one
with and without context at once (model/context_search.py). A scorer may forbid a token by -inf: it is never emitted.
Shape letters: B utterances, A those still running, K beams, R rows of the scorer, T the largest limit, t tokens so far,
C candidates, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

# When is a full N-best list final? "likely": no running beam would beat the worst of it at its present length
# (early_stopping=False in transformers). "first": at once (True). "never": none could, at any length up to the limit.
Stop = Literal["likely", "first", "never"]
ContextSearch = Literal["joint", "plain"]
ContextForm = Literal["log", "prob"]
MOST_CTC_CANDIDATES = 400  # as many tokens as CTC looks at (model/ctc_scorer.py)
LONGEST_PHRASE = 16  # tokens of a phrase that the repetition guard looks for


@dataclass
class DecodeConfig:
    """An utterance gets min(max_new_tokens, seconds * max_tokens_per_second + extra_tokens) tokens, end token included.

    The bound by seconds keeps silence and noise from growing into pages of text; `max_new_tokens` 0 leaves it to them
    alone, so that long audio has a long text. `length_penalty` ranks finished beams
    by score / tokens ** length_penalty, as in transformers: 0 ranks by probability, above it favours longer ones.
    `max_repeats` = n forbids a phrase of up to 16 tokens to come more than n times in a row; 0 allows anything.
    `ctc_weight` is the CTC head's share of every token's score, for `ctc_candidates` tokens at each step
    (model/ctc_scorer.py). 0 leaves CTC out, and then the score is the LLM's log-probability alone.

    An utterance with a context is searched by both prompts at once, "joint" (model/context_search.py), or by the one
    with context alone, "plain". `context_alpha` weighs context against speech: 0 ignores it, inf trusts it alone.
    Tokens more than `context_prune` nats (inf: any) below the best one without context are out, and so are all but
    the best `context_top_k` (0: any number; never fewer than there are beams).
    """

    beam_size: int = 1
    nbest: int = 1
    max_new_tokens: int = 0
    max_tokens_per_second: float = 25.0
    extra_tokens: int = 10
    length_penalty: float = 1.0
    stop: str = "likely"
    max_repeats: int = 0
    ctc_weight: float = 0.0
    ctc_candidates: int = 20
    context_search: str = "joint"
    context_alpha: float = 1.0
    context_prune: float = 6.0
    context_top_k: int = 20
    context_form: str = "log"

    def __post_init__(self):
        if not 1 <= self.nbest <= self.beam_size:
            raise ValueError(f"decode.nbest ({self.nbest}) must lie within 1 and decode.beam_size ({self.beam_size})")
        if self.max_new_tokens < 0:
            raise ValueError(
                f"decode.max_new_tokens ({self.max_new_tokens}) must be at least 1, or 0 for no such bound"
            )
        if not 0 <= self.ctc_weight < 1:
            raise ValueError(f"decode.ctc_weight ({self.ctc_weight}) must be at least 0 and below 1")
        if self.ctc_weight and not self.beam_size <= self.ctc_candidates <= MOST_CTC_CANDIDATES:
            raise ValueError(
                f"decode.ctc_candidates ({self.ctc_candidates}) must be at least decode.beam_size ({self.beam_size}) "
                f"and at most {MOST_CTC_CANDIDATES}"
            )
        choices = {"stop": Stop, "context_search": ContextSearch, "context_form": ContextForm}
        for name, choice in choices.items():
            if getattr(self, name) not in choice.__args__:
                raise ValueError(f"decode.{name} ({getattr(self, name)!r}) must be one of {', '.join(choice.__args__)}")
        for name in ("context_alpha", "context_prune"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"decode.{name} ({getattr(self, name)}) must be 0 or more; inf is allowed")
        if self.context_top_k < 0:
            raise ValueError(f"decode.context_top_k ({self.context_top_k}) must be at least 1, or 0 for any number")

    def limit(self, *, seconds: float) -> int:
        """Return the most tokens that an utterance of so many seconds may have."""
        by_seconds = math.ceil(seconds * self.max_tokens_per_second) + self.extra_tokens
        return max(1, min(self.max_new_tokens or by_seconds, by_seconds))


@dataclass
class Hypothesis:
    """One transcript. `score` is the sum of its tokens' scores, the end token's among them: log-probabilities of the
    LLM, or their mean with CTC's by `ctc_weight`."""

    ids: list[int] = field(default_factory=list)  # without the end token
    score: float = 0.0
    rank_score: float = 0.0  # score / tokens ** length_penalty, by which the N-best list is sorted
    complete: bool = True  # False: cut off at its limit, or nothing may follow; there is no end token
    token_scores: list[float] = field(default_factory=list)  # of each token and the end token, where they were noted


class StepScorer(Protocol):
    """Scores of the next token for a set of rows, each an utterance or a beam of one: log-probabilities, or sums of
    them; -inf forbids a token."""

    def start(self, prefixes: list[Any]) -> Tensor:
        """Begin with one row per prefix; return scores_RV of its first token."""
        ...

    def step(self, tokens_R: Tensor) -> Tensor:
        """Append one token to every row; return scores_RV of the next one."""
        ...

    def select(self, rows_R: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        ...


@torch.no_grad()
def decode(
    scorer: StepScorer, prefixes: list[Any], *, limits: list[int], end: int, config: DecodeConfig
) -> list[list[Hypothesis]]:
    """Return the N-best hypotheses of every prefix, best first. `limits` are in tokens, the end token included."""
    if not prefixes:
        return []
    if config.beam_size == 1:
        return greedy(scorer, prefixes, limits=limits, end=end, config=config)
    return beam_search(scorer, prefixes, limits=limits, end=end, config=config)


def greedy(
    scorer: StepScorer, prefixes: list[Any], *, limits: list[int], end: int, config: DecodeConfig
) -> list[list[Hypothesis]]:
    """Take the likeliest token at every step."""

    def likeliest(log_probs_AV: Tensor, tokens_At: Tensor, running: list[int]) -> Tensor:
        forbid_repeats(log_probs_AV, tokens_At, max_repeats=config.max_repeats)
        return log_probs_AV.argmax(-1)

    log_probs_RV, length_penalty = scorer.start(prefixes), config.length_penalty
    found = roll_out(scorer, log_probs_RV, limits=limits, end=end, choose=likeliest, length_penalty=length_penalty)
    return [[best] for best in found]


def roll_out(
    scorer: StepScorer,
    log_probs_RV: Tensor,
    *,
    limits: list[int],
    end: int,
    choose: Callable[[Tensor, Tensor, list[int]], Tensor],
    length_penalty: float,
) -> list[Hypothesis]:
    """Extend every row until the end token, its limit, or a step in which no token is allowed.

    `log_probs_RV` are of the first token. `choose(log_probs_AV, tokens_At, running)` returns the next token of the A
    rows that run, `running` of the R; it may forbid more of them by setting -inf.
    """
    log_probs_AV, running = log_probs_RV, list(range(len(log_probs_RV)))
    limit_A = torch.tensor(limits, device=log_probs_AV.device)
    score_A = log_probs_AV.new_zeros(len(running))
    tokens_At = limit_A.new_empty(len(running), 0)
    found = [Hypothesis() for _ in running]
    while True:
        token_A = choose(log_probs_AV, tokens_At, running)
        gained_A = log_probs_AV.gather(1, token_A[:, None])[:, 0]
        stuck_A = gained_A == -math.inf
        score_A, tokens_At = score_A + gained_A.masked_fill(stuck_A, 0.0), torch.cat([tokens_At, token_A[:, None]], 1)
        over_A = (token_A == end) | (tokens_At.shape[1] >= limit_A) | stuck_A
        over = over_A.tolist()
        if any(over):
            rows = [row for row, is_over in enumerate(over) if is_over]
            stuck, scores = stuck_A[over_A].tolist(), score_A[over_A].tolist()
            for row, tokens, score, is_stuck in zip(rows, tokens_At[over_A].tolist(), scores, stuck):
                said = tokens[:-1] if is_stuck else tokens
                found[running[row]] = hypothesis(said, score, end=end, length_penalty=length_penalty)
            running = [row for row, is_over in zip(running, over) if not is_over]
            if not running:
                return found
            keep_A = (~over_A).nonzero()[:, 0]
            scorer.select(keep_A)
            limit_A, score_A, tokens_At, token_A = (x[keep_A] for x in (limit_A, score_A, tokens_At, token_A))
        log_probs_AV = scorer.step(token_A)


def hypothesis(tokens: list[int], score: float, *, end: int, length_penalty: float) -> Hypothesis:
    """Return the hypothesis of a token sequence that may close with the end token."""
    complete = tokens[-1:] == [end]
    return Hypothesis(
        ids=tokens[:-1] if complete else tokens,
        score=score,
        rank_score=score / max(len(tokens), 1) ** length_penalty,
        complete=complete,
    )


class Beams(NamedTuple):
    """The books of beam search for the A utterances that run. Empty places score -inf."""

    tokens_AKt: Tensor
    score_AK: Tensor
    limit_A: Tensor
    done_AKT: Tensor  # finished hypotheses, T = the largest limit, filled up with -1
    done_score_AK: Tensor
    done_rank_AK: Tensor  # -inf marks a place that no hypothesis has taken

    def of(self, rows_A: Tensor) -> "Beams":
        """Return the books of these utterances alone."""
        return Beams(*(value[rows_A] for value in self))


def beam_search(
    scorer: StepScorer, prefixes: list[Any], *, limits: list[int], end: int, config: DecodeConfig
) -> list[list[Hypothesis]]:
    """Keep the K best unfinished beams of every utterance, and its K best finished hypotheses.

    Where no token may follow any beam and nothing has finished, the beams as they stand are the hypotheses.
    """
    K = config.beam_size
    log_probs_RV = scorer.start(prefixes)
    running = list(range(len(prefixes)))
    beams = _first_beams(len(prefixes), limits, config, like=log_probs_RV)
    found: list[list[Hypothesis]] = [[] for _ in prefixes]
    while True:
        A, _, t = beams.tokens_AKt.shape
        if t > 0:  # in the first step an utterance has a single row: its beams are still one
            forbid_repeats(log_probs_RV, beams.tokens_AKt.view(A * K, t), max_repeats=config.max_repeats)
        log_probs_AkV = log_probs_RV.view(A, -1, log_probs_RV.shape[-1])
        before = beams
        beams, origin_AK, over_A = _advance(before, log_probs_AkV, end=end, config=config)
        over = over_A.tolist()
        rows_A = torch.arange(A, device=over_A.device)
        if any(over):
            for row in (row for row, is_over in enumerate(over) if is_over):
                nbest = _nbest(beams, row, end=end, config=config)
                found[running[row]] = nbest or _unfinished(before, row, config=config)
            running = [utterance for utterance, is_over in zip(running, over) if not is_over]
            if not running:
                return found
            rows_A = rows_A[~over_A]
            beams = beams.of(rows_A)
        scorer.select((rows_A[:, None] * log_probs_AkV.shape[1] + origin_AK[rows_A]).flatten())
        log_probs_RV = scorer.step(beams.tokens_AKt[..., -1].flatten())


def _first_beams(utterances: int, limits: list[int], config: DecodeConfig, *, like: Tensor) -> Beams:
    B, K = utterances, config.beam_size
    limit_B = torch.tensor(limits, device=like.device)
    return Beams(
        tokens_AKt=limit_B.new_empty(B, K, 0),
        score_AK=like.new_zeros(B, K),
        limit_A=limit_B,
        done_AKT=limit_B.new_full((B, K, max(limits)), -1),
        done_score_AK=like.new_full((B, K), -math.inf),
        done_rank_AK=like.new_full((B, K), -math.inf),
    )


def _advance(beams: Beams, log_probs_AkV: Tensor, *, end: int, config: DecodeConfig) -> tuple[Beams, Tensor, Tensor]:
    """Extend every beam by one token. Return the books, the row that each beam came from, and who is over."""
    K = config.beam_size
    A, k, V = log_probs_AkV.shape
    # Twice as many candidates as beams: at most K of them take the end token, so K that go on are left.
    total_AC = (beams.score_AK[:, :k, None] + log_probs_AkV).view(A, k * V)
    score_AC, index_AC = total_AC.topk(min(2 * K, k * V), dim=-1)
    if score_AC.shape[1] < 2 * K:  # a vocabulary smaller than the beam
        missing = 2 * K - score_AC.shape[1]
        score_AC = torch.nn.functional.pad(score_AC, (0, missing), value=-math.inf)
        index_AC = torch.nn.functional.pad(index_AC, (0, missing))
    origin_AC, token_AC = index_AC // V, index_AC % V
    tokens_ACt = beams.tokens_AKt.gather(1, origin_AC[..., None].expand(-1, -1, beams.tokens_AKt.shape[-1]))
    tokens_ACt = torch.cat([tokens_ACt, token_AC[..., None]], dim=-1)
    length = tokens_ACt.shape[-1]
    at_limit_A = length >= beams.limit_A
    ends_AC = (token_AC == end) | at_limit_A[:, None]

    # Only the K best candidates may finish; the others stand by in case of those.
    done = _merge_finished(beams, tokens_ACt[:, :K], score_AC[:, :K], ends_AC[:, :K], config=config)
    score_AK, place_AK = score_AC.masked_fill(ends_AC, -math.inf).topk(K, dim=-1)
    beams = done._replace(
        tokens_AKt=tokens_ACt.gather(1, place_AK[..., None].expand(-1, -1, length)), score_AK=score_AK
    )
    none_left_A = score_AK[:, 0] == -math.inf
    return beams, origin_AC.gather(1, place_AK), at_limit_A | none_left_A | _is_final(beams, length, config=config)


def _merge_finished(
    beams: Beams, tokens_AKt: Tensor, score_AK: Tensor, ends_AK: Tensor, *, config: DecodeConfig
) -> Beams:
    """Return the books with those candidates that end put in their places among the K best finished hypotheses."""
    length = tokens_AKt.shape[-1]
    rank_AK = (score_AK / length**config.length_penalty).masked_fill(~ends_AK, -math.inf)
    padded_AKT = torch.nn.functional.pad(tokens_AKt, (0, beams.done_AKT.shape[-1] - length), value=-1)
    all_rank = torch.cat([beams.done_rank_AK, rank_AK], dim=1)
    done_rank_AK, place_AK = all_rank.topk(config.beam_size, dim=-1)
    all_tokens = torch.cat([beams.done_AKT, padded_AKT], dim=1)
    return beams._replace(
        done_AKT=all_tokens.gather(1, place_AK[..., None].expand(-1, -1, all_tokens.shape[-1])),
        done_score_AK=torch.cat([beams.done_score_AK, score_AK], dim=1).gather(1, place_AK),
        done_rank_AK=done_rank_AK,
    )


def _is_final(beams: Beams, length: int, *, config: DecodeConfig) -> Tensor:
    """Whether an utterance's finished list is full and, by the rule of `config.stop`, cannot get better."""
    worst_A = beams.done_rank_AK[:, -1]
    full_A = worst_A > -math.inf
    if config.stop == "first":
        return full_A
    grows = config.stop == "never" and config.length_penalty > 0
    hypothetical_A = beams.limit_A if grows else torch.full_like(beams.limit_A, length)
    return full_A & (beams.score_AK[:, 0] / hypothetical_A**config.length_penalty <= worst_A)


def _nbest(beams: Beams, row: int, *, end: int, config: DecodeConfig) -> list[Hypothesis]:
    """Return an utterance's finished hypotheses, best first; at most nbest, fewer if so many were never found."""
    tokens_T, scores, ranks = (x[row].tolist() for x in (beams.done_AKT, beams.done_score_AK, beams.done_rank_AK))
    return [
        hypothesis([i for i in tokens if i >= 0], score, end=end, length_penalty=config.length_penalty)
        for tokens, score, rank in list(zip(tokens_T, scores, ranks))[: config.nbest]
        if rank > -math.inf
    ]


def _unfinished(beams: Beams, row: int, *, config: DecodeConfig) -> list[Hypothesis]:
    """Return an utterance's running beams as hypotheses without an end, best first."""
    found = {
        tuple(tokens): hypothesis(tokens, score, end=-1, length_penalty=config.length_penalty)
        for tokens, score in zip(beams.tokens_AKt[row].tolist(), beams.score_AK[row].tolist())
        if score > -math.inf
    }
    return list(found.values())[: config.nbest]


def forbid_repeats(log_probs_RV: Tensor, tokens_Rt: Tensor, *, max_repeats: int) -> None:
    """Set to -inf, in place, each token that would complete a phrase `max_repeats` + 1 times in a row."""
    if max_repeats == 0:
        return
    for row, tokens in enumerate(tokens_Rt.tolist()):
        for n in range(1, LONGEST_PHRASE + 1):
            window = tokens[-(n * (max_repeats + 1) - 1) :]
            if len(window) < n * (max_repeats + 1) - 1:
                break
            if all(a == b for a, b in zip(window, window[n:])) and len(window) >= n:
                log_probs_RV[row, tokens[-n]] = -math.inf
