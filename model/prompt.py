"""The prompt: [instruction | context | speech | transcript], one sequence per utterance in a padded batch.

Token ids are made by joining the ids of the parts. Tokenising the joined text instead would let a merge cross the
border between prompt and answer, so that training would see other ids than decoding does.
Shape letters: B utterances, T positions, S speech positions, L LLM width.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


@dataclass
class PromptConfig:
    """The texts around the speech. The two instructions are Seed-ASR's, verbatim (company page, figure 1).

    Those that name a language are ours: how the paper's multilingual model is told is unknown. `languages` are the tags
    it may be told, with the names that the instruction uses, as {en: English, zh: Mandarin}. `before` and `after` hold
    what an instruction-tuned LLM expects around a turn, such as its chat markers. `end_token` closes the transcript;
    empty means the tokenizer's own. `context_tokens` is the longest context that a prompt takes.
    """

    instruction: str = "Transcribe the speech into text:"
    instruction_with_context: str = "There are relevant contexts, transcribe the speech into text:"
    instruction_in_language: str = "Transcribe the {language} speech into text:"
    instruction_in_language_with_context: str = (
        "There are relevant contexts, transcribe the {language} speech into text:"
    )
    languages: dict[str, str] = field(default_factory=dict)
    context: str = " {context}"
    context_tokens: int = 512
    before: str = ""
    after: str = ""
    end_token: str = ""

    def __post_init__(self):
        for name, place in (
            ("context", "{context}"),
            ("instruction_in_language", "{language}"),
            ("instruction_in_language_with_context", "{language}"),
        ):
            if place not in getattr(self, name):
                raise ValueError(
                    f"prompts.{name} ({getattr(self, name)!r}) must contain {place}, where the {place[1:-1]} goes"
                )
        if self.context_tokens < 1:
            raise ValueError(f"prompts.context_tokens is {self.context_tokens}; it must be at least 1")


@dataclass
class PromptTokens:
    """Token ids of the fixed parts. They are saved in the model's config: a forward pass needs no tokenizer."""

    instruction: list[int]
    instruction_with_context: list[int]
    after: list[int]
    end: int
    # By the tag of the language. A recogniser from before there were any knows none.
    in_language: dict[str, list[int]] = field(default_factory=dict)
    in_language_with_context: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, prompts: PromptConfig, *, tokenizer: PreTrainedTokenizerBase) -> "PromptTokens":
        bos = special_id(tokenizer, "bos")
        starts_with_bos = list(tokenizer("a").input_ids[:1]) == [bos]
        start = [bos] if bos is not None and starts_with_bos else []

        def ids(instruction: str) -> list[int]:
            return start + tokenize_markup(tokenizer, prompts.before + instruction)

        def in_languages(instruction: str) -> dict[str, list[int]]:
            # Not str.format: a user's instruction may well have other braces.
            return {tag: ids(instruction.replace("{language}", name)) for tag, name in prompts.languages.items()}

        return cls(
            instruction=ids(prompts.instruction),
            instruction_with_context=ids(prompts.instruction_with_context),
            after=tokenize_markup(tokenizer, prompts.after),
            end=_end_id(prompts, tokenizer),
            in_language=in_languages(prompts.instruction_in_language),
            in_language_with_context=in_languages(prompts.instruction_in_language_with_context),
        )

    def before_speech(self, context_ids: list[int] | None, language: str | None = None) -> list[int]:
        """Ids in front of the speech. An absent or empty context or language gives the instruction without it."""
        if not language:
            return self.instruction_with_context + context_ids if context_ids else self.instruction
        if language not in self.in_language:
            known = ", ".join(sorted(self.in_language)) or "none: it was trained without prompts.languages"
            raise ValueError(f"language is {language!r}; the languages of this recogniser are {known}; or leave it out")
        return self.in_language_with_context[language] + context_ids if context_ids else self.in_language[language]


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a transcript or a context, without the start and end tokens that a tokenizer may add by itself.

    What looks like a control token in it ("</s>", "<|im_end|>") is spelt out as the text that it is.
    """
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids) if text else []


def tokenize_markup(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of what a config says around speech and context, where control tokens are meant as such."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=False).input_ids) if text else []


def special_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """Id of a tokenizer's `bos`, `eos` or `pad` token; None where it has no such token."""
    found = getattr(tokenizer, f"{name}_token_id")
    assert found is None or isinstance(found, int), f"{name}_token_id is {found!r}"
    return found


def _end_id(prompts: PromptConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    if not prompts.end_token:
        eos = special_id(tokenizer, "eos")
        if eos is None:
            raise ValueError("the tokenizer has no end token; name one of its tokens in prompts.end_token")
        return eos
    end = tokenizer.get_vocab().get(prompts.end_token)
    if end is None:
        raise ValueError(f"prompts.end_token ({prompts.end_token!r}) is not a token of the tokenizer; name one that is")
    if end in tokenize(tokenizer, prompts.end_token):
        raise ValueError(
            f"prompts.end_token ({prompts.end_token!r}) is a token that a transcript may contain; name a special token"
        )
    return end


class PromptLayout(NamedTuple):
    """Where everything lies in a right-padded batch: column 0 holds an utterance's first token."""

    token_ids_BT: Tensor  # 0 where speech or padding stands
    speech_starts_B: Tensor
    lengths: list[int]


def lay_out(
    before: list[list[int]], speech_lengths: list[int], after: list[list[int]], *, device: torch.device
) -> PromptLayout:
    """Place [before | speech | after] of every utterance."""
    lengths = [len(b) + s + len(a) for b, s, a in zip(before, speech_lengths, after)]
    width = max(lengths)
    rows = [
        [*b, *[0] * s, *a, *[0] * (width - length)] for b, s, a, length in zip(before, speech_lengths, after, lengths)
    ]
    starts_B = torch.tensor([len(b) for b in before], device=device)
    return PromptLayout(torch.tensor(rows, dtype=torch.long, device=device), starts_B, lengths)


def place_speech(tokens_BTL: Tensor, speech_BSL: Tensor, *, starts_B: Tensor, speech_lengths_B: Tensor) -> Tensor:
    """Put each utterance's valid speech embeddings over the token embeddings, from column `starts_B` on.

    Rows of speech_BSL past an utterance's length are never read, whatever they hold.
    """
    _, T, L = tokens_BTL.shape
    S = speech_BSL.shape[1]
    index_BT = torch.arange(T, device=tokens_BTL.device) - starts_B[:, None]
    is_speech_BT = (index_BT >= 0) & (index_BT < speech_lengths_B[:, None])
    speech_BTL = speech_BSL.gather(1, index_BT.clamp(0, S - 1)[..., None].expand(-1, -1, L))
    return torch.where(is_speech_BT[..., None], speech_BTL, tokens_BTL)


class AnswerTargets(NamedTuple):
    """The positions that predict an answer, utterance by utterance, and what they should predict."""

    rows_N: Tensor
    columns_N: Tensor
    tokens_N: Tensor


def answer_targets(lengths: list[int], answers: list[list[int]], *, end: int, device: torch.device) -> AnswerTargets:
    """Return the targets of sequences that end in `answers`: every token of them and the end token.

    A token is predicted one position before it stands; the end token at the last position of all.
    """
    rows, columns, targets = [], [], []
    for row, (length, answer) in enumerate(zip(lengths, answers)):
        rows += [row] * (len(answer) + 1)
        columns += range(length - len(answer) - 1, length)
        targets += [*answer, end]
    return AnswerTargets(*torch.tensor([rows, columns, targets], device=device))
