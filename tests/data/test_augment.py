"""Augmentation: the speed, the signal-to-noise ratio and the random numbers are what they are said to be."""

import numpy as np
import pytest

from seedling.data.augment import Augment, AugmentConfig, KeyedRandom, change_speed, mix_noise

RATE = 16000


def tone(hertz, *, seconds=1.0):
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)).astype(np.float32)


def noise(seed, *, samples=RATE):
    return (0.05 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.1, 1.25])
def test_speed_changes_length_and_pitch_by_its_factor(factor):
    fast = change_speed(tone(440), factor)
    assert fast.dtype == np.float32
    assert len(fast) == pytest.approx(RATE / factor, abs=1)
    spectrum = np.abs(np.fft.rfft(fast * np.hanning(len(fast))))
    assert spectrum.argmax() * RATE / len(fast) == pytest.approx(440 * factor, abs=2)


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 12.0])
@pytest.mark.parametrize("noise_samples", [1000, RATE, 5 * RATE])
def test_noise_is_mixed_at_the_asked_ratio_whatever_its_length_and_level(snr_db, noise_samples):
    speech = tone(200) * 0.2
    added = mix_noise(speech, 3 * noise(0, samples=noise_samples), snr_db=snr_db, at=0.3) - speech
    measured = 10 * np.log10(np.square(speech).mean() / np.square(added).mean())
    assert measured == pytest.approx(snr_db, abs=0.05)


def test_a_mix_stays_within_full_scale_at_the_same_ratio():
    speech, level = tone(200) * 3, noise(1)
    mixed = mix_noise(speech, level, snr_db=0.0)
    assert np.abs(mixed).max() == pytest.approx(1.0, abs=1e-6)
    correlation = np.corrcoef(mixed, speech)[0, 1]
    assert correlation == pytest.approx(np.sqrt(0.5), abs=0.02)


def test_silence_is_left_alone():
    silence = np.zeros(100, np.float32)
    assert not mix_noise(silence, noise(2), snr_db=5.0).any()
    assert np.array_equal(mix_noise(tone(100), silence, snr_db=5.0), tone(100))


def test_random_numbers_are_pinned_and_keyed():
    first = KeyedRandom(1, epoch=2, key="utterance")
    assert [round(first.uniform(), 6) for _ in range(3)] == [0.674258, 0.8841, 0.584249]
    draws = {KeyedRandom(s, epoch=e, key=k).uniform() for s in (1, 11) for e in (0, 1, 2) for k in ("a", "b", "1\na")}
    assert len(draws) == 18
    values = np.array([KeyedRandom(0, epoch=0, key=str(k)).uniform() for k in range(2000)])
    assert abs(values.mean() - 0.5) < 0.03 and values.min() >= 0 and values.max() < 1
    assert {KeyedRandom(0, epoch=0, key=str(k)).below(3) for k in range(50)} == {0, 1, 2}


def test_an_utterance_is_augmented_as_often_as_configured():
    speech = tone(300, seconds=0.1)
    cfg = AugmentConfig(speed_probability=0.3, noise_probability=0.6, noise_data=["any"], snr_db_min=0, snr_db_max=30)
    augment = Augment(cfg, seed=5, noise=lambda random: noise(random.below(10)))
    heard = [augment(speech, epoch=0, key=f"k{number}") for number in range(1000)]
    stretched = np.array([len(waveform) != len(speech) for waveform in heard])
    assert 0.25 < stretched.mean() < 0.35
    lengths = {len(waveform) for waveform in heard}
    assert len(lengths) == 3, f"0.9, 1 and 1.1 give three lengths, found {sorted(lengths)}"
    noisy = [not np.array_equal(w, speech) for w in heard if len(w) == len(speech)]
    assert 0.53 < np.mean(noisy) < 0.67
    again = augment(speech, epoch=0, key="k7")
    assert np.array_equal(again, heard[7])


def test_ratios_cover_the_configured_range():
    speech = tone(300, seconds=0.2) * 0.1
    cfg = AugmentConfig(noise_probability=1.0, noise_data=["any"], snr_db_min=3, snr_db_max=9)
    augment = Augment(cfg, seed=5, noise=lambda random: noise(0))
    ratios = []
    for number in range(300):
        added = augment(speech, epoch=0, key=str(number)) - speech
        ratios.append(10 * np.log10(np.square(speech).mean() / np.square(added).mean()))
    assert 2.9 < min(ratios) < 3.3 and 8.7 < max(ratios) < 9.1
    assert np.mean(ratios) == pytest.approx(6, abs=0.3)


def test_off_means_untouched():
    speech = tone(300)
    assert Augment(AugmentConfig(), seed=0)(speech, epoch=0, key="k") is speech
    assert AugmentConfig().max_stretch == 1.0
    assert AugmentConfig(speed_probability=0.1, speed_factors=[0.8, 1.2]).max_stretch == pytest.approx(1.25)
    assert AugmentConfig(speed_probability=0.1, speed_factors=[1.2]).max_stretch == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speed_probability": 1.5}, "speed_probability is 1.5"),
        ({"speed_probability": 0.5, "speed_factors": []}, "speed_factors is empty"),
        ({"speed_factors": [9.0]}, r"speed_factors is \[9.0\]"),
        ({"noise_probability": 0.5}, "noise_data is empty"),
        ({"snr_db_min": 30.0}, r"snr_db_min \(30.0\) is above data.augment.snr_db_max \(20.0\)"),
    ],
)
def test_settings_that_cannot_take_effect_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        AugmentConfig(**settings)


def test_noise_without_a_source_is_an_error():
    with pytest.raises(ValueError, match="no source of noise"):
        Augment(AugmentConfig(noise_probability=0.5, noise_data=["x"]), seed=0)
