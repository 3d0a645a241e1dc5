"""Fbank against kaldi-native-fbank, and what keeps it the same in every batch, precision and stage."""

import copy

import kaldi_native_fbank
import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from seedling.model.features import LOG_FLOOR, Fbank, FeatureConfig, mel_weights, window_weights

RATE = 16000
# float32 carries 16 nats (70 dB). In a bin farther below its frame's loudest one Kaldi is itself up to 2e-2 from
# float64 on LibriSpeech, so there the two errors are compared.
CARRIED_NATS = 16


def kaldi(waveform_N, cfg=None):
    cfg = cfg or FeatureConfig()
    options = kaldi_native_fbank.FbankOptions()
    frame, mel = options.frame_opts, options.mel_opts
    frame.dither, frame.samp_freq, frame.window_type = 0, cfg.sample_rate, cfg.window
    frame.snip_edges, frame.remove_dc_offset, frame.preemph_coeff = cfg.snip_edges, cfg.remove_dc, cfg.preemphasis
    frame.frame_length_ms, frame.frame_shift_ms = cfg.frame_length_ms, cfg.frame_shift_ms
    mel.num_bins, mel.low_freq, mel.high_freq = cfg.num_mel_bins, cfg.low_freq, cfg.high_freq
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(cfg.sample_rate, np.asarray(waveform_N, dtype=np.float32) * 32768)
    fbank.input_finished()
    return np.stack([fbank.get_frame(t) for t in range(fbank.num_frames_ready)])


def ours(waveform_N, fbank=None):
    waveform_N = torch.as_tensor(waveform_N, dtype=torch.float32)
    features_BTF, frames_B = (fbank or Fbank())(waveform_N[None], torch.tensor([len(waveform_N)]))
    assert features_BTF.shape[1] == frames_B[0]
    return features_BTF[0].numpy()


def exact(waveform_N, cfg):
    """The equations in float64."""
    samples_N = np.asarray(waveform_N, dtype=np.float32).astype(np.float64) * 32768
    frames_TW = np.lib.stride_tricks.sliding_window_view(samples_N, cfg.window_size)[:: cfg.shift]
    frames_TW = frames_TW - frames_TW.mean(-1, keepdims=True)
    before_TW = np.concatenate([frames_TW[:, :1], frames_TW[:, :-1]], axis=1)
    frames_TW = (frames_TW - cfg.preemphasis * before_TW) * window_weights(cfg).double().numpy()
    power_TP = np.abs(np.fft.rfft(frames_TW, cfg.fft_size)) ** 2
    return np.log(np.maximum(power_TP @ mel_weights(cfg).double().numpy(), LOG_FLOOR))


def assert_equals_kaldi(waveform_N, cfg=None, *, name):
    expected_TF, found_TF = kaldi(waveform_N, cfg), ours(waveform_N, Fbank(cfg))
    assert found_TF.shape == expected_TF.shape, name
    carried_TF = expected_TF > expected_TF.max(-1, keepdims=True) - CARRIED_NATS
    difference = np.abs(found_TF - expected_TF)[carried_TF].max()
    assert difference <= 1e-3, f"{name}: {difference:.2g}"
    if not carried_TF.all():
        exact_TF = exact(waveform_N, cfg or FeatureConfig())
        our_error, kaldi_error = np.abs(found_TF - exact_TF).max(), np.abs(expected_TF - exact_TF).max()
        assert our_error <= 2 * kaldi_error + 1e-3, f"{name}: ours {our_error:.2g}, Kaldi's {kaldi_error:.2g}"


def synthetic():
    rng = np.random.default_rng(0)
    time_N = np.arange(RATE) / RATE
    return {
        "noise": rng.uniform(-0.9, 0.9, RATE),
        "chirp": 0.5 * np.sin(2 * np.pi * (100 + 3500 * time_N) * time_N) + 1e-3 * rng.standard_normal(RATE),
        "direct current": 0.3 + 1e-2 * rng.standard_normal(RATE),
        "one bit of noise": rng.integers(0, 2, RATE) / 32768,
        "digital silence": np.zeros(RATE),
        "one frame": rng.standard_normal(400) * 0.1,
        "one sample less than two frames": rng.standard_normal(559) * 0.1,
        "two frames": rng.standard_normal(560) * 0.1,
    }


@pytest.mark.parametrize("name", synthetic())
def test_equals_kaldi_on_synthetic_audio(name):
    assert_equals_kaldi(synthetic()[name], name=name)


@pytest.mark.parametrize(
    "cfg",
    [
        FeatureConfig(snip_edges=False),
        FeatureConfig(sample_rate=8000, num_mel_bins=40, window="hamming", high_freq=-200, preemphasis=0.9),
        FeatureConfig(remove_dc=False, window="hanning", frame_shift_ms=12.5, low_freq=60, high_freq=7000),
        FeatureConfig(frame_length_ms=20, frame_shift_ms=20, window="rectangular", num_mel_bins=23),
    ],
    ids=["mirrored edges", "8 kHz", "all direct current", "no overlap"],
)
def test_equals_kaldi_under_other_options(cfg):
    waveform_N = 0.1 * np.random.default_rng(1).standard_normal(4001)
    assert_equals_kaldi(waveform_N, cfg, name="noise")


def test_equals_kaldi_on_human_speech(speech_dir):
    files = (
        sorted((speech_dir / "librispeech_250").rglob("*.opus"))[:8] + sorted((speech_dir / "fsdd").rglob("*.flac"))[:4]
    )
    assert len(files) == 12
    for file in files:
        waveform_N, rate = soundfile.read(file, dtype="float32")
        assert_equals_kaldi(waveform_N, FeatureConfig(sample_rate=rate), name=file.name)


@pytest.mark.parametrize("snip_edges", [True, False])
def test_an_utterance_in_a_ragged_batch_equals_itself_alone_whatever_the_padding_holds(snip_edges):
    fbank = Fbank(FeatureConfig(snip_edges=snip_edges))
    fbank.set_cmvn(torch.linspace(5, 15, 80), torch.linspace(1, 4, 80))
    lengths = [16000, 1, 399, 400, 401, 9999, 560]
    waveforms_BN = 0.1 * torch.randn(len(lengths), 16500, generator=torch.Generator().manual_seed(0))
    for b, length in enumerate(lengths):
        waveforms_BN[b, length:] = float("nan")
    features_BTF, frames_B = fbank(waveforms_BN, torch.tensor(lengths))
    for b, length in enumerate(lengths):
        alone_TF = torch.as_tensor(ours(waveforms_BN[b, :length], fbank))
        assert frames_B[b] == len(alone_TF)
        torch.testing.assert_close(features_BTF[b, : frames_B[b]], alone_TF, rtol=0, atol=1e-4, msg=f"{length} samples")
        assert (features_BTF[b, frames_B[b] :] == 0).all()


def test_audio_shorter_than_a_window_gives_the_frame_of_its_zero_padded_self():
    waveform_N = torch.randn(150, generator=torch.Generator().manual_seed(0))
    padded_TF = ours(nn.functional.pad(waveform_N, (0, 250)))
    np.testing.assert_allclose(ours(waveform_N), padded_TF, atol=1e-4)
    assert padded_TF.shape == (1, 80)


@pytest.mark.parametrize("lengths", [[100, 0], [100, 801], [-1, 800]])
def test_a_length_that_is_not_in_the_waveform_is_an_error(lengths):
    with pytest.raises(ValueError, match="1 to the 800 samples given"):
        Fbank()(torch.zeros(2, 800), torch.tensor(lengths))


def test_bf16_models_and_autocast_compute_the_same_features():
    fbank = Fbank()
    fbank.set_cmvn(torch.linspace(5, 15, 80) + 1e-3, torch.linspace(1, 4, 80) + 1e-3)
    waveform_N = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(0))
    expected_TF = ours(waveform_N, fbank)
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu", torch.float64)):
        model = cast(nn.ModuleDict({"fbank": copy.deepcopy(fbank), "head": nn.Linear(80, 1)}))
        assert model["head"].weight.dtype != torch.float32
        assert model["fbank"].fingerprint() == fbank.fingerprint()
        np.testing.assert_array_equal(ours(waveform_N, model["fbank"]), expected_TF)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(ours(waveform_N, fbank), expected_TF)


def test_a_model_built_on_meta_takes_its_cmvn_from_the_state_dict():
    fbank = Fbank()
    fbank.set_cmvn(torch.linspace(5, 15, 80), torch.linspace(1, 4, 80))
    with torch.device("meta"):
        empty = Fbank()
    empty.to_empty(device="cpu").load_state_dict(fbank.state_dict())
    waveform_N = 0.1 * torch.randn(1000)
    np.testing.assert_array_equal(ours(waveform_N, empty), ours(waveform_N, fbank))
    assert empty.fingerprint() == fbank.fingerprint()


def test_estimated_cmvn_normalises_valid_frames_to_mean_0_and_variance_1():
    fbank = Fbank()
    waveforms_BN = 0.1 * torch.randn(3, 8000, generator=torch.Generator().manual_seed(0))
    waveforms_BN *= torch.linspace(0.01, 1, 8000)
    lengths_B = torch.tensor([8000, 4000, 6000])
    batches = [(waveforms_BN[:2], lengths_B[:2]), (waveforms_BN[2:], lengths_B[2:])]
    count = fbank.estimate_cmvn(batches)
    normalised = [(features_TF, n) for batch in batches for features_TF, n in zip(*fbank(*batch))]
    frames_NF = torch.cat([features_TF[:n] for features_TF, n in normalised])
    assert count == len(frames_NF)
    torch.testing.assert_close(frames_NF.mean(0), torch.zeros(80), rtol=0, atol=1e-4)
    torch.testing.assert_close(frames_NF.std(0, correction=0), torch.ones(80), rtol=0, atol=1e-4)


def test_the_fingerprint_tells_options_and_cmvn_apart_and_nothing_else():
    fbank = Fbank()
    assert fbank.fingerprint() == Fbank(FeatureConfig()).fingerprint()
    assert fbank.fingerprint() != Fbank(FeatureConfig(preemphasis=0.95)).fingerprint()
    shifted = Fbank()
    shifted.set_cmvn(torch.full((80,), 1e-6), torch.ones(80))
    assert fbank.fingerprint() != shifted.fingerprint()


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.zeros(79), torch.ones(80), "mean must be 80 finite values"),
        (torch.full((80,), torch.nan), torch.ones(80), "mean must be 80 finite values"),
        (torch.zeros(80), torch.zeros(80), "std must be positive"),
    ],
)
def test_impossible_cmvn_is_an_error(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Fbank().set_cmvn(mean, std)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": "kaiser"}, "features.window .'kaiser'. must be one of povey"),
        ({"high_freq": 9000}, "within 0 and 8000.0 Hz"),
        ({"low_freq": 4000, "high_freq": 3000}, "must be in order"),
        ({"frame_shift_ms": 30}, "at most features.frame_length_ms"),
    ],
)
def test_options_that_cannot_be_met_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        FeatureConfig(**options)


def test_more_mel_bins_than_the_fft_resolves_is_an_error():
    with pytest.raises(ValueError, match="use fewer bins"):
        Fbank(FeatureConfig(num_mel_bins=200))(torch.zeros(1, 400), torch.tensor([400]))


def test_digital_silence_does_not_count_in_cmvn():
    torch.manual_seed(0)
    loud = torch.randn(1, 16000) * 0.1
    padded = torch.cat([loud, torch.zeros(1, 8000)], dim=1)
    alone, with_silence = Fbank(), Fbank()
    alone.estimate_cmvn([(loud, torch.tensor([16000]))])
    with_silence.estimate_cmvn([(padded, torch.tensor([24000]))])
    # Two windows lie across the border, so the two are close and not equal.
    torch.testing.assert_close(with_silence.mean_F, alone.mean_F, rtol=0, atol=0.2)
    torch.testing.assert_close(with_silence.std_F, alone.std_F, rtol=0.5, atol=0)
    with pytest.raises(ValueError, match="not silent"):
        Fbank().estimate_cmvn([(torch.zeros(1, 16000), torch.tensor([16000]))])
