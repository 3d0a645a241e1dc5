"""Rooms and noise for clean speech, in plain numpy: float32 [N] in, float32 [N] out, nothing louder than full scale.

Every function takes its random generator, so a caller that seeds it per utterance gets the same sound in any order.
"""

import numpy as np


def noise(kind: str, samples: int, *, rng: np.random.Generator) -> np.ndarray:
    """Return `white` or `pink` (3 dB less per octave) noise of unit power, float32 [samples]."""
    if kind not in ("white", "pink"):
        raise ValueError(f"noise kind {kind!r} is unknown; use white or pink")
    if kind == "white":
        wave = rng.standard_normal(samples)
    else:
        size = 1 << samples.bit_length()  # transforms of powers of two are 10x as fast as of most lengths
        # The bins below 1/1000 of the rate would hold most of the power and be inaudible: keep their level flat.
        bins = np.maximum(np.arange(size // 2 + 1), size / 1000)
        phases = rng.standard_normal((2, len(bins)))
        wave = np.fft.irfft((phases[0] + 1j * phases[1]) / np.sqrt(bins), size)[:samples]
    return (wave / rms(wave)).astype(np.float32)


def babble(voices: list[np.ndarray], samples: int, *, rng: np.random.Generator) -> np.ndarray:
    """Return several people speaking at once, unit power, float32 [samples]: each repeated from a random start."""
    if not voices:
        raise ValueError("babble needs at least one voice, got none; give other utterances or use noise('pink', ...)")
    mixed = np.zeros(samples)
    for voice in voices:
        repeated = np.resize(np.roll(voice, -rng.integers(len(voice))), samples)
        mixed += repeated / rms(voice)
    return (mixed / rms(mixed)).astype(np.float32)


def add_noise(wave: np.ndarray, noise_wave: np.ndarray, *, snr_db: float) -> np.ndarray:
    """Return wave + noise with the noise `snr_db` below the power of the whole wave, pauses included."""
    if len(wave) != len(noise_wave):
        raise ValueError(f"noise has {len(noise_wave)} samples and the wave {len(wave)}; make them equal")
    gain = rms(wave) / rms(noise_wave) * 10 ** (-snr_db / 20)
    return limit(wave + gain * noise_wave)


def room_impulse(
    rt60_s: float, *, sample_rate: int, rng: np.random.Generator, direct_to_reverberant_db: float = 6.0
) -> np.ndarray:
    """Return a synthetic room: a direct path, then noise that has decayed by 60 dB after `rt60_s` seconds.

    The tail starts 2 to 8 ms after the direct path, as in a room of a few metres; its energy is
    `direct_to_reverberant_db` below the direct path's.
    """
    if rt60_s <= 0:
        raise ValueError(f"rt60_s ({rt60_s}) must be positive; for no room, do not call reverberate")
    seconds = np.arange(int(rt60_s * sample_rate) + 1) / sample_rate
    tail = rng.standard_normal(len(seconds)) * 10 ** (-3 * seconds / rt60_s)  # amplitude: 60 dB is a factor of 10^3
    tail[: int(rng.uniform(0.002, 0.008) * sample_rate)] = 0
    tail *= 10 ** (-direct_to_reverberant_db / 20) / np.sqrt(np.sum(tail**2))
    tail[0] = 1.0
    return tail.astype(np.float32)


def reverberate(wave: np.ndarray, impulse: np.ndarray) -> np.ndarray:
    """Return the wave heard in the room, as long as the wave and with its power; what still rings is cut off."""
    size = 1 << (len(wave) + len(impulse) - 2).bit_length()
    wet = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(impulse, size), size)[: len(wave)]
    return limit(wet * (rms(wave) / rms(wet)))


def rms(wave: np.ndarray) -> float:
    """Return the root of the mean power; silence counts as 1e-8, so that it can be divided by."""
    return max(float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))), 1e-8)


def limit(wave: np.ndarray, *, peak: float = 0.99) -> np.ndarray:
    """Scale down, never up, to at most `peak`: a clipped wave would teach distortion."""
    return (wave * min(1.0, peak / max(float(np.abs(wave).max()), 1e-8))).astype(np.float32)
