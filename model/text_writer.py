"""A causal LM in a local folder that answers questions: batches of prompts in, texts out.

An instruction-tuned LM is asked through its chat template; one without a template is given system and user text as
they are. Prompts are padded on the left, so that every answer begins at the same position of the batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .llm import load_llm, load_tokenizer
from .prompt import special_id


class Question(NamedTuple):
    system: str
    user: str


class WrittenText(NamedTuple):
    """A text without special tokens, and the tokens that were read and written for it."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class TextWriter:
    """Samples answers. The same questions in the same batch with the same seed get the same answers."""

    def __init__(self, path: str | Path, *, device: str = "auto", dtype: str = "auto"):
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"llm.dtype = {dtype}: choose auto, float32, bfloat16 or float16")
        self.llm = load_llm(path, dtype="auto" if dtype == "auto" else getattr(torch, dtype))
        self.llm.to(torch.device(chosen))  # pyright: ignore[reportArgumentType]
        self.tokenizer = load_tokenizer(path)
        self.max_positions = getattr(self.llm.config.get_text_config(), "max_position_embeddings", None)

    @torch.inference_mode()
    def write(
        self, questions: Sequence[Question], *, max_new_tokens: int, temperature: float, top_p: float, seed: int
    ) -> list[WrittenText]:
        """Answer a batch of questions. Temperature 0 is the likeliest text, whatever the seed."""
        prompts = [self._prompt_ids(question, room=max_new_tokens) for question in questions]
        ids_BT, mask_BT = self._left_padded(prompts)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        torch.manual_seed(seed)
        written_BT = self.llm.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=max_new_tokens,
            pad_token_id=self._pad,
            **(sampling if temperature else {"do_sample": False}),
        )
        return [self._text(row_T, len(ids)) for row_T, ids in zip(written_BT[:, ids_BT.shape[1] :], prompts)]

    def _prompt_ids(self, question: Question, *, room: int) -> list[int]:
        if self.tokenizer.chat_template:
            messages = [{"role": "system", "content": question.system}, {"role": "user", "content": question.user}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert isinstance(text, str), "one conversation that is not tokenised"
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
        else:
            ids = self.tokenizer(f"{question.system}\n{question.user}\n").input_ids
        if self.max_positions and len(ids) + room > self.max_positions:
            raise ValueError(
                f"llm.path: a prompt of {len(ids)} tokens and llm.max_new_tokens ({room}) do not fit into the "
                f"{self.max_positions} positions of this LM; choose another, or write less"
            )
        return list(ids)

    @property
    def _pad(self) -> int:
        """The end token, which no mask lets through: a tokenizer's own padding may lie beyond the LM's table."""
        eos = special_id(self.tokenizer, "eos")
        assert eos is not None, "load_tokenizer wants an end token"
        return eos

    def _left_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, prompts))
        ids_BT = torch.tensor([[self._pad] * (width - len(ids)) + list(ids) for ids in prompts])
        mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        return ids_BT.to(self.llm.device), mask_BT.to(self.llm.device)

    def _text(self, written_T: Tensor, prompt_tokens: int) -> WrittenText:
        ids = written_T.tolist()
        ends = self.llm.generation_config.eos_token_id if self.llm.generation_config else None
        ends = {self._pad, *(ends if isinstance(ends, list) else [ends])}
        length = next((number for number, token in enumerate(ids) if token in ends), len(ids))
        text = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
        assert isinstance(text, str), "one text is decoded to one text"
        return WrittenText(text, prompt_tokens, length)
