"""Converter: lengths, what is stacked with what, and that padding counts as zeros."""

import pytest
import torch

from seedling.model.converter import Converter, ConverterConfig


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_lengths_are_rounded_up_for_every_length_and_padding(stride):
    converter = Converter(ConverterConfig(stride), encoder_dim=2, llm_dim=3)
    for length in range(1, 14):
        for padding in range(3):
            speech_BSL, lengths_B = converter(torch.randn(1, length + padding, 2), torch.tensor([length]))
            assert lengths_B.tolist() == [(length + stride - 1) // stride]
            assert speech_BSL.shape == (1, (length + padding + stride - 1) // stride, 3)


def test_a_position_is_the_projection_of_its_own_normalised_frames_in_order():
    converter = Converter(encoder_dim=5, llm_dim=7)
    h_BTD = torch.randn(1, 8, 5)
    speech_BSL, _ = converter(h_BTD, torch.tensor([8]))
    frames_TD = torch.nn.functional.layer_norm(h_BTD[0], (5,))
    expected_L = converter.proj.weight @ frames_TD[4:8].flatten() + converter.proj.bias
    torch.testing.assert_close(speech_BSL[0, 1], expected_L)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 10, 11])
def test_nan_past_the_end_changes_neither_outputs_nor_gradients(length):
    torch.manual_seed(0)
    converter = Converter(encoder_dim=6, llm_dim=5)
    torch.nn.init.normal_(converter.norm.bias)  # a bias of zero would hide a missing mask after the norm
    clean_BTD = torch.randn(1, length, 6)
    results = []
    for filler, padding in ((0.0, 0), (float("nan"), 11 - length), (7.0, 5)):
        h_BTD = torch.nn.functional.pad(clean_BTD, (0, 0, 0, padding), value=filler).requires_grad_()
        converter.zero_grad()
        speech_BSL, lengths_B = converter(h_BTD, torch.tensor([length]))
        valid_BSL = speech_BSL[:, : lengths_B[0]]
        valid_BSL.square().sum().backward()
        results.append([valid_BSL, h_BTD.grad[:, :length], *(p.grad.clone() for p in converter.parameters())])
        assert (h_BTD.grad[:, length:] == 0).all()
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


def test_a_stride_below_1_is_an_error():
    with pytest.raises(ValueError, match=r"converter.stride \(0\)"):
        ConverterConfig(stride=0)


def test_a_fresh_converter_speaks_as_loudly_as_the_tokens():
    torch.manual_seed(0)
    converter = Converter(ConverterConfig(stride=2), encoder_dim=64, llm_dim=96)
    embeddings_VL = torch.randn(500, 96) * 0.02
    converter.match_scale(embeddings_VL)
    speech_BSL, _ = converter(torch.randn(4, 40, 64), torch.full((4,), 40))
    assert 0.9 < speech_BSL.std() / embeddings_VL.std() < 1.1
