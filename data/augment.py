"""Augmentation of waveforms: speed perturbation and noise at a random signal-to-noise ratio (Ko et al. 2015, 2017).

What happens to an utterance depends on (seed, epoch, key) alone: not on its batch, worker or rank. SpecAugment lives in
the model, on features. Shape letters: N samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import soxr


@dataclass
class AugmentConfig:
    """Speed perturbation and noise mixing; probability 0 is off.

    Speed f makes an utterance 1 / f times as long. The plan counts on that if `PlanConfig.stretch` is `max_stretch`;
    otherwise a micro-batch may exceed `max_seconds` by that factor (1.11 for 0.9).
    """

    speed_probability: float = 0.0
    speed_factors: list[float] = field(default_factory=lambda: [0.9, 1.1])
    noise_probability: float = 0.0
    noise_data: list[str] = field(default_factory=list)  # folders of shards with noise
    snr_db_min: float = 5.0
    snr_db_max: float = 20.0

    def __post_init__(self):
        for name in ("speed_probability", "noise_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.augment.{name} is {getattr(self, name)}; it must be in 0 to 1")
        if self.speed_probability and not self.speed_factors:
            raise ValueError(
                "data.augment.speed_probability is above 0 and data.augment.speed_factors is empty; name some factors"
            )
        if any(not 0.5 <= factor <= 2 for factor in self.speed_factors):
            raise ValueError(f"data.augment.speed_factors is {list(self.speed_factors)}; each must be in 0.5 to 2")
        if self.noise_probability and not self.noise_data:
            raise ValueError(
                "data.augment.noise_probability is above 0 and data.augment.noise_data is empty; name a prepared folder"
            )
        if self.snr_db_min > self.snr_db_max:
            raise ValueError(
                f"data.augment.snr_db_min ({self.snr_db_min}) is above data.augment.snr_db_max ({self.snr_db_max})"
            )

    @property
    def max_stretch(self) -> float:
        """How much longer an utterance can become: the value for `PlanConfig.stretch`."""
        return max([1.0] + [1 / factor for factor in self.speed_factors]) if self.speed_probability else 1.0


class KeyedRandom:
    """Uniform numbers in [0, 1) that depend on (seed, epoch, key) alone, with any version of numpy."""

    def __init__(self, seed: int, *, epoch: int, key: str):
        digest = hashlib.blake2b(f"{seed}\n{epoch}\n{key}".encode(), digest_size=16).digest()
        self._bits = np.random.Philox(key=np.frombuffer(digest, dtype="<u8"))

    def uniform(self) -> float:
        return (self._bits.random_raw() >> 11) * 2.0**-53

    def below(self, count: int) -> int:
        return int(self.uniform() * count)


# Returns a noise waveform [N] at the sample rate of the speech.
NoiseSource = Callable[[KeyedRandom], np.ndarray]


class Augment:
    """Applies an AugmentConfig to single waveforms."""

    def __init__(self, cfg: AugmentConfig, *, seed: int, noise: NoiseSource | None = None):
        if cfg.noise_probability and noise is None:
            raise ValueError("data.augment.noise_probability is above 0 and there is no source of noise; pass `noise`")
        self.cfg, self.seed, self.noise = cfg, seed, noise

    def __call__(self, waveform_N: np.ndarray, *, epoch: int, key: str) -> np.ndarray:
        """Return the waveform as epoch `epoch` hears it, float32 [N'] in [-1, 1]."""
        cfg, random = self.cfg, KeyedRandom(self.seed, epoch=epoch, key=key)
        if random.uniform() < cfg.speed_probability:
            waveform_N = change_speed(waveform_N, cfg.speed_factors[random.below(len(cfg.speed_factors))])
        if random.uniform() < cfg.noise_probability:
            assert self.noise is not None
            snr_db = cfg.snr_db_min + (cfg.snr_db_max - cfg.snr_db_min) * random.uniform()
            waveform_N = mix_noise(waveform_N, self.noise(random), snr_db=snr_db, at=random.uniform())
        return waveform_N


def change_speed(waveform_N: np.ndarray, factor: float) -> np.ndarray:
    """Play `factor` times as fast: tempo and pitch change together, as in Kaldi. Returns [about N / factor]."""
    if factor == 1:
        return waveform_N
    # Read as if recorded at `factor` times the rate; only the ratio of the rates matters to soxr.
    return soxr.resample(waveform_N, factor, 1.0, quality="HQ").astype(np.float32, copy=False)


def mix_noise(waveform_N: np.ndarray, noise: np.ndarray, *, snr_db: float, at: float = 0.0) -> np.ndarray:
    """Add noise at `snr_db` over the whole utterance; it starts at fraction `at` of the noise and repeats as needed.

    Silent speech or silent noise is returned unmixed: no gain reaches the ratio. A sum outside [-1, 1] is scaled down.
    """
    start = int(at * len(noise))
    noise_N = np.resize(np.roll(noise, -start), len(waveform_N))
    speech_power, noise_power = (
        np.mean(np.square(waveform_N, dtype=np.float64)),
        np.mean(np.square(noise_N, dtype=np.float64)),
    )
    if not speech_power or not noise_power:
        return waveform_N
    gain = np.sqrt(speech_power / noise_power / 10 ** (snr_db / 10))
    mixed_N = waveform_N + np.float32(gain) * noise_N
    return (mixed_N / max(1.0, float(np.abs(mixed_N).max()))).astype(np.float32, copy=False)
