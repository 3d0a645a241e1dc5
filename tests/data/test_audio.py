"""Decoding: exact where it can be, and one clear line where it cannot."""

import io

import numpy as np
import pytest
import soundfile

from seedling.data.audio import AudioError, audio_info, encode_flac, read_audio

RATE = 16000
FORMATS = [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]


def speechlike(seconds: float, *, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """Low-pass noise at half scale: every codec keeps it, and no two places are alike."""
    noise = np.random.default_rng(seed).normal(size=int(seconds * rate))
    smooth = np.convolve(noise, np.hanning(32), mode="same")
    return (0.5 * smooth / np.abs(smooth).max()).astype(np.float32)


def encoded(waveform: np.ndarray, *, format: str = "WAV", subtype: str = "PCM_16", rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def test_sixteen_bit_audio_survives_a_round_trip_bit_by_bit():
    pcm = np.arange(-32768, 32768, dtype=np.int16)
    wav = encoded(pcm)
    flac = encode_flac(read_audio(wav), sample_rate=RATE)
    np.testing.assert_array_equal(soundfile.read(io.BytesIO(flac), dtype="int16")[0], pcm)


def test_samples_beyond_full_scale_are_clipped_not_wrapped():
    waveform = read_audio(encode_flac(np.array([2.0, 1.0, -1.0, -2.0], np.float32), sample_rate=RATE))
    np.testing.assert_allclose(waveform, [32767 / 32768, 32767 / 32768, -1, -1], atol=1e-7)


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_a_segment_equals_the_same_piece_of_the_whole(format, subtype):
    audio = encoded(speechlike(6.0), format=format, subtype=subtype)
    whole = read_audio(audio)
    assert len(whole) == audio_info(audio).samples == 6 * RATE
    for offset_s in (0.5, 2.3, 4.999):
        start = round(offset_s * RATE)
        segment = read_audio(audio, offset_s=offset_s, duration_s=1.0)
        # Opus fills bands with noise whose seed depends on where decoding began: -55 dB, and no shift in time.
        np.testing.assert_allclose(segment, whole[start : start + RATE], atol=2e-3 if subtype == "OPUS" else 1e-5)


@pytest.mark.parametrize(("format", "subtype"), FORMATS)
def test_every_format_decodes_to_what_was_recorded(format, subtype):
    original = speechlike(3.0)
    decoded = read_audio(encoded(original, format=format, subtype=subtype))
    assert np.corrcoef(original, decoded)[0, 1] > 0.99


def test_channels_are_averaged():
    left, right = speechlike(0.5, seed=1), speechlike(0.5, seed=2)
    mixed = read_audio(encoded(np.stack([left, right], axis=1), subtype="FLOAT"))
    np.testing.assert_allclose(mixed, (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampling_keeps_pitch_length_and_level(rate):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)
    waveform = read_audio(encoded(tone, rate=rate))
    assert waveform.dtype == np.float32
    assert abs(len(waveform) - 2 * RATE) <= 1
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(waveform)) / RATE)
    np.testing.assert_allclose(waveform[1000:-1000], wanted[1000:-1000], atol=2e-3)


def test_the_own_rate_is_kept_on_request():
    audio = encoded(speechlike(0.5, rate=22050), rate=22050)
    assert len(read_audio(audio, sample_rate=None)) == audio_info(audio).samples == 11025
    assert audio_info(audio).seconds == 0.5


def test_what_is_not_audio_is_one_line_that_names_the_file(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("this is a text and no audio at all")
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "nothing.wav").write_bytes(encoded(np.zeros(0, np.float32)))
    (tmp_path / "nan.wav").write_bytes(encoded(np.array([0, np.nan], np.float32), subtype="FLOAT"))
    for name, reason in [
        ("empty", "is empty"),
        ("text", "not an audio file"),
        ("folder", "directory"),
        ("nothing", "no samples"),
        ("nan", "not finite"),
        ("absent", "No such file"),
    ]:
        path = tmp_path / f"{name}.wav"
        with pytest.raises(AudioError, match=reason) as caught:
            read_audio(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["FLAC", "MP3"])
def test_a_file_cut_short_is_an_error_wherever_it_was_cut(format):
    audio = encoded(speechlike(3.0), format=format, subtype=dict(FORMATS)[format])
    for size in np.linspace(1, len(audio) - 200, 25).astype(int):
        with pytest.raises(AudioError):
            read_audio(audio[:size])


def test_a_segment_outside_the_file_is_an_error():
    audio = encoded(speechlike(1.0))
    with pytest.raises(AudioError, match="starts at"):
        read_audio(audio, offset_s=1.5, name="a.wav")
    with pytest.raises(AudioError, match=r"a\.wav: ends 0\.50 s before"):
        read_audio(audio, offset_s=0.5, duration_s=1.0, name="a.wav")


def test_human_speech_decodes(speech_dir):
    paths = sorted((speech_dir / "librispeech_250" / "dev").glob("*.opus"))[:5]
    assert paths
    for path in paths:
        waveform = read_audio(path)
        assert len(waveform) == audio_info(path).samples
        assert 0.01 < np.abs(waveform).max() <= 1
