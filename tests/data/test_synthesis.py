"""espeak-ng speaks through ctypes, obeys pace and pitch, and refuses voices that it would only pretend to have."""

import re
import sys

import numpy as np
import pytest

from seedling.data import synthesis
from seedling.data.demo_text_zh import MANDARIN
from seedling.data.synthesis import ACCENTS, VARIANTS, Espeak

TEXT = "set a timer for twenty five minutes"


@pytest.fixture(scope="module")
def espeak() -> Espeak:
    pytest.importorskip("espeakng_loader", reason="espeak-ng comes from the extra `demo`")
    return Espeak()


def pitch_hz(wave: np.ndarray, sample_rate: int) -> float:
    """Return the median over 40 ms frames of the strongest autocorrelation between 60 and 400 Hz."""
    size = sample_rate // 25
    frames = [frame - frame.mean() for frame in wave[: len(wave) // size * size].reshape(-1, size).astype(float)]
    low, high = sample_rate // 400, sample_rate // 60
    lags = [low + np.correlate(f, f, "full")[size - 1 :][low:high].argmax() for f in frames if f.std() > wave.std()]
    return sample_rate / float(np.median(lags))


def test_speech_is_16_bit_at_the_rate_of_the_library(espeak):
    wave = espeak.speak(TEXT, voice="en-us")
    assert espeak.sample_rate == 22_050 and wave.dtype == np.int16
    assert 1.0 < len(wave) / espeak.sample_rate < 4.0 and np.abs(wave).max() > 3000


def test_more_words_per_minute_take_less_time(espeak):
    slow = espeak.speak(TEXT, voice="en", words_per_minute=120)
    fast = espeak.speak(TEXT, voice="en", words_per_minute=240)
    assert 1.6 < len(slow) / len(fast) < 2.4


def test_higher_pitch_and_female_variants_sound_higher(espeak):
    low, high, female = (
        pitch_hz(espeak.speak(TEXT, voice=voice, pitch=pitch), espeak.sample_rate)
        for voice, pitch in (("en-us+m3", 20), ("en-us+m3", 80), ("en-us+f2", 50))
    )
    assert low * 1.3 < high and low * 1.3 < female, (low, high, female)


def test_every_voice_of_the_lists_exists(espeak):
    for accent in ACCENTS:
        for variant in VARIANTS:
            assert len(espeak.speak("hi", voice=f"{accent}+{variant}")) > 1000


@pytest.mark.parametrize("voice", ["en-gb", "en-us+nobody", "en-moon+f1"])
def test_unknown_accents_and_variants_are_refused_by_name(espeak, voice):
    espeak.speak("hi", voice="en-us")
    with pytest.raises(ValueError, match=f"no voice '{voice}'".replace("+", r"\+")):
        espeak.speak("hi", voice=voice)


def test_text_without_words_is_refused(espeak):
    with pytest.raises(ValueError, match="said nothing"):
        espeak.speak("", voice="en-us")


def test_missing_package_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ValueError, match=r"pip install seedling\[demo\]") as error:
        synthesis.import_loader()
    assert "\n" not in str(error.value)


def test_every_character_of_the_mandarin_grammar_is_read_as_one_syllable(espeak):
    texts = [text for items in MANDARIN.slots.values() for text in items]
    texts += [text for intent in MANDARIN.intents.values() for text in intent.templates]
    characters = sorted(set(re.sub(r"\{\w+\}", "", "".join(texts))))
    assert len(characters) > 100
    seconds = {c: len(espeak.speak(c, voice="cmn", words_per_minute=150)) / espeak.sample_rate for c in characters}
    # A character that the dictionary does not have is described in words instead.
    assert len(espeak.speak("\U00020086", voice="cmn", words_per_minute=150)) / espeak.sample_rate > 1.5
    assert {c: length for c, length in seconds.items() if not 0.1 < length < 1.0} == {}
