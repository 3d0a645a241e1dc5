"""Chunked attention equals attention under an explicit mask, and its cost grows with the length alone."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from seedling.model.chunked_attention import chunked_attention
from seedling.model.conformer import ConformerConfig, ConformerEncoder

SMALL = ConformerConfig(
    num_mel_bins=13, dim=32, num_layers=2, num_heads=2, ff_mult=2, conv_kernel=5, subsampling_channels=4, dropout=0.0
)


def masked_attention(q_BTHK, k_BTHK, v_BTHK, valid_BT, *, chunk, left):
    """The equation: frame t sees frame s where s is valid and in t's chunk or one of the `left` before it."""
    number_T = torch.arange(valid_BT.shape[1]) // chunk
    behind_TT = number_T[:, None] - number_T
    seen_BTT = valid_BT[:, None] & (behind_TT >= 0) & (behind_TT <= left)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    return scaled_dot_product_attention(q, k, v, attn_mask=seen_BTT[:, None]).transpose(1, 2)


@pytest.mark.parametrize("left", [0, 1, 3])
@pytest.mark.parametrize(("T", "chunk"), [(1, 1), (7, 1), (12, 4), (13, 4), (9, 8), (30, 7), (5, 9)])
def test_values_and_gradients_equal_those_under_a_mask(T, chunk, left):
    torch.manual_seed(0)
    lengths_B = torch.tensor([T, max(1, T - 3), 1])
    valid_BT = torch.arange(T) < lengths_B[:, None]
    inputs = [torch.randn(3, T, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights_BTHK = torch.randn(3, T, 2, 6, dtype=torch.float64) * valid_BT[..., None, None]
    found, grads = [], []
    for attend in (chunked_attention, masked_attention):
        context_BTHK = attend(*inputs, valid_BT, chunk=chunk, left=left)
        # A frame of padding may see nothing at all under the mask; it is compared nowhere.
        context_BTHK = torch.where(valid_BT[..., None, None], context_BTHK, 0.0)
        found.append(context_BTHK)
        grads.append(torch.autograd.grad((context_BTHK * weights_BTHK).sum(), inputs))
    torch.testing.assert_close(*found)
    for name, ours, theirs in zip("qkv", *grads):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def encoder(seed=0, **options):
    torch.manual_seed(seed)
    return ConformerEncoder(replace(SMALL, **options))


def gradients(model, features_BTF, frames_B):
    model.zero_grad()
    h_BTD, _ = model(features_BTF, frames_B)
    h_BTD.pow(3).sum().backward()
    return h_BTD.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


FRAMES_B = torch.tensor([90, 37, 1, 71])
FEATURES_BTF = torch.randn(4, 90, 13, generator=torch.Generator().manual_seed(1))


def test_no_chunk_and_a_chunk_as_long_as_the_audio_are_bit_identical():
    whole_BTD, grads = gradients(encoder(), FEATURES_BTF, FRAMES_B)
    for options in ({"attention_chunk": 0}, {"attention_chunk": 23}, {"train_attention_chunks": [0, 1000]}):
        h_BTD, again = gradients(encoder(**options), FEATURES_BTF, FRAMES_B)
        assert torch.equal(h_BTD, whole_BTD), options
        assert all(torch.equal(again[name], grad) for name, grad in grads.items()), options


def test_nothing_but_the_convolutions_reaches_across_the_edge_of_a_chunk():
    model = encoder(attention_chunk=8, conv_kernel=1).eval()
    other_BTF = FEATURES_BTF.clone()
    other_BTF[:, 40:] += 1.0  # frames of 10 ms: 40 and later make frame 10 and later, in the chunk of frames 8 to 15
    h_BTD, other_BTD = (model(x_BTF, torch.full((4,), 90))[0] for x_BTF in (FEATURES_BTF, other_BTF))
    assert torch.equal(h_BTD[:, :8], other_BTD[:, :8])
    assert not torch.equal(h_BTD[:, 8], other_BTD[:, 8])
    left = encoder(attention_chunk=8, attention_left_chunks=1, conv_kernel=1, num_layers=1).eval()
    early_BTF = FEATURES_BTF.clone()
    early_BTF[:, :8] += 1.0
    h_BTD, other_BTD = (left(x_BTF, torch.full((4,), 90))[0] for x_BTF in (FEATURES_BTF, early_BTF))
    assert not torch.equal(h_BTD[:, 15], other_BTD[:, 15]) and torch.equal(h_BTD[:, 16:], other_BTD[:, 16:])


@pytest.mark.parametrize("left", [0, 1])
def test_nan_in_the_padding_changes_no_output_and_no_gradient(left):
    model = encoder(attention_chunk=6, attention_left_chunks=left)
    past_BT1 = (torch.arange(90) >= FRAMES_B[:, None])[..., None]
    clean_BTD, clean = gradients(model, FEATURES_BTF.masked_fill(past_BT1, 0.0), FRAMES_B)
    h_BTD, grads = gradients(model, FEATURES_BTF.masked_fill(past_BT1, torch.nan), FRAMES_B)
    assert clean_BTD.isfinite().all() and torch.equal(h_BTD, clean_BTD)
    for name, grad in clean.items():
        assert grad.isfinite().all() and torch.equal(grads[name], grad), name


@pytest.mark.parametrize("left", [0, 2])
def test_an_utterance_in_a_batch_equals_itself_alone(left):
    model = encoder(attention_chunk=7, attention_left_chunks=left).eval()
    h_BTD, lengths_B = model(FEATURES_BTF, FRAMES_B)
    for b, frames in enumerate(FRAMES_B.tolist()):
        alone_BTD, _ = model(FEATURES_BTF[b : b + 1, :frames], FRAMES_B[b : b + 1])
        torch.testing.assert_close(h_BTD[b, : lengths_B[b]], alone_BTD[0], rtol=1e-4, atol=1e-5)


def test_recomputation_and_layers_keep_the_chunks_that_were_drawn():
    options = {"train_attention_chunks": [0, 3, 6, 11]}
    plain, recomputing = encoder(**options), encoder(**options, activation_checkpointing=True)
    outputs = set()
    for seed in range(12):
        torch.manual_seed(seed)
        h_BTD, grads = gradients(plain, FEATURES_BTF, FRAMES_B)
        torch.manual_seed(seed)
        again_BTD, again = gradients(recomputing, FEATURES_BTF, FRAMES_B)
        assert torch.equal(h_BTD, again_BTD)
        assert all(torch.equal(again[name], grad) for name, grad in grads.items())
        torch.manual_seed(seed)
        layered_BTD, _, layers = plain(FEATURES_BTF, FRAMES_B, return_layers=True)
        assert torch.equal(layered_BTD, h_BTD) and torch.equal(layers[-1], h_BTD) and len(layers) == 2
        outputs.add(h_BTD.sum().item())
    assert len(outputs) == 4  # each of the chunks, and nothing else


def test_random_chunks_are_for_training_only():
    drawn, fixed = encoder(train_attention_chunks=[3], attention_chunk=6), encoder(attention_chunk=6)
    with torch.no_grad():
        h_BTD = fixed.eval()(FEATURES_BTF, FRAMES_B)[0]
        assert torch.equal(drawn.eval()(FEATURES_BTF, FRAMES_B)[0], h_BTD)
        assert not torch.equal(drawn.train()(FEATURES_BTF, FRAMES_B)[0], h_BTD)


def test_chunks_add_no_parameters():
    assert encoder().state_dict().keys() == encoder(attention_chunk=6, attention_left_chunks=1).state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_chunk": -1}, r"encoder.attention_chunk \(-1\)"),
        ({"attention_chunk": 5, "attention_left_chunks": -2}, r"encoder.attention_left_chunks \(-2\)"),
        ({"train_attention_chunks": [0, -3]}, r"encoder.train_attention_chunks \(\[0, -3\]\)"),
        ({"attention_left_chunks": 1}, r"no chunks; set encoder.attention_chunk"),
    ],
)
def test_impossible_chunks_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **options)


PEAK = """
import sys, torch
from seedling.model.conformer import ConformerConfig, ConformerEncoder
torch.set_num_threads(1)
model = ConformerEncoder(ConformerConfig(dim=32, num_layers=2, num_heads=2, ff_mult=2, subsampling_channels=4,
    dropout=0.0, attention_chunk=200))
def peak():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
def run(seconds):
    model(torch.randn(1, 100 * seconds, 80), torch.tensor([100 * seconds]))[0].sum().backward()
run(10)
before = peak()
run(int(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_five_minutes_cost_no_more_than_five_times_one_minute_in_memory():
    peak = {s: float(subprocess.check_output([sys.executable, "-c", PEAK, str(s)])) for s in (60, 300)}
    assert 20 < peak[300] < 1.1 * 5 * peak[60] + 20, peak  # MB; one T x T matrix of booleans would add 56
