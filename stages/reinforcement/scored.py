"""N-best lists under the weights that learn: padded tables of log-probabilities, and what they say of the lists.

Shape letters: B utterances, N hypotheses of the longest list, T tokens of the longest candidate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...data.scoring.errors import METRICS
from ...model.audio_llm import AudioLLM, SpeechOutput
from ...model.candidate_scoring import score_candidates
from ..runtime.metrics import Metrics
from ..runtime.stopwatch import Stopwatch
from .candidates import NBest
from .objectives import expected_risk


@dataclass(frozen=True)
class ScoredLists:
    """Log-probabilities are 0 where there is no token. The reference is scored beside its list, not in it."""

    log_probs_BNT: Tensor
    mask_BNT: Tensor
    references_BT: Tensor
    valid_BN: Tensor  # where a list has a hypothesis
    seconds: float

    @property
    def sums_BN(self) -> Tensor:
        """log P(y_i | x): sums over tokens, not means."""
        return self.log_probs_BNT.sum(2)

    def table(self, lists: Sequence[Sequence[float]]) -> Tensor:
        """Return a number for each hypothesis as values_BN, 0 where there is none."""
        N = self.valid_BN.shape[1]
        rows = [[*values, *[0.0] * (N - len(values))] for values in lists]
        return torch.tensor(rows, dtype=self.log_probs_BNT.dtype, device=self.valid_BN.device).view(len(rows), N)

    def token_table(self, lists: Sequence[Sequence[Sequence[float]]]) -> Tensor:
        """Return a number for each token of each hypothesis as values_BNT, 0 where there is none."""
        lengths_BN = self.table([[len(values) for values in of_one] for of_one in lists])
        assert torch.equal(lengths_BN.long(), self.mask_BNT.sum(2)), "a number for each token of each hypothesis"
        T = self.log_probs_BNT.shape[2]
        flat = [[[*values, *[0.0] * (T - len(values))] for values in of_one] for of_one in lists]
        return torch.stack([self.table([[row[t] for row in of_one] for of_one in flat]) for t in range(T)], dim=2)


def score_lists(
    model: AudioLLM,
    speech: SpeechOutput,
    nbests: Sequence[NBest],
    *,
    contexts_ids: list[list[int] | None] | None = None,
    languages: list[str | None] | None = None,
) -> ScoredLists:
    """Score each list and its reference in one pass of the LLM, with gradient."""
    watch = Stopwatch(speech.speech_BSL.device)
    candidates = [[*nbest.hypotheses, nbest.reference] for nbest in nbests]
    scored = score_candidates(model, speech, candidates, contexts_ids=contexts_ids, languages=languages)
    sizes = [len(candidate) for candidate in candidates]
    log_probs, masks = scored.log_probs_MT.split(sizes), scored.mask_MT.split(sizes)

    def lists(rows: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([row_MT[:-1] for row_MT in rows], batch_first=True)

    mask_BNT = lists(masks)
    sizes_B = torch.tensor(sizes, device=mask_BNT.device) - 1
    watch.lap("scoring")
    return ScoredLists(
        log_probs_BNT=lists(log_probs),
        mask_BNT=mask_BNT,
        references_BT=torch.stack([row_MT[-1] for row_MT in log_probs]),
        valid_BN=torch.arange(mask_BNT.shape[1], device=mask_BNT.device) < sizes_B[:, None],
        seconds=watch.read()["scoring"][0],
    )


def list_metrics(scored: ScoredLists, nbests: Sequence[NBest], *, unit: str) -> Metrics:
    """Return what is logged of the lists, of the hypotheses that were found alone; empty lists are left out.

    Rates are errors per reference token: of the first hypothesis, of the best one (oracle), and expected under Phat.
    """
    rate, sums_BN = METRICS[unit], scored.sums_BN.detach()
    judged = [nbest for nbest in nbests if nbest.own]
    tokens = sum(nbest.reference_tokens for nbest in judged)
    errors = [[one.errors for one in nbest.judgements[: nbest.own]] for nbest in nbests]
    own_BN = scored.table([[1] * nbest.own for nbest in nbests]).bool()
    expected_B = expected_risk(sums_BN, scored.table(errors), own_BN)
    kept, found = sum(nbest.own for nbest in judged), sum(nbest.found for nbest in judged)
    risks = [one.risk for nbest in judged for one in nbest.judgements[: nbest.own]]
    return {
        "rl/risk_mean": (sum(risks), len(risks)),
        f"rl/{rate}_of_first": (sum(errors_N[0] for errors_N in errors if errors_N), tokens),
        f"rl/{rate}_oracle": (sum(min(errors_N) for errors_N in errors if errors_N), tokens),
        f"rl/{rate}_expected": (expected_B.sum(), tokens),
        "rl/list_size": (kept, len(judged)),
        "rl/distinct_frac": (sum(len(set(nbest.texts[: nbest.own])) for nbest in judged), found),
        "rl/zero_spread_frac": (sum(nbest.spread == 0 for nbest in judged), len(judged)),
        "rl/not_finite_frac": ((scored.valid_BN & ~sums_BN.isfinite()).sum(), scored.valid_BN.sum()),
        "rl/cut_frac": (sum(not h.complete for nbest in judged for h in nbest.hypotheses[: nbest.own]), kept),
    }
