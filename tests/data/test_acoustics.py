"""Noise and rooms have the levels, slopes and decay times that their arguments name."""

import numpy as np
import pytest

from seedling.data import acoustics

RATE = 16_000


def octave_levels_db(wave: np.ndarray) -> np.ndarray:
    """Return the mean power density of the octaves from 125 Hz to 8 kHz in dB."""
    power = np.abs(np.fft.rfft(wave)) ** 2
    hertz = np.fft.rfftfreq(len(wave), 1 / RATE)
    edges = 125 * 2.0 ** np.arange(7)
    return np.array([10 * np.log10(power[(hertz >= low) & (hertz < 2 * low)].mean()) for low in edges[:-1]])


@pytest.mark.parametrize(("kind", "db_per_octave"), [("white", 0.0), ("pink", -3.0)])
def test_noise_has_unit_power_and_the_slope_of_its_colour(kind, db_per_octave):
    wave = acoustics.noise(kind, 100_003, rng=np.random.default_rng(0))
    slopes = np.diff(octave_levels_db(wave))
    assert wave.dtype == np.float32 and len(wave) == 100_003
    assert acoustics.rms(wave) == pytest.approx(1, abs=1e-4)
    assert np.abs(slopes - db_per_octave).max() < 0.6, slopes


def test_unknown_noise_is_refused_with_the_kinds_that_exist():
    with pytest.raises(ValueError, match=r"brown.*white or pink"):
        acoustics.noise("brown", 10, rng=np.random.default_rng(0))


@pytest.mark.parametrize("snr_db", [-5, 0, 20])
def test_added_noise_has_the_asked_signal_to_noise_ratio(snr_db):
    rng = np.random.default_rng(1)
    wave, noise = 1e-3 * rng.standard_normal(RATE), 7 * rng.standard_normal(RATE)
    added = acoustics.add_noise(wave, noise, snr_db=snr_db) - wave
    assert 20 * np.log10(acoustics.rms(wave) / acoustics.rms(added)) == pytest.approx(snr_db, abs=1e-3)


def test_noise_of_another_length_is_refused():
    with pytest.raises(ValueError, match="3 samples and the wave 4"):
        acoustics.add_noise(np.ones(4), np.ones(3), snr_db=10)


def test_babble_gives_every_voice_the_same_power_and_needs_a_voice():
    seconds = np.arange(RATE) / RATE
    quiet, loud = 0.01 * np.sin(2 * np.pi * 300 * seconds), 0.9 * np.sin(2 * np.pi * 1000 * seconds)
    wave = acoustics.babble([quiet, loud], 2 * RATE, rng=np.random.default_rng(2))
    power = np.abs(np.fft.rfft(wave)) ** 2  # bins are half a hertz wide
    assert acoustics.rms(wave) == pytest.approx(1, abs=1e-4)
    assert power[600] == pytest.approx(power[2000], rel=0.01)
    with pytest.raises(ValueError, match="at least one voice"):
        acoustics.babble([], RATE, rng=np.random.default_rng(2))


@pytest.mark.parametrize("rt60_s", [0.2, 0.5, 0.9])
def test_room_decays_by_60_db_in_the_asked_time(rt60_s):
    impulse = acoustics.room_impulse(rt60_s, sample_rate=RATE, rng=np.random.default_rng(3))
    left = np.cumsum(impulse[:0:-1] ** 2)[::-1]  # Schroeder's backward integration, without the direct path
    decay_db = 10 * np.log10(left / left[0])
    start, end = np.argmax(decay_db < -5), np.argmax(decay_db < -25)
    assert 3 * (end - start) / RATE == pytest.approx(rt60_s, rel=0.1)
    assert 10 * np.log10(1 / np.sum(impulse[1:] ** 2)) == pytest.approx(6, abs=0.01)


def test_reverberation_keeps_length_power_and_onset():
    click = np.zeros(RATE, np.float32)
    click[4000] = 0.5
    impulse = acoustics.room_impulse(0.3, sample_rate=RATE, rng=np.random.default_rng(4))
    wet = acoustics.reverberate(click, impulse)
    assert len(wet) == RATE and np.argmax(np.abs(wet)) == 4000
    assert np.abs(wet[:3999]).max() < 1e-5, "the room must not answer before it is spoken to"
    assert acoustics.rms(wet) == pytest.approx(acoustics.rms(click), rel=1e-4)
    ratio = wet[4000 : 4000 + len(impulse)] / wet[4000]
    np.testing.assert_allclose(ratio, impulse, atol=1e-5)


def test_room_without_reverberation_time_is_refused():
    with pytest.raises(ValueError, match="rt60_s"):
        acoustics.room_impulse(0.0, sample_rate=RATE, rng=np.random.default_rng(0))


def test_limit_turns_loud_waves_down_and_leaves_quiet_ones():
    wave = np.array([0.5, -2.0, 1.0], np.float32)
    np.testing.assert_allclose(acoustics.limit(wave), wave * 0.495, rtol=1e-6)
    np.testing.assert_array_equal(acoustics.limit(wave / 4), wave / 4)
    np.testing.assert_array_equal(acoustics.limit(np.zeros(3, np.float32)), np.zeros(3))
