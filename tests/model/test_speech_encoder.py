"""A speech encoder's folder: what is saved is what is loaded, with its features, or an error."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

import seedling  # noqa: F401  registers with transformers
from seedling.model.conformer import ConformerConfig
from seedling.model.features import Fbank, FeatureConfig
from seedling.model.speech_encoder import SpeechEncoder, load_speech_encoder, speech_encoder_facts


@pytest.fixture
def model(tiny_encoder, noise) -> SpeechEncoder:
    fbank = Fbank(FeatureConfig())
    fbank.estimate_cmvn([noise([0.5, 0.7])])
    return SpeechEncoder.assemble(fbank=fbank, encoder=tiny_encoder()).eval()


def test_saved_and_loaded_it_gives_the_same_frames_by_its_own_and_by_the_auto_class(model, noise, tmp_path):
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "seedling_speech_encoder"
    wave_BN, lengths_B = noise([0.4, 0.33])
    expected = model(wave_BN, lengths_B)
    for again in (SpeechEncoder.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(again) is SpeechEncoder and not again.training
        assert again.fbank.fingerprint() == model.fbank.fingerprint()
        assert all(torch.equal(a, b) for a, b in zip(again(wave_BN, lengths_B), expected))


def test_every_layer_is_returned_and_the_last_one_is_the_output(model, noise):
    h_BTD, lengths_B, layers = model(*noise([0.4, 0.33]), return_layers=True)
    assert len(layers) == model.encoder.cfg.num_layers and torch.equal(layers[-1], h_BTD)
    assert torch.equal(lengths_B, model.output_lengths(noise([0.4, 0.33])[1]))


def test_bfloat16_weights_come_back_in_float32_and_the_features_have_never_left_it(model, tmp_path):
    before = model.fbank.fingerprint()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["encoder.norm.weight"].dtype == torch.bfloat16
    again = SpeechEncoder.from_pretrained(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert again.fbank.fingerprint() == before
    half = SpeechEncoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.fbank.fingerprint() == before


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_a_folder_that_lacks_a_weight_is_refused(model, tmp_path, damage):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if damage == "missing":
        del weights["encoder.norm.bias"]
    else:
        weights["encoder.norm.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"encoder\.norm\.bias|misshapen|mismatch"):
        SpeechEncoder.from_pretrained(tmp_path)


def test_facts_say_features_and_frame_rate(model, tmp_path):
    facts = speech_encoder_facts(model)
    assert facts == {"feature_fingerprint": model.fbank.fingerprint(), "encoder_frames_per_second": 25.0}
    json.dumps(facts)


def test_whoever_goes_on_from_an_encoder_may_change_its_chunks_and_keeps_them_otherwise(model, tmp_path):
    model.save_pretrained(tmp_path / "whole")

    def go_on(path, **options):
        return load_speech_encoder(path, features=FeatureConfig(), encoder=ConformerConfig(**options))

    config = json.loads((tmp_path / "whole/config.json").read_text())
    for name in ("attention_chunk", "attention_left_chunks", "train_attention_chunks"):
        del config["audio_config"][name]  # as an encoder from before there were chunks
    (tmp_path / "whole/config.json").write_text(json.dumps(config))
    assert go_on(tmp_path / "whole").encoder.cfg.attention_chunk is None
    chunked = go_on(tmp_path / "whole", attention_chunk=50, attention_left_chunks=1, train_attention_chunks=[0, 50])
    chunked.save_pretrained(tmp_path / "chunked")
    kept = go_on(tmp_path / "chunked").encoder.cfg
    assert (kept.attention_chunk, kept.attention_left_chunks, kept.train_attention_chunks) == (50, 1, [])
    assert go_on(tmp_path / "chunked", attention_chunk=0).encoder.cfg.attention_chunk == 0
