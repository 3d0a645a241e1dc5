"""Speech synthesis with espeak-ng through ctypes: text in, 16-bit samples out.

The library and its voices come from the PyPI package `espeakng-loader` (extra `demo`); nothing else is needed. Its
state is one per process, so there is one `Espeak` per process, and parallel work needs processes, not threads. A
noise source inside it keeps its state from call to call: the same sequence of calls in a fresh process gives the same
samples, another sequence before a call does not.
"""

import ctypes
from pathlib import Path
from types import ModuleType

import numpy as np

ACCENTS = (
    "en",
    "en-029",
    "en-gb-scotland",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-gb-x-rp",
    "en-us",
    "en-us-nyc",
    "cmn",  # Mandarin; it reads simplified characters
)
# Variants that are meant to be human. Left out: robots, whispers, croaks, and Alicia, Lee and shelby, whose words a
# nearest-neighbour comparison of cepstra with the other variants confuses in 10 to 34 % of cases (these: under 7 %).
VARIANTS = (
    "f1", "f2", "f3", "f4", "f5", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "klatt", "klatt2", "klatt3", "Alex",
    "Andrea", "Andy", "Annie", "Gene", "Mario", "Michael", "adam", "belinda", "benjamin", "david", "edward", "john",
    "linda", "paul", "robert", "steph", "victor",
)  # fmt: skip

# From espeak-ng's speak_lib.h.
_OUTPUT_SYNCHRONOUS = 2
_DONT_EXIT_ON_ERROR = 0x8000
_CHARS_UTF8 = 1
_POSITION_CHARACTER = 1
_PARAMETER_RATE, _PARAMETER_PITCH = 1, 3
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
# text, its bytes with the closing zero, position, position type, end position, flags, identifier out, user data
_SYNTH_ARGUMENTS = (
    ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p,
    ctypes.c_void_p,
)  # fmt: skip


class Espeak:
    """The process's espeak-ng. `sample_rate` is the library's own, 22,050 Hz."""

    def __init__(self):
        loader = import_loader()
        self._data = Path(loader.get_data_path())
        self._library = ctypes.CDLL(loader.get_library_path())
        self._library.espeak_Synth.argtypes = _SYNTH_ARGUMENTS
        self._chunks: list[bytes] = []
        self._voice = ""
        self.sample_rate = self._library.espeak_Initialize(
            _OUTPUT_SYNCHRONOUS, 0, str(self._data).encode(), _DONT_EXIT_ON_ERROR
        )
        if self.sample_rate <= 0:
            raise ValueError(f"espeak-ng does not start with the voices in {self._data}; reinstall espeakng-loader")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # else its noise starts from the time of day
        self._callback = _CALLBACK(self._collect)  # kept: the library holds a bare pointer to it
        self._library.espeak_SetSynthCallback(self._callback)

    def speak(self, text: str, *, voice: str, words_per_minute: int = 175, pitch: int = 50) -> np.ndarray:
        """Return int16 [N] at `sample_rate`. `voice` is an accent, with or without a variant (`en-us+f3`).

        `pitch` is 0 to 99. A voice that espeak-ng does not have is a ValueError.
        """
        self._set_voice(voice)
        self._library.espeak_SetParameter(_PARAMETER_RATE, words_per_minute, 0)
        self._library.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0)
        self._chunks.clear()
        encoded = text.encode() + b"\0"
        error = (
            self._library.espeak_Synth(encoded, len(encoded), 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None)
            or self._library.espeak_Synchronize()
        )
        wave = np.frombuffer(b"".join(self._chunks), np.int16)
        if error or not wave.any():
            raise ValueError(f"espeak-ng said nothing for {text!r} with voice {voice} (error {error}); give it words")
        return wave

    def _set_voice(self, voice: str) -> None:
        if voice == self._voice:
            return
        # An unknown accent is refused by the call (and the old voice stays); an unknown variant is ignored in silence.
        _, _, variant = voice.partition("+")
        variant_exists = not variant or (self._data / "voices" / "!v" / variant).is_file()
        if not variant_exists or self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(
                f"espeak-ng has no voice {voice!r}; use one of {', '.join(ACCENTS)} with an optional +variant"
            )
        self._voice = voice

    def _collect(self, samples, count: int, _events) -> int:
        if samples and count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0  # go on


def import_loader() -> ModuleType:
    """Return the package that brings espeak-ng, or raise ValueError with the command that installs it."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise ValueError(
            "the demo corpus is spoken by espeak-ng and the package espeakng-loader is missing; "
            "run `pip install seedling[demo]`"
        ) from error
    return espeakng_loader
