"""Conformer: lengths, padding, positions, checkpointing and sizes."""

from dataclasses import replace

import pytest
import torch

from seedling.model.conformer import (
    PRESETS,
    ConformerConfig,
    ConformerEncoder,
    DepthwiseConv,
    NarrowLinear,
    rotary_angles,
    rotate,
)

SMALL = ConformerConfig(
    num_mel_bins=13, dim=32, num_layers=2, num_heads=2, ff_mult=2, conv_kernel=5, subsampling_channels=4, dropout=0.0
)


def encoder(cfg=SMALL, *, seed=0):
    torch.manual_seed(seed)
    return ConformerEncoder(cfg)


def gradients(model, features_BTF, frames_B):
    """Return h_BTD, lengths_B and the gradients of a loss over valid frames, by parameter name and for the features."""
    model.zero_grad()
    features_BTF = features_BTF.clone().requires_grad_()
    h_BTD, lengths_B = model(features_BTF, frames_B)
    h_BTD.pow(3).sum().backward()
    return (
        h_BTD.detach(),
        lengths_B,
        {n: p.grad.clone() for n, p in model.named_parameters()} | {"x": features_BTF.grad},
    )


def test_40_ms_frames_are_a_quarter_of_10_ms_frames_rounded_up():
    model = encoder(replace(SMALL, num_layers=1)).eval()
    assert ConformerEncoder.output_lengths(torch.arange(1, 101)).tolist() == [-(-n // 4) for n in range(1, 101)]
    for frames in range(1, 101):
        h_BTD, lengths_B = model(torch.randn(1, frames, 13), torch.tensor([frames]))
        assert h_BTD.shape == (1, -(-frames // 4), 32) and lengths_B.tolist() == [-(-frames // 4)]


def test_nan_in_the_padding_changes_no_output_and_no_gradient():
    model, frames_B = encoder(), torch.tensor([40, 17, 1, 38])
    zeros_BTF = torch.randn(4, 42, 13) * (torch.arange(42) < frames_B[:, None])[..., None]
    nans_BTF = zeros_BTF.masked_fill((torch.arange(42) >= frames_B[:, None])[..., None], torch.nan)
    clean_h, clean_lengths, clean_grads = gradients(model, zeros_BTF, frames_B)
    h_BTD, lengths_B, grads = gradients(model, nans_BTF, frames_B)
    assert clean_h.isfinite().all() and clean_h.abs().sum() > 0
    assert torch.equal(h_BTD, clean_h) and torch.equal(lengths_B, clean_lengths)
    for name, grad in clean_grads.items():
        assert torch.equal(grads[name], grad), name
        assert grad.isfinite().all(), name


def test_an_utterance_in_a_batch_equals_itself_alone_and_its_gradient_too():
    model = encoder()
    lengths = [61, 1, 2, 3, 4, 5, 6, 7, 8, 33, 60]
    features_BTF, frames_B = torch.randn(len(lengths), 61, 13), torch.tensor(lengths)
    h_BTD, lengths_B, grads = gradients(model, features_BTF, frames_B)
    summed = {name: torch.zeros_like(grad) for name, grad in grads.items() if name != "x"}
    for b, frames in enumerate(lengths):
        alone_BTD, alone_lengths, alone = gradients(model, features_BTF[b : b + 1, :frames], frames_B[b : b + 1])
        assert alone_lengths[0] == lengths_B[b]
        torch.testing.assert_close(h_BTD[b : b + 1, : lengths_B[b]], alone_BTD, rtol=1e-4, atol=1e-5, msg=f"{frames}")
        assert (h_BTD[b, lengths_B[b] :] == 0).all()
        torch.testing.assert_close(grads["x"][b : b + 1, :frames], alone["x"], rtol=1e-3, atol=1e-4, msg=f"{frames}")
        for name in summed:
            summed[name] += alone[name]
    for name, grad in summed.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item(), msg=name)


def test_the_first_convolution_is_a_3_by_3_convolution_of_stride_2():
    model, features_BTF = encoder(), torch.randn(1, 11, 13)
    subsampling = model.subsampling
    x_BCTF = torch.nn.functional.conv2d(
        features_BTF[:, None], subsampling.conv1.weight.view(4, 1, 3, 3), subsampling.conv1.bias, stride=2, padding=1
    )
    x_BCTF = subsampling.conv2(x_BCTF.relu()).relu()
    expected_BTD = subsampling.proj(x_BCTF.permute(0, 2, 3, 1).flatten(2))
    torch.testing.assert_close(subsampling(features_BTF, torch.tensor([11])), expected_BTD)


@pytest.mark.parametrize("kernel", [1, 5, 15])
def test_the_depthwise_convolution_equals_conv1d(kernel):
    depthwise = DepthwiseConv(6, kernel)
    torch.nn.init.normal_(depthwise.weight)
    torch.nn.init.normal_(depthwise.bias)
    x_BTD = torch.randn(2, 9, 6)
    expected_BDT = torch.nn.functional.conv1d(
        x_BTD.transpose(1, 2), depthwise.weight[:, :, 0], depthwise.bias, padding=kernel // 2, groups=6
    )
    torch.testing.assert_close(depthwise(x_BTD), expected_BDT.transpose(1, 2))


def test_rotary_scores_depend_on_distance_only():
    q_BTHK, k_BTHK = torch.randn(1, 1, 2, 16).expand(1, 30, 2, 16), torch.randn(1, 1, 2, 16).expand(1, 30, 2, 16)
    rotary = rotary_angles(30, 16, q_BTHK.device)
    scores_HTT = torch.einsum("thk,shk->hts", rotate(q_BTHK, rotary)[0], rotate(k_BTHK, rotary)[0])
    torch.testing.assert_close(scores_HTT[:, 5:, 5:], scores_HTT[:, :-5, :-5], rtol=1e-4, atol=1e-4)
    assert (scores_HTT[:, 0, 0] - scores_HTT[:, 0, 7]).abs().min() > 1e-3


def test_activation_checkpointing_changes_no_number():
    plain, recomputing = encoder(), encoder(replace(SMALL, activation_checkpointing=True))
    features_BTF, frames_B = torch.randn(2, 30, 13), torch.tensor([30, 21])
    h_BTD, _, grads = gradients(plain, features_BTF, frames_B)
    again_BTD, _, again = gradients(recomputing, features_BTF, frames_B)
    assert torch.equal(h_BTD, again_BTD)
    assert all(torch.equal(grads[name], again[name]) for name in grads)


def test_layers_are_returned_in_order_and_the_last_is_the_output():
    model, features_BTF, frames_B = encoder().eval(), torch.randn(2, 30, 13), torch.tensor([30, 9])
    h_BTD, lengths_B, layers = model(features_BTF, frames_B, return_layers=True)
    assert len(layers) == 2 and torch.equal(layers[-1], h_BTD) and not torch.equal(layers[0], h_BTD)
    assert torch.equal(h_BTD, model(features_BTF, frames_B)[0])
    assert all((layer[1, lengths_B[1] :] == 0).all() for layer in layers)


def test_dropout_works_in_training_only():
    model, features_BTF, frames_B = encoder(replace(SMALL, dropout=0.5)), torch.randn(1, 30, 13), torch.tensor([30])
    assert not torch.equal(model(features_BTF, frames_B)[0], model(features_BTF, frames_B)[0])
    model.eval()
    assert torch.equal(model(features_BTF, frames_B)[0], model(features_BTF, frames_B)[0])


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16_stays_close_to_float32(how):
    model, features_BTF, frames_B = encoder().eval(), torch.randn(2, 30, 13), torch.tensor([30, 19])
    exact_BTD, _ = model(features_BTF, frames_B)
    if how == "weights":
        half_BTD, _ = model.bfloat16()(features_BTF, frames_B)
        assert half_BTD.dtype == torch.bfloat16
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half_BTD, _ = model(features_BTF, frames_B)
    # Outputs have variance 1; bf16 keeps 8 bits and two layers add about twenty roundings.
    assert (half_BTD - exact_BTD).abs().max() < 20 * 2**-8


def test_a_fresh_encoder_keeps_the_scale_and_every_parameter_learns():
    model = encoder(replace(PRESETS["demo"], num_layers=3))
    h_BTD, _, grads = gradients(model, torch.randn(2, 80, 80), torch.tensor([80, 64]))
    assert h_BTD[0].std().item() == pytest.approx(1, abs=0.1)
    assert all(grads[name].abs().sum() > 0 for name, _ in model.named_parameters())


def closed_form(cfg):
    """Parameters by part: 2 feed-forward layers, attention, convolution, norms; two convolutions and a projection."""
    d, ff, c = cfg.dim, cfg.ff_mult * cfg.dim, cfg.subsampling_channels
    layer = (
        2 * (2 * d * ff + ff + d) + (4 * d * d + 4 * d) + (3 * d * d + 3 * d) + (cfg.conv_kernel + 1) * d + 5 * 2 * d
    )
    front = (9 * c + c) + (9 * c * c + c) + (-(-cfg.num_mel_bins // 4) * c * d + d)
    return front + cfg.num_layers * layer + 2 * d


NOMINAL = {"demo": 2e6, "75M": 75e6, "0.2B": 0.2e9, "0.6B": 0.6e9, "2B": 2e9, "5B": 5e9}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_of_their_name(name):
    with torch.device("meta"):
        model = ConformerEncoder(PRESETS[name])
    count = sum(p.numel() for p in model.parameters())
    assert count == closed_form(PRESETS[name])
    # Names are rounded to one digit, and Seed-ASR's widths are unknown: 24 x 640, our 0.2B, is 14 % above its name and
    # 32 x 1536, our 2B, 12 % below. The sizes are at least a factor 2.5 apart, so 25 % cannot confuse two of them.
    assert count == pytest.approx(NOMINAL[name], rel=0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 100, "num_heads": 3}, r"encoder.dim \(100\) must be divisible by 2 x encoder.num_heads \(3\)"),
        ({"dim": 12, "num_heads": 4}, r"encoder.dim \(12\) must be divisible"),
        ({"conv_kernel": 4}, r"encoder.conv_kernel \(4\) must be odd"),
        ({"dropout": 1.0}, r"encoder.dropout \(1.0\)"),
    ],
)
def test_impossible_shapes_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ConformerConfig(**options)


def test_the_narrow_linear_layer_is_a_linear_layer_in_values_and_gradients():
    torch.manual_seed(0)
    narrow, plain = NarrowLinear(9, 32).double(), torch.nn.Linear(9, 32).double()
    plain.load_state_dict(narrow.state_dict())
    x = torch.randn(2, 5, 40, 9, dtype=torch.float64)
    weights = torch.randn(2, 5, 40, 32, dtype=torch.float64)
    for layer in (narrow, plain):
        (layer(x) * weights).sum().backward()
    torch.testing.assert_close(narrow(x), plain(x))
    for name, parameter in narrow.named_parameters():
        torch.testing.assert_close(
            parameter.grad, plain.get_parameter(name).grad, msg=lambda text, name=name: name + text
        )
