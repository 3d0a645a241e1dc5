"""Prompted repetition: the one skill of a downloaded LLM that a recogniser cannot do without, taught to a small one.

A large LM can repeat what stands in its prompt. A small one trained on plain sentences cannot, and a frozen LM that
ignores its prompt will never listen: it learns to only when many sequences cannot be guessed from the words before. So
part of the training sequences are [instruction | pseudo speech | sentence], where pseudo speech is the sentence's own
token embeddings made to look like a converter's output: tokens last a few positions, blanks (zero vectors) lie between
them, some tokens are missing or wrong, each is mixed with another. How much of this a sequence gets is drawn anew, so
that easy ones to begin with are always among them. In part of these the sentence is replaced by random tokens, which
nothing but listening can predict.

Shape letters: B sentences, T positions, S pseudo speech positions, L LM width, V vocabulary, N target positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .llm import logits_at, token_embeddings
from .prompt import PromptTokens, answer_targets, lay_out, place_speech


@dataclass
class RepetitionConfig:
    share: float = 0.8  # of the sequences that are prompted repetitions; the rest are plain sentences
    random_share: float = 0.5  # of the repetitions that repeat random tokens
    drop: float = 0.06  # tokens missing from the pseudo speech, at the hardest
    substitute: float = 0.1  # tokens replaced by another
    max_hold: int = 3  # positions that a token lasts, 1 to this
    max_blanks: int = 2  # zero vectors after it, 0 to this
    max_mix: float = 0.5  # weight of another token's embedding, 0 to this

    def __post_init__(self):
        for name in ("share", "random_share", "drop", "substitute", "max_mix"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"repetition.{name} is {getattr(self, name)}; it must be in 0 to 1")
        if self.max_hold < 1 or self.max_blanks < 0:
            raise ValueError(
                f"repetition.max_hold ({self.max_hold}) must be at least 1, max_blanks ({self.max_blanks}) at least 0"
            )


class PseudoSpeech:
    """Draws pseudo speech from the CPU's random state of torch, so the trainer's seed per micro-batch fixes it."""

    def __init__(self, cfg: RepetitionConfig, *, ordinary_tokens: Tensor):
        self.cfg, self.ordinary_tokens = cfg, ordinary_tokens

    def random_tokens(self, count: int) -> Tensor:
        return self.ordinary_tokens[torch.randint(len(self.ordinary_tokens), (count,))]

    def __call__(self, tokens: list[int], embeddings: nn.Embedding) -> Tensor:
        """Return speech_SL for one sentence, at least one position."""
        cfg, tokens_N = self.cfg, torch.tensor(tokens)
        hardness, longest_hold, most_blanks = (
            float(torch.rand(())),
            int(torch.randint(1, cfg.max_hold + 1, ())),
            int(torch.randint(0, cfg.max_blanks + 1, ())),
        )
        tokens_N = tokens_N[torch.rand(len(tokens_N)) >= hardness * cfg.drop]
        N, device = len(tokens_N), embeddings.weight.device
        if N == 0:
            return embeddings.weight.new_zeros(1, embeddings.embedding_dim)
        tokens_N = torch.where(torch.rand(N) < hardness * cfg.substitute, self.random_tokens(N), tokens_N)
        mix_N1 = (torch.rand(N, 1) * (hardness * cfg.max_mix)).to(device)
        mixed_NL = (1 - mix_N1) * embeddings(tokens_N.to(device)) + mix_N1 * embeddings(
            self.random_tokens(N).to(device)
        )
        hold_N = torch.randint(1, longest_hold + 1, (N,))
        blanks_N = torch.randint(0, most_blanks + 1, (N,))
        # Row N of the table is the blank; each token's row is repeated, then the blank's.
        table = torch.cat([mixed_NL, mixed_NL.new_zeros(1, mixed_NL.shape[1])])
        rows = torch.stack([torch.arange(N), torch.full((N,), N)], dim=1).flatten()
        return table[rows.repeat_interleave(torch.stack([hold_N, blanks_N], dim=1).flatten()).to(device)]


class RepeatingLM(nn.Module):
    """A causal LM with the loss of plain sentences and prompted repetitions; the LM itself is `.llm`."""

    llm: PreTrainedModel

    def __init__(
        self,
        llm: PreTrainedModel,
        *,
        prompt_tokens: PromptTokens,
        start: int,
        ordinary: list[int],
        cfg: RepetitionConfig,
    ):
        super().__init__()
        self.llm, self.prompt_tokens, self.start, self.cfg = llm, prompt_tokens, start, cfg
        self.pseudo_speech = PseudoSpeech(cfg, ordinary_tokens=torch.tensor(ordinary, device="cpu"))

    def forward(self, sentences: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return nll_N of every token and end token, sentence by sentence, and heard_N: True within a repetition."""
        repeats = (torch.rand(len(sentences)) < self.cfg.share).tolist()
        random = (torch.rand(len(sentences)) < self.cfg.random_share).tolist()
        sentences = [
            self.pseudo_speech.random_tokens(len(s)).tolist() if repeat and at_random else s
            for s, repeat, at_random in zip(sentences, repeats, random)
        ]
        return self.losses(sentences, repeats)

    def losses(self, sentences: list[list[int]], repeats: list[bool]) -> tuple[Tensor, Tensor]:
        """Return nll_N and heard_N where sentence b is a prompted repetition if repeats[b], else a plain sentence."""
        embeddings = token_embeddings(self.llm)
        device, width = embeddings.weight.device, embeddings.embedding_dim
        spoken = [
            self.pseudo_speech(sentence, embeddings) if repeat else embeddings.weight.new_zeros(0, width)
            for sentence, repeat in zip(sentences, repeats)
        ]
        speech_lengths = [len(s) for s in spoken]
        speech_BSL = nn.utils.rnn.pad_sequence(spoken, batch_first=True)
        if speech_BSL.shape[1] == 0:
            speech_BSL = speech_BSL.new_zeros(len(sentences), 1, width)
        before = [self.prompt_tokens.before_speech(None) if repeat else [self.start] for repeat in repeats]
        after = [self.prompt_tokens.after if repeat else [] for repeat in repeats]
        layout = lay_out(before, speech_lengths, [a + s for a, s in zip(after, sentences)], device=device)
        embedded_BTL = place_speech(
            embeddings(layout.token_ids_BT),
            speech_BSL,
            starts_B=layout.speech_starts_B,
            speech_lengths_B=torch.tensor(speech_lengths, device=device),
        )
        targets = answer_targets(layout.lengths, sentences, end=self.prompt_tokens.end, device=device)
        logits_NV, _ = logits_at(
            self.llm, embedded_BTL, rows_N=targets.rows_N, columns_N=targets.columns_N, use_cache=False
        )
        nll_N = nn.functional.cross_entropy(logits_NV.float(), targets.tokens_N, reduction="none")
        return nll_N, torch.tensor(repeats, device=device)[targets.rows_N]
