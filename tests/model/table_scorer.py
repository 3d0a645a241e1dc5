"""A step scorer without a model, for tests of what runs on one."""

import math
import zlib

import torch


class TableScorer:
    """A scorer without a model: the next token's probabilities depend on the utterance and the tokens so far."""

    def __init__(self, vocabulary: int, *, spread: float = 1.0):
        self.vocabulary, self.spread = vocabulary, spread
        self.histories: list[tuple] = []
        self.rows_seen: list[int] = []

    def start(self, prefixes):
        self.histories = [(prefix,) for prefix in prefixes]
        return self._log_probs()

    def step(self, tokens):
        assert len(tokens) == len(self.histories)
        self.histories = [(*history, token) for history, token in zip(self.histories, tokens.tolist())]
        return self._log_probs()

    def select(self, rows):
        self.histories = [self.histories[row] for row in rows.tolist()]

    def _log_probs(self):
        self.rows_seen.append(len(self.histories))
        return torch.stack([self.next_of(history) for history in self.histories])

    def next_of(self, history: tuple) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(repr(history).encode()))
        return (self.spread * torch.randn(self.vocabulary, generator=generator)).log_softmax(-1)


def forbidding(scorer: TableScorer, forbidden) -> TableScorer:
    """Let the scorer forbid the tokens that `forbidden(history)` names."""
    free = scorer.next_of
    scorer.next_of = lambda history: free(history).index_fill(0, torch.tensor(forbidden(history)).long(), -math.inf)
    return scorer
