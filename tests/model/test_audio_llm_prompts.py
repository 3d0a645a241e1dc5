"""The audio LLM's prompts: a named language, a context limit within its LLM's room, and folders from before both."""

import json

import pytest
import torch

from seedling.model.audio_llm import AudioLLM, acllm_facts
from seedling.model.decoding import DecodeConfig
from seedling.model.prompt import PromptConfig

TOLD = PromptConfig(languages={"en": "English", "zh": "Mandarin"})
SECONDS = [0.9, 0.4, 0.6, 0.7]
TRANSCRIPTS = [[10, 11, 12], [13], [14, 15], [16]]
CONTEXTS = [None, [40, 41], [42], None]
LANGUAGES = [None, "en", "zh", "zh"]
EXACT = {"rtol": 1e-5, "atol": 2e-5}


def nll(model, batch, rows, *, contexts=CONTEXTS, languages=LANGUAGES) -> list[torch.Tensor]:
    waveforms, lengths = batch
    with torch.no_grad():
        out = model(
            waveforms[rows],
            lengths[rows],
            [TRANSCRIPTS[row] for row in rows],
            [contexts[row] for row in rows],
            languages=[languages[row] for row in rows] if languages else None,
        )
    return [out.nll_N[out.rows_N == position] for position in range(len(rows))]


def test_each_utterance_of_a_batch_has_its_own_language(tiny_audio_llm, noise):
    model, batch = tiny_audio_llm(prompts=TOLD), noise(SECONDS)
    together = nll(model, batch, [0, 1, 2, 3])
    for row in range(4):
        torch.testing.assert_close(together[row], nll(model, batch, [row])[0], **EXACT)
    untold = nll(model, batch, [0, 1, 2, 3], languages=None)
    changed = [not torch.allclose(a, b, atol=1e-3) for a, b in zip(together, untold)]
    assert changed == [False, True, True, True]


def test_a_named_language_is_the_instruction_with_its_name(tiny_audio_llm, noise):
    batch = noise(SECONDS)
    named = nll(tiny_audio_llm(prompts=TOLD), batch, [2, 3])
    spelt = PromptConfig(
        instruction="Transcribe the Mandarin speech into text:",
        instruction_with_context="There are relevant contexts, transcribe the Mandarin speech into text:",
    )
    for a, b in zip(named, nll(tiny_audio_llm(prompts=spelt), batch, [2, 3], languages=None)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("search", ["joint", "plain"])
def test_decoding_is_told_the_language_with_and_without_a_context(tiny_audio_llm, noise, search):
    """The plain prompt of the joint search as well: what it finds is what a model of that one instruction finds."""
    batch, config = noise(SECONDS), DecodeConfig(beam_size=2, max_new_tokens=8, context_search=search)
    told = tiny_audio_llm(prompts=TOLD)
    found = told.transcribe_ids(*batch, contexts_ids=CONTEXTS, languages=["zh"] * 4, config=config)
    spelt = PromptConfig(
        instruction="Transcribe the Mandarin speech into text:",
        instruction_with_context="There are relevant contexts, transcribe the Mandarin speech into text:",
    )
    wanted = tiny_audio_llm(prompts=spelt).transcribe_ids(*batch, contexts_ids=CONTEXTS, config=config)
    assert found == wanted
    ids = told.generate(*batch, contexts_ids=CONTEXTS, languages=["zh"] * 4, max_new_tokens=8)
    greedy = DecodeConfig(max_new_tokens=8)
    best = told.transcribe_ids(*batch, contexts_ids=CONTEXTS, languages=["zh"] * 4, config=greedy)
    assert [row[: len(h.ids)] for row, (h,) in zip(ids.tolist(), best)] == [h.ids for (h,) in best]


def test_a_language_that_it_does_not_know_and_a_language_too_few_are_refused(tiny_audio_llm, noise):
    model, batch = tiny_audio_llm(prompts=TOLD), noise(SECONDS)
    with pytest.raises(ValueError, match="'fr'; the languages of this recogniser are en, zh"):
        model.transcribe_ids(*batch, languages=["fr"] * 4)
    with pytest.raises(ValueError, match=r"4 utterances .* found 4, 4 and 1"):
        model(*batch, TRANSCRIPTS, languages=["en"])


def test_the_context_limit_leaves_half_of_the_positions_of_the_llm(tiny_audio_llm):
    """The tiny LLM has 512."""
    assert tiny_audio_llm().processor.prompts.context_tokens == 256
    model = tiny_audio_llm(prompts=PromptConfig(context_tokens=100))
    assert model.processor.prompts.context_tokens == model.config.prompts["context_tokens"] == 100
    model.set_prompts(PromptConfig(context_tokens=400))
    assert model.processor.prompts.context_tokens == model.config.prompts["context_tokens"] == 256


def test_new_prompts_are_used_saved_and_loaded(tiny_audio_llm, noise, tmp_path):
    model, batch = tiny_audio_llm(), noise(SECONDS)
    before = acllm_facts(model)["prompts"]
    model.set_prompts(TOLD)
    assert acllm_facts(model)["prompts"] != before
    losses = nll(model, batch, [0, 1, 2, 3])
    for a, b in zip(losses, nll(tiny_audio_llm(prompts=TOLD), batch, [0, 1, 2, 3])):
        assert torch.equal(a, b)
    model.save_pretrained(tmp_path)
    loaded = AudioLLM.from_pretrained(tmp_path).eval()
    for a, b in zip(losses, nll(loaded, batch, [0, 1, 2, 3])):
        assert torch.equal(a, b)
    assert loaded.processor.prompts == model.processor.prompts


def test_a_folder_from_before_languages_and_limits_loads_and_decodes_as_it_did(tiny_audio_llm, noise, tmp_path):
    model, batch = tiny_audio_llm(), noise(SECONDS)
    model.save_pretrained(tmp_path)
    new = ("instruction_in_language", "instruction_in_language_with_context", "languages", "context_tokens")
    for name in ("config.json", "processor_config.json"):
        values = json.loads((tmp_path / name).read_text())
        for key in new:
            del values["prompts"][key]
        for key in ("in_language", "in_language_with_context"):
            values.get("prompt_tokens", {}).pop(key, None)
        (tmp_path / name).write_text(json.dumps(values))
    old = AudioLLM.from_pretrained(tmp_path).eval()
    config = DecodeConfig(max_new_tokens=8)
    decoded = [m.transcribe_ids(*batch, contexts_ids=CONTEXTS, config=config) for m in (model, old)]
    assert decoded[0] == decoded[1]
    assert old.processor.prompts.context_tokens == 256
    with pytest.raises(ValueError, match="trained without"):
        old.transcribe_ids(*batch, languages=["en"] * 4)
