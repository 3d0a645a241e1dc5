"""The processor: shapes, refusals, ids without special tokens, a round trip through its folder."""

import numpy as np
import pytest
import torch

from seedling.model.processor import AudioLLMProcessor
from seedling.model.prompt import PromptConfig, PromptTokens, tokenize


@pytest.fixture
def processor(tokenizer) -> AudioLLMProcessor:
    return AudioLLMProcessor(tokenizer, sample_rate=16000)


def test_audio_is_padded_with_zeros_and_keeps_its_lengths(processor):
    inputs = processor(audio=[np.ones(5, np.float32), torch.full((3,), 0.5)], sampling_rate=16000)
    assert inputs["waveforms"].tolist() == [[1, 1, 1, 1, 1], [0.5, 0.5, 0.5, 0, 0]]
    assert inputs["lengths"].tolist() == [5, 3]
    assert set(inputs) == {"waveforms", "lengths"}


def test_one_array_is_a_batch_of_one(processor):
    assert processor(audio=np.zeros(7, np.float32))["waveforms"].shape == (1, 7)


def test_another_sample_rate_is_refused_with_both_rates(processor):
    with pytest.raises(ValueError, match="8000 Hz, the model takes 16000 Hz"):
        processor(audio=np.zeros(7, np.float32), sampling_rate=8000)


def test_stereo_empty_and_integer_audio_are_refused_by_position(processor):
    with pytest.raises(ValueError, match=r"audio 1 has shape \(2, 9\)"):
        processor(audio=[np.zeros(9, np.float32), np.zeros((2, 9), np.float32)])
    with pytest.raises(ValueError, match=r"audio 0 has shape \(0,\)"):
        processor(audio=[np.zeros(0, np.float32)])
    with pytest.raises(ValueError, match="divide 16-bit samples"):
        processor(audio=[np.zeros(9, np.int16)])


def test_nothing_given_is_an_error(processor):
    with pytest.raises(ValueError, match="neither audio nor text nor context"):
        processor()


def test_text_comes_back_from_its_ids(processor):
    texts = ["call Kaitlyn", "", "打开 the light"]
    ids = processor(text=texts)["transcripts_ids"]
    assert all(processor.tokenizer.eos_token_id not in row for row in ids)
    assert processor.batch_decode(ids) == texts
    end = processor.tokenizer.eos_token_id
    assert processor.batch_decode([torch.tensor([*row, end, end]) for row in ids]) == texts


def test_a_transcript_that_ends_within_a_character_shows_what_is_missing(processor):
    ids = processor(text=["call 北京"])["transcripts_ids"][0]
    texts = [processor.decode(ids[:end]) for end in range(len(ids), 0, -1)]
    torn = [text for text in texts if text.endswith("\ufffd")]
    assert texts[0] == "call 北京" and torn and all("call 北京".startswith(text.strip("\ufffd")) for text in torn)


def test_an_absent_or_empty_context_has_no_ids(processor):
    contexts = processor(context=["names: Kaitlyn", "", None])["contexts_ids"]
    assert contexts[1] is contexts[2] is None
    assert processor.decode(contexts[0]) == "names: Kaitlyn"


def test_a_saved_processor_loads_with_equal_settings_and_ids(tmp_path, tokenizer):
    saved = AudioLLMProcessor(
        tokenizer, sample_rate=8000, prompts=PromptConfig(instruction="Write:", end_token="<unk>")
    )
    saved.save_pretrained(tmp_path)
    loaded = AudioLLMProcessor.from_pretrained(tmp_path)
    assert (loaded.sample_rate, loaded.prompts) == (8000, saved.prompts)
    assert loaded(text="call Kaitlyn")["transcripts_ids"] == saved(text="call Kaitlyn")["transcripts_ids"]
    with pytest.raises(ValueError, match=r"no processor_config\.json"):
        AudioLLMProcessor.from_pretrained(tmp_path / "elsewhere")


def test_the_instructions_are_those_of_the_paper():
    assert PromptConfig().instruction == "Transcribe the speech into text:"
    assert PromptConfig().instruction_with_context == "There are relevant contexts, transcribe the speech into text:"


def test_prompt_ids_are_joined_parts_and_a_start_token_comes_first_if_the_tokenizer_has_one(tokenizer):
    prompts = PromptConfig(before="<user>", after="<answer>")
    tokens = PromptTokens.of(prompts, tokenizer=tokenizer)
    assert tokens.instruction == tokenize(tokenizer, "<user>" + prompts.instruction)
    assert tokens.after == tokenize(tokenizer, "<answer>")
    assert tokens.end == tokenizer.eos_token_id
    assert tokens.before_speech(None) == tokens.before_speech([]) == tokens.instruction
    assert tokens.before_speech([7, 8]) == [*tokens.instruction_with_context, 7, 8]


def test_an_end_token_that_is_no_token_is_refused(tokenizer):
    assert PromptTokens.of(PromptConfig(end_token="<unk>"), tokenizer=tokenizer).end == tokenizer.unk_token_id
    with pytest.raises(ValueError, match=r"'<\|im_end\|>'"):
        PromptTokens.of(PromptConfig(end_token="<|im_end|>"), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="must contain"):
        PromptConfig(context="names")
