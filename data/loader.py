"""The loader: a map-style dataset from a planned micro-batch to padded waveforms.

`dataset[micro_batch]` is a pure function of the shards, the seed and the micro-batch, so any number of workers delivers
the same. Audio is read by byte offset from the tar. What cannot be used is named in `batch.bad`, never fatal here: the
run decides how many are too many. Shape letters: B utterances, N samples and T label frames of the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .audio import read_audio
from .augment import Augment, AugmentConfig, KeyedRandom
from .batches import STAND_IN_KEY, BadUtterance, WithTexts
from .concat import GroupedCorpus
from .contexts.draw import DrawnContexts
from .contexts.sidecar import StaleContexts, UtteranceContext
from .frame_labels import NO_LABEL, FrameLabels, StaleLabels
from .host import HostError
from .index import Corpus, parse_meta
from .joining import join_metas, join_waveforms
from .payload import PayloadReader
from .plan import MicroBatch
from .remote import Range, RemoteConfig, RemotePath, drop, forget, start, together

NO_CODES = np.zeros(0, np.uint16)


@dataclass
class AudioBatch(WithTexts):
    """Utterances of a micro-batch, zero padded: waveforms_BN float32 in [-1, 1], lengths_B in samples (int64).

    With frame labels, labels_BT are their codes (int64, NO_LABEL past the end) and label_lengths_B their numbers of
    frames, 0 for the stand-in. With contexts, `contexts` has one for each utterance that is a triple in this epoch.
    `joined` says how many utterances each was joined from; left out, each is one.
    """

    keys: list[str]
    waveforms_BN: Tensor
    lengths_B: Tensor
    texts: list[str]
    meta: list[dict]
    index: int
    epoch: int
    sample_rate: int = 16000
    bad: list[BadUtterance] = field(default_factory=list)
    labels_BT: Tensor | None = None
    label_lengths_B: Tensor | None = None
    contexts: list[UtteranceContext | None] | None = None
    joined: list[int] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def utterances(self) -> int:
        """Joined ones count as all that they were joined from."""
        return sum(self.joined) if self.joined is not None else len(self)

    @property
    def seconds(self) -> float:
        """Audio without padding."""
        return int(self.lengths_B.sum()) / self.sample_rate

    @property
    def padded_seconds(self) -> float:
        return self.waveforms_BN.numel() / self.sample_rate

    @property
    def amount(self) -> str:
        padding = 1 - self.seconds / self.padded_seconds
        return f"{len(self)} utterances, {self.seconds:.1f} s of audio, padding {padding:.1%}"

    def to(self, device: torch.device | str) -> AudioBatch:
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> AudioBatch:
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> AudioBatch:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(value) for name, value in tensors.items()})


class AudioDataset(Dataset):
    """Reads, decodes, resamples and augments the utterances of a micro-batch.

    `require_text` makes an utterance without text a bad one: for training on transcripts. With `labels` a batch has
    frame labels; those of other audio raise StaleLabels. With `contexts` it has contexts, as they are drawn for its
    epoch; those of other utterances raise StaleContexts. A grouped corpus (concat.py) gives joined utterances, with
    `gap_seconds` in between. `remote` says how noise on a server is read.
    """

    def __init__(
        self,
        corpus: Corpus | GroupedCorpus,
        *,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        sample_rate: int = 16000,
        require_text: bool = False,
        labels: FrameLabels | None = None,
        contexts: DrawnContexts | None = None,
        gap_seconds: float = 0.0,
        remote: RemoteConfig | None = None,
    ):
        self.corpus, self.sample_rate, self.require_text = corpus, sample_rate, require_text
        self.labels, self.contexts, self.gap_seconds = labels, contexts, gap_seconds
        self.reader = PayloadReader()
        # How many micro-batches ahead `fetch` should be called; 0 where everything lies in folders.
        ahead = (path.config.read_ahead for path in corpus.places if isinstance(path, RemotePath))
        self.read_ahead = max(ahead, default=0)
        self.augment = None
        if augment is not None:
            if labels is not None and augment.speed_probability:
                raise ValueError(
                    f"data.augment.speed_probability is {augment.speed_probability} with frame labels, which fit the "
                    "audio at its own speed; set it to 0"
                )
            noise = None
            if augment.noise_probability:
                noise = CorpusNoise(Corpus.open(list(augment.noise_data), remote=remote), sample_rate=sample_rate)
            self.augment = Augment(augment, seed=seed, noise=noise)

    def __getitem__(self, micro_batch: MicroBatch) -> AudioBatch:
        """Read what is planned; of a server in as few requests as can be, and all of them at once."""
        ranges = self._ranges(micro_batch)
        start(ranges)
        try:
            return self._load(micro_batch)
        finally:
            drop(ranges)

    def fetch(self, micro_batch: MicroBatch) -> None:
        """Begin to fetch what lies on a server, so that it is here when the micro-batch is asked for."""
        start(self._ranges(micro_batch))

    def _ranges(self, micro_batch: MicroBatch) -> list[Range]:
        return [
            each
            for shard, row in micro_batch.utterances
            if isinstance(path := self.corpus.shards[shard], RemotePath)
            for at in self.corpus.members(shard, row)
            for each in utterance_ranges(path, at)
        ]

    def _load(self, micro_batch: MicroBatch) -> AudioBatch:
        keys, waveforms, texts, metas, codes, contexts, joined, bad = [], [], [], [], [], [], [], []
        for shard, row in micro_batch.utterances:
            path, at = self.corpus.shards[shard], self.corpus.index(shard)[row]
            key = utterance_key(at)
            try:
                waveform, meta, count = self._read(path, self.corpus.members(shard, row), bad)
                text = meta.get("text") or ""
                if not isinstance(text, str):
                    raise ValueError(f"its text is a {type(text).__name__}, not a string")
                if self.require_text and not text.strip():
                    raise ValueError("its text is empty")
                codes_T = self._codes(path, row, at, samples=len(waveform))
                context = self._context(path, row, key=key, epoch=micro_batch.epoch)
                if self.augment:
                    waveform = self.augment(waveform, epoch=micro_batch.epoch, key=key)
            except (StaleLabels, StaleContexts, HostError):
                raise
            except (ValueError, OSError) as error:
                bad.append(BadUtterance(str(path), key, str(error)))
                continue
            keys.append(key)
            codes.append(codes_T)
            contexts.append(context)
            waveforms.append(waveform)
            texts.append(text)
            metas.append(meta)
            joined.append(count)
        if not keys:
            # A rank without a forward pass would hang the others; silence without text is a valid one.
            keys, waveforms, texts, metas = [STAND_IN_KEY], [np.zeros(self.sample_rate, np.float32)], [""], [{}]
            codes, contexts, joined = [NO_CODES], [None], [1]
        waveforms_BN, lengths_B = pad_waveforms(waveforms)
        labels_BT, label_lengths_B = pad_labels(codes) if self.labels is not None else (None, None)
        return AudioBatch(
            keys,
            waveforms_BN,
            lengths_B,
            texts,
            metas,
            micro_batch.index,
            micro_batch.epoch,
            self.sample_rate,
            bad,
            labels_BT,
            label_lengths_B,
            contexts if self.contexts is not None else None,
            joined,
        )

    def _read(self, path: Path, members: np.ndarray, bad: list[BadUtterance]) -> tuple[np.ndarray, dict, int]:
        """Return waveform and meta of an utterance, or of several joined, and how many. Bad members are left out."""
        if len(members) == 1:
            return *read_utterance(path, members[0], reader=self.reader, sample_rate=self.sample_rate), 1
        read: dict[str, tuple[np.ndarray, dict]] = {}
        for at in members:
            try:
                waveform, meta = read_utterance(path, at, reader=self.reader, sample_rate=self.sample_rate)
                if not isinstance(text := meta.get("text") or "", str):
                    raise ValueError(f"its text is a {type(text).__name__}, not a string")
                read[utterance_key(at)] = waveform, meta
            except HostError:
                raise
            except (ValueError, OSError) as error:
                bad.append(BadUtterance(str(path), utterance_key(at), str(error)))
        if not read:
            raise ValueError(f"none of its {len(members)} utterances can be used")
        waveforms, metas = zip(*read.values())
        gap = round(self.gap_seconds * self.sample_rate)
        waveform = join_waveforms(waveforms, gap=gap, sample_rate=self.sample_rate)
        return waveform, join_metas(metas, keys=list(read)), len(read)

    def _context(self, path: Path, row: int, *, key: str, epoch: int) -> UtteranceContext | None:
        return self.contexts.of(path, row, key=key, epoch=epoch) if self.contexts is not None else None

    def _codes(self, path: Path, row: int, at: np.void, *, samples: int) -> np.ndarray:
        if self.labels is None:
            return NO_CODES
        audio = self.reader.read(path, offset=int(at["audio_offset"]), size=int(at["audio_size"]))
        return self.labels.read(path, row, audio=audio, samples=samples)


def pad_waveforms(waveforms: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return waveforms_BN, zero padded, and lengths_B."""
    lengths_B = torch.tensor([len(waveform) for waveform in waveforms], dtype=torch.int64)
    waveforms_BN = torch.empty(len(waveforms), int(lengths_B.max()))
    for padded_N, waveform in zip(waveforms_BN, waveforms):  # each sample is written once: 25 % less than over zeros
        padded_N[: len(waveform)] = torch.from_numpy(waveform)
        padded_N[len(waveform) :] = 0
    return waveforms_BN, lengths_B


def pad_labels(codes: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return labels_BT, int64 with NO_LABEL past the end, and label_lengths_B."""
    label_lengths_B = torch.tensor([len(codes_T) for codes_T in codes], dtype=torch.int64)
    labels_BT = torch.full((len(codes), int(label_lengths_B.max())), NO_LABEL, dtype=torch.int64)
    for padded_T, codes_T in zip(labels_BT, codes):
        padded_T[: len(codes_T)] = torch.from_numpy(codes_T.astype(np.int64))
    return labels_BT, label_lengths_B


def utterance_key(at: np.void) -> str:
    return bytes(at["key"]).decode("utf-8", errors="replace")


def utterance_ranges(path: RemotePath, at: np.void) -> list[Range]:
    """Return what is read of an utterance: its meta and its audio, as one range where they are neighbours."""
    (first, *more), *apart = together(sorted(_parts(path, at)))
    whole = Range(path, first.offset, max(each.stop for each in [first, *more]) - first.offset)
    return [whole, *(each for near in apart for each in near)]


def _parts(path: RemotePath, at: np.void) -> list[Range]:
    ranges = (Range(path, int(at[f"{part}_offset"]), int(at[f"{part}_size"])) for part in ("audio", "meta"))
    return [each for each in ranges if each.size]


def read_utterance(path: Path, at: np.void, *, reader: PayloadReader, sample_rate: int) -> tuple[np.ndarray, dict]:
    """Return waveform [N] at `sample_rate` and meta of index row `at` of shard `path`.

    Raises ValueError or OSError with the reason. Audio that is not as long as the index says is an error: the plan and
    its memory rest on the index. What was kept of such an utterance on a server is fetched anew the next time.
    """
    try:
        return _decoded(path, at, reader=reader, sample_rate=sample_rate)
    except HostError:
        raise
    except ValueError:
        if isinstance(path, RemotePath):
            forget([*utterance_ranges(path, at), *_parts(path, at)])
        raise


def _decoded(path: Path, at: np.void, *, reader: PayloadReader, sample_rate: int) -> tuple[np.ndarray, dict]:
    meta = {}
    if at["meta_size"]:
        payload = reader.read(path, offset=int(at["meta_offset"]), size=int(at["meta_size"]))
        try:
            meta = parse_meta(payload, is_json=bool(at["meta_json"]))
        except ValueError as error:
            raise ValueError(f"its meta cannot be read ({error})") from error
    audio = reader.read(path, offset=int(at["audio_offset"]), size=int(at["audio_size"]))
    waveform = read_audio(audio, sample_rate=sample_rate, name="its audio")
    seconds, planned = len(waveform) / sample_rate, int(at["samples"]) / int(at["sample_rate"])
    if abs(seconds - planned) > 0.01:
        raise ValueError(f"its audio has {seconds:.2f} s, the index says {planned:.2f} s; run `seedling index` again")
    return waveform, meta


class CorpusNoise:
    """Noise from a corpus of shards: any utterance of it, drawn by the random numbers that are passed in."""

    def __init__(self, corpus: Corpus, *, sample_rate: int):
        self.corpus, self.sample_rate, self.reader = corpus, sample_rate, PayloadReader()
        self.ends = np.cumsum(corpus.rows_S)

    def __call__(self, random: KeyedRandom) -> np.ndarray:
        number = random.below(int(self.ends[-1]))
        shard = int(np.searchsorted(self.ends, number, side="right"))
        row = number - int(self.ends[shard - 1] if shard else 0)
        path, at = self.corpus.shards[shard], self.corpus.index(shard)[row]
        try:
            return read_utterance(path, at, reader=self.reader, sample_rate=self.sample_rate)[0]
        except HostError:
            raise
        except (ValueError, OSError) as error:
            raise ValueError(f"noise {path}: {utterance_key(at)}: {error}") from error
