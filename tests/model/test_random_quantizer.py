"""Random-projection codes: the nearest codebook entry by brute force, the same whatever else is in the batch."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from seedling.model import random_quantizer
from seedling.model.conformer import ConformerConfig, ConformerEncoder
from seedling.model.features import Fbank, FeatureConfig
from seedling.model.random_quantizer import QuantizerConfig, RandomProjectionQuantizer, stacked

BINS = 80


def quantizer(**settings) -> RandomProjectionQuantizer:
    return RandomProjectionQuantizer(QuantizerConfig(**{"codebook_size": 500, **settings}), num_mel_bins=BINS)


def features(lengths: list[int], *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(T, BINS, generator=generator) for T in lengths]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(lengths)


def brute_force(frames_TF: np.ndarray, quantizer: RandomProjectionQuantizer) -> np.ndarray:
    """The formula in numpy and float64, one label frame and one codebook after the other."""
    x_TF = (frames_TF - frames_TF.mean(0)) / np.maximum(frames_TF.std(0), 0.1)
    x_TF = np.concatenate([x_TF, np.zeros((-len(x_TF) % 4, BINS))])
    labels = []
    for x_X in x_TF.reshape(-1, 4 * BINS):
        x_X = (x_X - x_X.mean()) / np.sqrt(x_X.var() + 1e-5)
        row = []
        for A_HX, C_VH in zip(quantizer.projection_NHX.double().numpy(), quantizer.codebook_NVH.double().numpy()):
            z_H = A_HX @ x_X
            distance_V = np.linalg.norm(
                C_VH / np.linalg.norm(C_VH, axis=1)[:, None] - z_H / np.linalg.norm(z_H), axis=1
            )
            row.append(distance_V.argmin())
        labels.append(row)
    return np.array(labels)


def test_a_label_is_the_nearest_normalised_codebook_entry():
    codes, (features_BTF, frames_B) = quantizer(num_codebooks=3), features([37, 61])
    labels_BLN, lengths_B = codes(features_BTF, frames_B)
    for b, (T, L) in enumerate(zip(frames_B.tolist(), lengths_B.tolist())):
        expected = brute_force(features_BTF[b, :T].double().numpy(), codes)
        assert labels_BLN[b, :L].tolist() == expected.tolist()


@pytest.mark.parametrize("chunk", [1, 499, 500, 7777, 1 << 24])
def test_codes_do_not_depend_on_how_many_cosines_are_in_memory(chunk, monkeypatch):
    codes, x_MX = quantizer(num_codebooks=2), torch.randn(61, 4 * BINS, generator=torch.Generator().manual_seed(1))
    expected = codes.codes(x_MX)
    monkeypatch.setitem(random_quantizer.CHUNK_SCORES, "cpu", chunk)
    assert torch.equal(codes.codes(x_MX), expected)


def test_there_is_one_label_for_every_encoder_frame_of_every_length():
    encoder = ConformerEncoder(ConformerConfig(dim=8, num_layers=1, num_heads=2, subsampling_channels=2)).eval()
    codes = quantizer(codebook_size=4)
    for T in range(1, 101):
        features_BTF, frames_B = features([T])
        labels_BLN, lengths_B = codes(features_BTF, frames_B)
        h_BTD, encoder_lengths_B = encoder(features_BTF, frames_B)
        assert torch.equal(lengths_B, encoder_lengths_B) and labels_BLN.shape[1] == h_BTD.shape[1], T
        assert lengths_B.item() == ((T + 1) // 2 + 1) // 2 and (labels_BLN >= 0).all(), T


def test_codes_are_the_same_alone_in_any_batch_and_in_any_order():
    codes, lengths = quantizer(num_codebooks=2, codebook_size=8192), [120, 7, 33, 250, 64, 1]
    features_BTF, frames_B = features(lengths)
    together_BLN, label_lengths_B = codes(features_BTF, frames_B)
    order = [3, 1, 5, 0, 2, 4]
    shuffled_BLN, _ = codes(features_BTF[order], frames_B[order])
    for place, b in enumerate(order):
        T, L = lengths[b], int(label_lengths_B[b])
        alone_BLN, _ = codes(features_BTF[b : b + 1, :T], frames_B[b : b + 1])
        assert torch.equal(alone_BLN[0], together_BLN[b, :L]), b
        assert torch.equal(shuffled_BLN[place, :L], together_BLN[b, :L]), b


def test_padding_is_never_labelled_and_its_content_changes_nothing():
    codes, (features_BTF, frames_B) = quantizer(), features([40, 9, 22])
    clean_BLN, lengths_B = codes(features_BTF, frames_B)
    for junk in (float("nan"), 1e30, -7.0):
        spoiled_BTF = features_BTF.clone()
        for b, T in enumerate(frames_B.tolist()):
            spoiled_BTF[b, T:] = junk
        assert torch.equal(codes(spoiled_BTF, frames_B)[0], clean_BLN)
    for b, L in enumerate(lengths_B.tolist()):
        assert (clean_BLN[b, L:] == -1).all() and (clean_BLN[b, :L] >= 0).all()


def test_chosen_frames_get_the_codes_that_they_have_among_all():
    codes, (features_BTF, frames_B) = quantizer(num_codebooks=2), features([80, 64])
    labels_BLN, _ = codes(features_BTF, frames_B)
    chosen = torch.tensor([0, 5, 17, 20, 35])
    x_MX = stacked(features_BTF, frames_B)[0].flatten(0, 1)[chosen]
    assert torch.equal(codes.codes(x_MX), labels_BLN.flatten(0, 1)[chosen])


def test_neither_bfloat16_nor_autocast_changes_a_code():
    codes, (features_BTF, frames_B) = quantizer(codebook_size=8192), features([400])
    expected, before = codes(features_BTF, frames_B)[0], codes.fingerprint()
    codes.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codes(features_BTF, frames_B)[0], expected)
    assert codes.fingerprint() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU's codes with the CPU's")
def test_a_gpu_gives_the_codes_of_the_cpu():
    codes, (features_BTF, frames_B) = quantizer(codebook_size=8192), features([400, 1000])
    expected = codes(features_BTF, frames_B)[0]
    assert torch.equal(codes.cuda()(features_BTF.cuda(), frames_B.cuda())[0].cpu(), expected)


def test_a_seed_draws_the_same_codes_in_another_process_whatever_was_drawn_before():
    before = quantizer(seed=3).fingerprint()
    torch.manual_seed(99)
    assert quantizer(seed=3).fingerprint() == before != quantizer(seed=4).fingerprint()
    code = (
        "import torch; torch.rand(7); from seedling.model.random_quantizer import *;"
        "print(RandomProjectionQuantizer(QuantizerConfig(codebook_size=500, seed=3), num_mel_bins=80).fingerprint())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == before, done.stderr[-2000:]


def test_building_one_leaves_the_global_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    quantizer()
    assert torch.equal(torch.rand(3), expected)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    codes = quantizer(num_codebooks=2, code_dim=8)
    codes.codebook_NVH.mul_(-1)  # as if another torch had drawn it: the file counts, not the seed
    codes.save(tmp_path / "quantizer.safetensors")
    again = RandomProjectionQuantizer.load(tmp_path / "quantizer.safetensors")
    assert again.fingerprint() == codes.fingerprint() and again.cfg == codes.cfg


def test_it_has_nothing_to_train_and_its_distributions_are_those_of_the_paper():
    codes = quantizer(num_codebooks=4, codebook_size=4096)
    assert not list(codes.parameters())
    bound = (6 / (320 + 16)) ** 0.5
    assert codes.projection_NHX.abs().max() <= bound
    assert codes.projection_NHX.var().item() == pytest.approx(bound**2 / 3, rel=0.05)
    # Normalised Gaussians are uniform on the sphere: mean 0, and 1 / H of the square in each direction.
    assert codes.codebook_NVH.mean((0, 1)).abs().max() < 0.01
    torch.testing.assert_close(codes.codebook_NVH.square().mean((0, 1)), torch.full((16,), 1 / 16), rtol=0.05, atol=0)


def test_loudness_and_channel_do_not_change_the_codes():
    """A gain is the same constant in every log-mel value, a channel one constant per bin."""
    codes, (features_BTF, frames_B) = quantizer(), features([300])
    expected = codes(features_BTF, frames_B)[0]
    channel_F = torch.linspace(-3, 3, BINS)
    agreed = (codes(features_BTF + channel_F, frames_B)[0] == expected).float().mean()
    assert agreed > 0.99, agreed  # float32 features carry less beside a large constant


@pytest.mark.parametrize("value", [0, 17])
def test_an_impossible_number_of_codebooks_is_refused(value):
    with pytest.raises(ValueError, match=rf"quantizer.num_codebooks \({value}\) must lie within 1 and 16"):
        QuantizerConfig(num_codebooks=value)


def test_real_speech_uses_more_than_a_fifth_of_the_codes(speech_dir):
    """Section 11's gate, on 17 minutes of it; without the vector norm it is 5 % (the head of random_quantizer.py)."""
    import json

    import soundfile
    import soxr

    waves = []
    for line in (speech_dir / "librispeech_250/train.jsonl").read_text().splitlines()[:120]:
        wave, rate = soundfile.read(
            speech_dir / "librispeech_250" / json.loads(line)["audio_filepath"], dtype="float32"
        )
        waves.append(torch.from_numpy(soxr.resample(wave, rate, 16000) if rate != 16000 else wave)[None])
    batches = [(wave_BN, torch.tensor([wave_BN.shape[1]])) for wave_BN in waves]
    fbank = Fbank(FeatureConfig())
    fbank.estimate_cmvn(batches)
    shares = []
    for size in (1024, 2048):
        codes = quantizer(codebook_size=size, num_codebooks=4)
        labels_MN = torch.cat([codes(*fbank(*batch))[0][0] for batch in batches])
        for labels_M in labels_MN.unbind(1):
            share_V = torch.bincount(labels_M, minlength=size).double() / len(labels_M)
            shares.append(torch.special.entr(share_V).sum().exp().item() / size)
    assert min(shares) > 0.2, shares
