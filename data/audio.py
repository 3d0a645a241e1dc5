"""Audio files to waveforms and back: one decoder (libsndfile), one resampler (soxr), one kind of error.

Notable: 16-bit audio survives a round trip bit by bit. libsndfile scales by 32767 on writing floats and by 32768 on
reading them, so `encode_flac` does its own rounding at 32768. Shape letters: N samples.
"""

from __future__ import annotations

import io
from os import PathLike
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

# libsndfile reports this many frames for streams whose header does not say how long they are.
_UNKNOWN_LENGTH = 2**62


class AudioError(ValueError):
    """Audio that cannot be used; the message is one line that names the file and the reason."""


class AudioInfo(NamedTuple):
    """What an audio header says: `samples` per channel at `sample_rate` Hz."""

    samples: int
    sample_rate: int
    channels: int
    format: str

    @property
    def seconds(self) -> float:
        return self.samples / self.sample_rate


AudioSource = str | PathLike | bytes


def _name(source: AudioSource, name: str | None) -> str:
    return name or (f"{len(source)} bytes of audio" if isinstance(source, bytes) else str(source))


def _open(source: AudioSource, name: str) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else str(source))
    except (OSError, RuntimeError, TypeError) as error:  # LibsndfileError is a RuntimeError, TypeError: headerless .raw
        if not isinstance(source, bytes):
            try:
                with open(source, "rb") as handle:
                    if not handle.read(1):
                        raise AudioError(f"{name}: the file is empty") from error
            except OSError as cause:
                raise AudioError(f"{name}: {cause.strerror or cause}") from error
        raise AudioError(f"{name}: not an audio file that can be decoded ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "error_string", error)).strip().rstrip(".").replace("\n", " ")


def audio_info(source: AudioSource, *, name: str | None = None) -> AudioInfo:
    """Return what the header says, without decoding (unless the header does not know the length).

    `source` is a path or the bytes of a file; `name` stands for it in errors. Raises AudioError.
    """
    name = _name(source, name)
    with _open(source, name) as file:
        info = AudioInfo(file.frames, file.samplerate, file.channels, f"{file.format}/{file.subtype}")
        if info.samples >= _UNKNOWN_LENGTH:
            return info._replace(samples=len(_decode(file, name, start=0, count=-1)))
        return info


def _decode(file: soundfile.SoundFile, name: str, *, start: int, count: int) -> np.ndarray:
    """Return float32 [N, channels]; `count` -1 means up to the end."""
    known = file.frames < _UNKNOWN_LENGTH
    if known and start and start >= file.frames:
        raise AudioError(f"{name}: holds {file.frames} samples, the segment starts at {start}")
    expected = file.frames - start if known else None
    if count >= 0 and expected is not None:
        expected = min(expected, count)
    try:
        if start:
            file.seek(start)
        samples = file.read(count, dtype="float32", always_2d=True)
    except (RuntimeError, MemoryError) as error:
        raise AudioError(f"{name}: breaks off while decoding ({_reason(error)})") from error
    if expected is not None and len(samples) < expected:
        raise AudioError(f"{name}: breaks off after {len(samples)} of {expected} samples")
    if not len(samples):
        raise AudioError(f"{name}: holds no samples")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: holds samples that are not finite numbers")
    return samples


def read_audio(
    source: AudioSource,
    *,
    sample_rate: int | None = 16000,
    offset_s: float = 0.0,
    duration_s: float | None = None,
    name: str | None = None,
) -> np.ndarray:
    """Decode a path or the bytes of a file to float32 [N] in [-1, 1]: channels averaged, resampled by soxr.

    `sample_rate` None keeps the file's own rate (`audio_info` tells it). `offset_s` and `duration_s` cut a segment; one
    that ends past the file by more than 0.1 s is an error, as its text would not belong to what is heard.
    Raises AudioError.
    """
    name = _name(source, name)
    with _open(source, name) as file:
        rate = file.samplerate
        count = -1 if duration_s is None else round(duration_s * rate)
        samples = _decode(file, name, start=round(offset_s * rate), count=count)
    if count - len(samples) > 0.1 * rate:
        raise AudioError(f"{name}: ends {(count - len(samples)) / rate:.2f} s before the segment does")
    waveform = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if sample_rate is not None and sample_rate != rate:
        waveform = soxr.resample(waveform, rate, sample_rate, quality="HQ").astype(np.float32, copy=False)
        if not len(waveform):
            raise AudioError(f"{name}: too short to resample from {rate} to {sample_rate} Hz")
    return np.ascontiguousarray(waveform)


def encode_flac(waveform: np.ndarray, *, sample_rate: int) -> bytes:
    """Return the bytes of a 16-bit mono FLAC file; float32 [N] outside [-1, 1) is clipped."""
    pcm = np.clip(np.rint(waveform.astype(np.float64) * 32768), -32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm, sample_rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
