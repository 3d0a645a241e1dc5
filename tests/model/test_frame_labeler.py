"""The frame labeler: nearest centroids of one layer, by brute force; padding, batches and casts change no label."""

import pytest
import torch

from seedling.model.conformer import ConformerConfig, ConformerEncoder
from seedling.model.features import Fbank
from seedling.model.frame_labeler import NO_LABEL, FrameLabeler, cut_encoder
from seedling.model.speech_encoder import SpeechEncoder

LAYERS = 3


@pytest.fixture
def encoder() -> SpeechEncoder:
    torch.manual_seed(0)
    shape = ConformerConfig(dim=24, num_layers=LAYERS, num_heads=2, conv_kernel=3, subsampling_channels=8, dropout=0.2)
    fbank = Fbank()
    fbank.set_cmvn(torch.full((80,), 14.0), torch.full((80,), 3.0))
    return SpeechEncoder.assemble(fbank=fbank, encoder=ConformerEncoder(shape)).eval()


@pytest.fixture
def labeler(encoder) -> FrameLabeler:
    return FrameLabeler(cut_encoder(encoder, layer=2), torch.randn(40, 24, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_cut_encoder_gives_the_layer_of_the_whole_one(encoder, noise, layer):
    wave = noise([0.7, 0.41])
    _, _, layers = encoder(*wave, return_layers=True)
    h_BTD, lengths_B = cut_encoder(encoder, layer=layer).eval()(*wave)
    assert torch.equal(h_BTD, layers[layer - 1]) and torch.equal(lengths_B, encoder.output_lengths(wave[1]))


def test_the_cut_encoder_shares_nothing_with_the_whole_one(encoder):
    cut = cut_encoder(encoder, layer=1)
    assert not {p.data_ptr() for p in cut.parameters()} & {p.data_ptr() for p in encoder.parameters()}
    assert cut.fbank.fingerprint() == encoder.fbank.fingerprint() and len(cut.encoder.layers) == 1


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_a_layer_that_is_not_there_is_refused(encoder, layer):
    with pytest.raises(ValueError, match=rf"layer \({layer}\) must be 1 to 3"):
        cut_encoder(encoder, layer=layer)


def test_labels_are_the_nearest_centroids_of_that_layer_by_brute_force(encoder, labeler, noise):
    wave = noise([0.9, 0.5, 0.03])
    _, lengths_B, layers = encoder(*wave, return_layers=True)
    labels_BT, found_lengths_B = labeler(*wave)
    assert torch.equal(found_lengths_B, lengths_B)
    for b, length in enumerate(lengths_B.tolist()):
        frames_TD = layers[1][b, :length].double()
        squared_TK = (frames_TD[:, None] - labeler.centroids_KD.double()).square().sum(-1)
        assert labels_BT[b, :length].tolist() == squared_TK.argmin(1).tolist()
        assert (labels_BT[b, length:] == NO_LABEL).all()


def test_padding_and_neighbours_do_not_change_labels(labeler, noise):
    """But where two centroids are as near as rounding: none is in this batch."""
    wave_BN, lengths_B = noise([0.6, 1.1, 0.2])
    together, frames_B = labeler(wave_BN, lengths_B)
    broken_BN = wave_BN.clone()
    for row, length in zip(broken_BN, lengths_B.tolist()):
        row[length:] = float("nan")
    assert torch.equal(labeler(broken_BN, lengths_B)[0], together)
    for b in range(3):
        alone, _ = labeler(wave_BN[b : b + 1, : lengths_B[b]], lengths_B[b : b + 1])
        assert alone[0].tolist() == together[b, : frames_B[b]].tolist()


def test_it_has_no_gradient_no_dropout_and_float32_centroids_whatever_is_asked_of_it(labeler, noise):
    wave = noise([0.5])
    before = labeler(*wave)[0]
    labeler.train()
    assert torch.equal(labeler(*wave)[0], before)
    assert not any(p.requires_grad for p in labeler.parameters())
    centroids = labeler.centroids_KD.clone()
    labeler.to(torch.bfloat16)
    assert torch.equal(labeler.centroids_KD, centroids) and labeler.encoder.dtype == torch.bfloat16


def test_saved_and_loaded_it_gives_the_same_labels(labeler, noise, tmp_path):
    labeler.save_pretrained(tmp_path)
    again = FrameLabeler.from_pretrained(tmp_path)
    assert torch.equal(again(*noise([0.8]))[0], labeler(*noise([0.8]))[0]) and again.num_codes == 40


def test_centroids_of_another_width_are_refused(encoder):
    with pytest.raises(ValueError, match="centroids of width 23 do not fit an encoder of 24"):
        FrameLabeler(encoder, torch.zeros(4, 23))
