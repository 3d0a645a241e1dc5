"""The audio LLM: what the loss covers, padding, gradients, types, files."""

import math

import pytest
import torch
from torch import nn

from seedling.model.audio_llm import AudioLLM
from seedling.model.converter import ConverterConfig
from seedling.model.llm import LoraSettings, add_lora, has_lora
from seedling.model.llm_scorer import llm_scorer
from seedling.model.prompt import PromptConfig

FAMILIES = ["qwen2", "qwen3", "llama", "mixtral", "qwen3_moe"]
AFTER_HEAD = ["gemma2", "cohere"]
SECONDS = [0.9, 0.31, 1.4, 0.6]
LETTERS = [[5, 5, 200], [7], [255, 0], []]
TRANSCRIPTS = [[10, 11, 12], [13], [14, 15, 16, 17, 18], []]
CONTEXTS = [None, [40, 41, 42], [43], []]
EXACT = {"rtol": 1e-5, "atol": 2e-5}  # float32, sums in another order


def by_utterance(out, utterances: int) -> list[torch.Tensor]:
    return [out.nll_N[out.rows_N == row] for row in range(utterances)]


def one(batch: tuple[torch.Tensor, torch.Tensor], row: int) -> tuple[torch.Tensor, torch.Tensor]:
    waveforms, lengths = batch
    return waveforms[row : row + 1, : lengths[row]], lengths[row : row + 1]


@pytest.mark.parametrize("family", FAMILIES + AFTER_HEAD)
def test_a_ragged_batch_gives_each_utterance_the_loss_that_it_has_alone(family, tiny_audio_llm, noise):
    model, batch = tiny_audio_llm(family, ctc=True), noise(SECONDS)
    with torch.no_grad():
        together = model(*batch, TRANSCRIPTS, CONTEXTS, ctc_targets=LETTERS)
        alone = [
            model(*one(batch, row), [TRANSCRIPTS[row]], [CONTEXTS[row]], ctc_targets=[LETTERS[row]]) for row in range(4)
        ]
    assert together.count == sum(len(t) + 1 for t in TRANSCRIPTS)
    for row, losses in enumerate(by_utterance(together, 4)):
        torch.testing.assert_close(losses, alone[row].nll_N, msg=lambda m, row=row: f"utterance {row}: {m}", **EXACT)
    torch.testing.assert_close(together.ctc.loss_sum, sum(a.ctc.loss_sum for a in alone), **EXACT)


@pytest.mark.parametrize("family", FAMILIES + AFTER_HEAD)
def test_left_padding_as_in_decoding_gives_the_logits_of_right_padding_as_in_training(family, tiny_audio_llm, noise):
    model, batch = tiny_audio_llm(family), noise(SECONDS)
    transcripts = [[10, 11, 12], [13, 20, 21], [14, 15, 16], [7, 8, 9]]
    with torch.no_grad():
        trained = model(*batch, transcripts, CONTEXTS, return_logits=True).logits_NV.view(4, 4, -1).log_softmax(-1)
        scorer = llm_scorer(model.llm)
        steps = [scorer.start(model.build_prompt(model.encode_speech(*batch), CONTEXTS))]
        steps += [scorer.step(torch.tensor(column)) for column in zip(*transcripts)]
    torch.testing.assert_close(torch.stack(steps, dim=1), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_the_loss_is_the_cross_entropy_of_transcript_and_end_token_by_hand(family, tiny_audio_llm, noise):
    """The sequence is put together here by hand and goes through the LLM's own forward pass, with all its logits."""
    model, batch = tiny_audio_llm(family), noise([0.9])
    speech = model.encode_speech(*batch)
    embed = model.llm.get_input_embeddings()
    prompt, context, transcript = model.prompt_tokens, [40, 41], [10, 11, 12]
    parts = [
        embed(torch.tensor(prompt.instruction_with_context + context)),
        speech.speech_BSL[0],
        embed(torch.tensor(transcript)),
    ]
    log_probs = model.llm(inputs_embeds=torch.cat(parts)[None]).logits[0].log_softmax(-1)
    start = len(parts[0]) + len(parts[1]) - 1
    by_hand = [-log_probs[start + i, token] for i, token in enumerate([*transcript, prompt.end])]
    out = model(*batch, [transcript], [context])
    torch.testing.assert_close(out.nll_N, torch.stack(by_hand), **EXACT)
    torch.testing.assert_close(out.loss_sum, sum(by_hand), **EXACT)


def test_what_stands_in_the_padding_changes_nothing(tiny_audio_llm, noise):
    model, (waveforms, lengths) = tiny_audio_llm(ctc=True), noise(SECONDS)
    garbage = waveforms.clone()
    for row, length in enumerate(lengths.tolist()):
        garbage[row, length:] = float("nan")
    with torch.no_grad():
        clean, dirty = (model(w, lengths, TRANSCRIPTS, CONTEXTS, ctc_targets=LETTERS) for w in (waveforms, garbage))
    assert torch.equal(clean.nll_N, dirty.nll_N)
    assert torch.equal(clean.ctc.loss_sum, dirty.ctc.loss_sum)


def test_speech_context_and_instruction_all_reach_the_loss(tiny_audio_llm, noise):
    model, batch = tiny_audio_llm(), noise([0.9])
    with torch.no_grad():
        plain = model(*batch, [[10, 11]]).nll_N
        other_speech = model(*noise([0.9], seed=5), [[10, 11]]).nll_N
        with_context = model(*batch, [[10, 11]], [[40]]).nll_N
        other_context = model(*batch, [[10, 11]], [[41]]).nll_N
        model.prompt_tokens.instruction = model.prompt_tokens.instruction[::-1]
        other_instruction = model(*batch, [[10, 11]]).nll_N
    for changed in (other_speech, with_context, other_instruction):
        assert (changed - plain).abs().max() > 1e-3
    assert (other_context - with_context).abs().max() > 1e-3


def test_an_empty_context_is_the_prompt_without_context(tiny_audio_llm, noise):
    model, batch = tiny_audio_llm(), noise([0.9, 0.5])
    with torch.no_grad():
        assert torch.equal(model(*batch, [[5], [6]]).nll_N, model(*batch, [[5], [6]], [[], None]).nll_N)


def test_texts_before_and_after_surround_the_speech(tiny_audio_llm, noise, tokenizer):
    prompts = PromptConfig(before="user: ", after=" assistant:")
    model, batch = tiny_audio_llm(prompts=prompts), noise([0.9])
    prefix, speech = model.build_prompt(model.encode_speech(*batch))[0], model.encode_speech(*batch).speech_BSL[0]
    embed = model.llm.get_input_embeddings()
    before = embed(torch.tensor(tokenizer("user: Transcribe the speech into text:").input_ids))
    after = embed(torch.tensor(tokenizer(" assistant:").input_ids))
    assert torch.equal(prefix, torch.cat([before, speech, after]))


def test_the_speech_has_one_embedding_per_160_ms(tiny_audio_llm, noise):
    model, batch = tiny_audio_llm(converter=ConverterConfig(stride=4)), noise([0.5, 1.0, 2.0])
    _, frames = model.fbank(*batch)
    expected = [math.ceil(math.ceil(t / 4) / 4) for t in frames.tolist()]
    assert model.encode_speech(*batch).lengths_B.tolist() == expected


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_gradient_reaches_the_encoder_through_the_frozen_llm(family, tiny_audio_llm, noise):
    model = tiny_audio_llm(family)
    model.llm.requires_grad_(False)
    before = {name: value.clone() for name, value in model.llm.state_dict().items()}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(*noise(SECONDS), TRANSCRIPTS).loss_sum.backward()
    silent = [n for n, p in model.named_parameters() if n.startswith(("encoder.", "converter.")) and p.grad is None]
    assert not silent
    assert sum(p.grad.abs().sum() for p in model.encoder.parameters()) > 0
    assert all(p.grad is None for p in model.llm.parameters())
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.llm.state_dict().items())


def test_the_gradient_of_a_batch_is_the_sum_of_those_of_its_utterances(tiny_audio_llm, noise):
    model, batch = tiny_audio_llm(), noise(SECONDS)
    model(*batch, TRANSCRIPTS).loss_sum.backward()
    together = {name: p.grad.clone() for name, p in model.converter.named_parameters()}
    model.zero_grad()
    for row in range(4):
        model(*one(batch, row), [TRANSCRIPTS[row]]).loss_sum.backward()
    for name, p in model.converter.named_parameters():
        torch.testing.assert_close(
            p.grad, together[name], rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_a_frozen_llm_stays_in_evaluation_mode_whenever_it_was_frozen(tiny_audio_llm, noise):
    model = tiny_audio_llm()
    model.train()
    assert model.llm.training and model.encoder.training
    model.llm.requires_grad_(False)
    model(*noise([0.5]), [[5]])
    assert not model.llm.training and model.encoder.training
    model.eval().train()
    assert not model.llm.training
    model.llm.requires_grad_(True)
    model(*noise([0.5]), [[5]])
    assert model.llm.training


def test_the_vocabulary_head_sees_target_positions_only(tiny_audio_llm, noise):
    model, rows = tiny_audio_llm(), []
    model.llm.get_output_embeddings().register_forward_hook(lambda m, args, out: rows.append(out.shape))
    model(*noise(SECONDS), TRANSCRIPTS)
    assert rows == [(13, 300)]


def test_parameters_are_named_by_part(tiny_audio_llm):
    model = tiny_audio_llm(ctc=True)
    add_lora(model.llm, LoraSettings(r=2))
    prefixes = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert prefixes == {"encoder", "converter", "ctc_head", "llm"}
    assert all(name.startswith("llm.") for name, _ in model.named_parameters() if "lora_" in name)


def test_the_ctc_head_has_a_class_for_every_byte_and_the_blank(tiny_audio_llm, noise):
    assert tiny_audio_llm(ctc=True).ctc_head.proj.out_features == 257
    assert tiny_audio_llm().ctc_head is None
    with pytest.raises(ValueError, match="no CTC head"):
        tiny_audio_llm()(*noise(SECONDS), TRANSCRIPTS, ctc_targets=LETTERS)


def test_an_llm_in_bfloat16_beside_a_float32_encoder_and_all_in_bfloat16_both_train(tiny_audio_llm, noise):
    exact = tiny_audio_llm(ctc=True)(*noise(SECONDS), TRANSCRIPTS).loss_sum
    mixed, whole = tiny_audio_llm(ctc=True), tiny_audio_llm(ctc=True).bfloat16()
    mixed.llm.bfloat16()
    for model in (mixed, whole):
        out = model(*noise(SECONDS), TRANSCRIPTS, ctc_targets=LETTERS)
        (out.loss_sum + out.ctc.loss_sum).backward()
        assert out.loss_sum.dtype == torch.float32
        assert abs(out.loss_sum - exact) / exact < 0.05
        assert all(p.grad.isfinite().all() for p in model.encoder.parameters())
        assert model.eval().generate(*noise(SECONDS), max_new_tokens=3).shape[0] == 4
    assert mixed.encode_speech(*noise([0.5])).encoder_BTD.dtype == torch.float32


def test_the_number_of_transcripts_must_be_that_of_the_utterances(tiny_audio_llm, noise):
    with pytest.raises(ValueError, match="4 utterances need as many"):
        tiny_audio_llm()(*noise(SECONDS), TRANSCRIPTS[:3])


def test_a_tokenizer_larger_than_the_llm_is_refused(tiny_llm, tiny_encoder, tokenizer):
    llm = tiny_llm()
    llm.resize_token_embeddings(100)
    with pytest.raises(ValueError, match=r"tokenizer has 300 tokens, the LLM embeds 100"):
        AudioLLM.assemble(encoder=tiny_encoder(), llm=llm, tokenizer=tokenizer)


@pytest.mark.parametrize("family", FAMILIES + AFTER_HEAD)
def test_save_and_load_is_exact_and_needs_nothing_else(family, tiny_audio_llm, tmp_path, noise):
    model, batch = tiny_audio_llm(family, ctc=True), noise(SECONDS)
    model.fbank.set_cmvn(torch.full((80,), 0.123456789), torch.full((80,), 1.7))
    model.save_pretrained(tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "moved")
    loaded = AudioLLM.from_pretrained(tmp_path / "moved").eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.fbank.fingerprint() == model.fbank.fingerprint()
    with torch.no_grad():
        assert torch.equal(loaded(*batch, TRANSCRIPTS, CONTEXTS).nll_N, model(*batch, TRANSCRIPTS, CONTEXTS).nll_N)
    tied = model.llm.get_input_embeddings().weight is model.llm.get_output_embeddings().weight
    assert tied == (loaded.llm.get_input_embeddings().weight is loaded.llm.get_output_embeddings().weight)
    assert (
        loaded.processor(text="call Kaitlyn")["transcripts_ids"]
        == model.processor(text="call Kaitlyn")["transcripts_ids"]
    )
    assert loaded.llm.generation_config.eos_token_id == model.llm.generation_config.eos_token_id


def test_a_loaded_model_can_be_saved_again_byte_for_byte(tiny_audio_llm, tmp_path):
    tiny_audio_llm("qwen2").save_pretrained(tmp_path / "a")
    AudioLLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for file in (
        "model.safetensors",
        "config.json",
        "processor_config.json",
        "generation_config.json",
        "tokenizer.json",
    ):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("whole", [False, True])
def test_storage_types_survive_saving(whole, tiny_audio_llm, tmp_path):
    model = tiny_audio_llm(ctc=True)
    (model if whole else model.llm).bfloat16()
    model.save_pretrained(tmp_path)
    loaded = AudioLLM.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype, name
        assert torch.equal(loaded.state_dict()[name], value), name


def test_adapters_are_merged_into_what_is_saved(tiny_audio_llm, tmp_path, noise):
    model, batch = tiny_audio_llm("qwen3"), noise(SECONDS)
    add_lora(model.llm, LoraSettings(r=3))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.eval().save_pretrained(tmp_path)
    loaded = AudioLLM.from_pretrained(tmp_path).eval()
    assert has_lora(model) and not has_lora(loaded)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(*batch, TRANSCRIPTS).nll_N, model(*batch, TRANSCRIPTS).nll_N, rtol=1e-4, atol=1e-4
        )


def test_a_model_built_from_a_bare_config_says_how_to_get_a_processor(tiny_audio_llm):
    with pytest.raises(ValueError, match="no processor: use from_pretrained"):
        _ = AudioLLM(tiny_audio_llm().config).processor


def test_a_folder_with_a_weight_missing_is_refused(tiny_audio_llm, tmp_path):
    model = tiny_audio_llm()
    state = {name: value for name, value in model.state_dict().items() if name != "converter.proj.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"1 weights are missing.*converter\.proj\.weight"):
        AudioLLM.from_pretrained(tmp_path)
