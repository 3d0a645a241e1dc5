"""Prompted repetition: the one skill of a downloaded LLM that a recogniser cannot do without, taught to a small one.

A large LM can repeat what stands in its prompt. A small one trained on plain sentences cannot, and a frozen LM that
ignores its prompt will never listen: it learns to only when many sequences cannot be guessed from the words before. So
part of the training sequences are [instruction | pseudo speech | sentence], where pseudo speech is the sentence's own
token embeddings made to look like a converter's output: tokens last a few positions, blanks (zero vectors) lie between
them, some tokens are missing or wrong, each is mixed with another. How much of this a sequence gets is drawn anew, so
that easy ones to begin with are always among them. In part of these the sentence is replaced by random tokens, which
nothing but listening can predict.

The second such skill is to look an unclear word up in a context. Some spans of a sentence are unclear: mixed with other
tokens up to being replaced by them. In part of the sequences the prompt then has a context that lists these spans among
spans of other sentences, so that which of the listed ones was said has to be heard, and what was said has to be read.

Shape letters: B sentences, T positions, S pseudo speech positions, L LM width, V vocabulary, N target positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .llm import token_embeddings
from .prompt import PromptTokens, answer_targets, lay_out, place_speech
from .target_losses import target_losses


@dataclass
class RepetitionConfig:
    share: float = 0.8  # of the sequences that are prompted repetitions; the rest are plain sentences
    random_share: float = 0.5  # of the repetitions that repeat random tokens
    drop: float = 0.06  # tokens missing from the pseudo speech, at the hardest
    substitute: float = 0.1  # tokens replaced by another
    max_hold: int = 3  # positions that a token lasts, 1 to this
    max_blanks: int = 2  # zero vectors after it, 0 to this
    max_mix: float = 0.5  # weight of another token's embedding, 0 to this
    context_share: float = 0.6  # of the repetitions that have a context in their prompt
    unclear_share: float = 0.3  # of the repetitions without a context that have unclear spans all the same
    unclear: float = 0.45  # the most of a sentence's tokens, as a fraction, that unclear spans begin at
    max_distractors: int = 5  # spans of other sentences in a context, 1 to this
    # Tokens of a span, drawn from these: most names are one token, in a vocabulary that knows them.
    span_lengths: list[int] = field(default_factory=lambda: [2, 1, 1, 1])

    def __post_init__(self):
        for name in (
            "share",
            "random_share",
            "drop",
            "substitute",
            "max_mix",
            "context_share",
            "unclear_share",
            "unclear",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"repetition.{name} is {getattr(self, name)}; it must be in 0 to 1")
        if self.max_distractors < 1:
            raise ValueError(f"repetition.max_distractors is {self.max_distractors}; it must be at least 1")
        if not self.span_lengths or min(self.span_lengths) < 1:
            raise ValueError(f"repetition.span_lengths is {self.span_lengths}; give lengths of at least 1, as [2, 1]")
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

    def __call__(self, tokens: list[int], embeddings: nn.Embedding, unclear: Sequence[bool] = ()) -> Tensor:
        """Return speech_SL for one sentence, at least one position. `unclear` tokens are never dropped or replaced."""
        cfg, tokens_N = self.cfg, torch.tensor(tokens)
        unclear_N = torch.tensor(unclear or [False] * len(tokens), dtype=torch.bool)
        hardness, longest_hold, most_blanks = (
            float(torch.rand(())),
            int(torch.randint(1, cfg.max_hold + 1, ())),
            int(torch.randint(0, cfg.max_blanks + 1, ())),
        )
        stays_N = unclear_N | (torch.rand(len(tokens_N)) >= hardness * cfg.drop)
        tokens_N, unclear_N = tokens_N[stays_N], unclear_N[stays_N]
        N, device = len(tokens_N), embeddings.weight.device
        if N == 0:
            return embeddings.weight.new_zeros(1, embeddings.embedding_dim)
        wrong_N = ~unclear_N & (torch.rand(N) < hardness * cfg.substitute)
        tokens_N = torch.where(wrong_N, self.random_tokens(N), tokens_N)
        most_N = torch.where(unclear_N, 1.0, hardness * cfg.max_mix)
        mix_N1 = (torch.rand(N) * most_N)[:, None].to(device)
        mixed_NL = (1 - mix_N1) * embeddings(tokens_N.to(device)) + mix_N1 * embeddings(
            self.random_tokens(N).to(device)
        )
        hold_N = torch.randint(1, longest_hold + 1, (N,))
        blanks_N = torch.randint(0, most_blanks + 1, (N,))
        # Row N of the table is the blank; each token's row is repeated, then the blank's.
        table = torch.cat([mixed_NL, mixed_NL.new_zeros(1, mixed_NL.shape[1])])
        rows = torch.stack([torch.arange(N), torch.full((N,), N)], dim=1).flatten()
        return table[rows.repeat_interleave(torch.stack([hold_N, blanks_N], dim=1).flatten()).to(device)]


class Heard(NamedTuple):
    """How a sentence is repeated: the context in its prompt, and which of its tokens are unclear."""

    context_ids: list[int] | None
    unclear: list[bool]


class ContextDraw:
    """Draws contexts and unclear spans from the CPU's random state of torch, as PseudoSpeech does."""

    def __init__(self, cfg: RepetitionConfig, *, separator: list[int]):
        self.cfg, self.separator = cfg, separator

    def __call__(self, sentence: list[int], others: list[list[int]], *, has_context: bool, is_unclear: bool) -> Heard:
        """Return what is unclear in a sentence and, with a context, a list of that and of spans of `others`."""
        spans = self._spans(sentence) if is_unclear else []
        unclear = [any(start <= n < stop for start, stop in spans) for n in range(len(sentence))]
        if not has_context:
            return Heard(None, unclear)
        listed = [sentence[start:stop] for start, stop in spans]
        for _ in range(_below(self.cfg.max_distractors) + 1):
            other = others[_below(len(others))]
            listed.append(self._span_of(other))
        listed = [listed[i] for i in torch.randperm(len(listed)).tolist() if listed[i]]
        ids = [token for phrase in listed for token in [*self.separator, *phrase]]
        return Heard(ids[len(self.separator) :], unclear)

    def _spans(self, sentence: list[int]) -> list[tuple[int, int]]:
        if not sentence:
            return []
        count = max(1, round(len(sentence) * self.cfg.unclear * float(torch.rand(()))))
        starts = [_below(len(sentence)) for _ in range(count)]
        return [(start, start + self._span_length()) for start in starts]

    def _span_of(self, sentence: list[int]) -> list[int]:
        start = _below(max(1, len(sentence)))
        return sentence[start : start + self._span_length()]

    def _span_length(self) -> int:
        return self.cfg.span_lengths[_below(len(self.cfg.span_lengths))]


def _below(n: int) -> int:
    return int(torch.randint(n, ()))


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
        separator: list[int],
        cfg: RepetitionConfig,
    ):
        """`separator` are the ids between the phrases of a context, such as those of a comma."""
        super().__init__()
        self.llm, self.prompt_tokens, self.start, self.cfg = llm, prompt_tokens, start, cfg
        self.pseudo_speech = PseudoSpeech(cfg, ordinary_tokens=torch.tensor(ordinary, device="cpu"))
        self.context_draw = ContextDraw(cfg, separator=separator)

    def forward(self, sentences: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return nll_N of every token and end token, sentence by sentence, and heard_N: True within a repetition."""
        cfg, count = self.cfg, len(sentences)
        repeats = (torch.rand(count) < cfg.share).tolist()
        random = (torch.rand(count) < cfg.random_share).tolist()
        sentences = [
            self.pseudo_speech.random_tokens(len(s)).tolist() if repeat and at_random else s
            for s, repeat, at_random in zip(sentences, repeats, random)
        ]
        with_context = torch.rand(count) < cfg.context_share
        # A context in which nothing of the sentence stands is part of it too: it must not be copied from.
        unclear = torch.rand(count) < torch.where(with_context, 0.8, cfg.unclear_share)
        heard = [
            self.context_draw(s, sentences, has_context=has_context, is_unclear=is_unclear) if repeat else None
            for s, repeat, has_context, is_unclear in zip(sentences, repeats, with_context.tolist(), unclear.tolist())
        ]
        nll_N, _ = self.losses(sentences, heard)
        return nll_N, self._per_target(sentences, repeats)

    def as_repetitions(self, sentences: list[list[int]], *, has_context: bool, is_unclear: bool) -> list[Heard | None]:
        """Return how every one of these sentences is repeated, for an evaluation of one kind."""
        return [self.context_draw(s, sentences, has_context=has_context, is_unclear=is_unclear) for s in sentences]

    def losses(self, sentences: list[list[int]], heard: Sequence[Heard | None]) -> tuple[Tensor, Tensor]:
        """Return nll_N and unclear_N; sentence b is a repetition if heard[b] says how, else (None) a plain sentence."""
        embeddings = token_embeddings(self.llm)
        device, width = embeddings.weight.device, embeddings.embedding_dim
        spoken = [
            self.pseudo_speech(sentence, embeddings, how.unclear) if how else embeddings.weight.new_zeros(0, width)
            for sentence, how in zip(sentences, heard)
        ]
        speech_lengths = [len(s) for s in spoken]
        speech_BSL = nn.utils.rnn.pad_sequence(spoken, batch_first=True)
        if speech_BSL.shape[1] == 0:
            speech_BSL = speech_BSL.new_zeros(len(sentences), 1, width)
        before = [self.prompt_tokens.before_speech(how.context_ids) if how else [self.start] for how in heard]
        after = [self.prompt_tokens.after if how else [] for how in heard]
        layout = lay_out(before, speech_lengths, [a + s for a, s in zip(after, sentences)], device=device)
        embedded_BTL = place_speech(
            embeddings(layout.token_ids_BT),
            speech_BSL,
            starts_B=layout.speech_starts_B,
            speech_lengths_B=torch.tensor(speech_lengths, device=device),
        )
        targets = answer_targets(layout.lengths, sentences, end=self.prompt_tokens.end, device=device)
        nll_N = target_losses(self.llm, embedded_BTL, targets).nll_N
        unclear = [is_unclear for s, how in zip(sentences, heard) for is_unclear in _targets_of(s, how)]
        return nll_N, torch.tensor(unclear, device=device)

    def _per_target(self, sentences: list[list[int]], repeats: list[bool]) -> Tensor:
        device = token_embeddings(self.llm).weight.device
        return torch.tensor([repeat for s, repeat in zip(sentences, repeats) for _ in range(len(s) + 1)], device=device)


def _targets_of(sentence: list[int], how: Heard | None) -> list[bool]:
    """Return which of the sentence's tokens and its end token are unclear."""
    return [*(how.unclear if how else [False] * len(sentence)), False]
