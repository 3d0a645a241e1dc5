"""evaluate: decode a prepared corpus, score it, and write the files and the report that people look at.

Greedy or beam search on any number of ranks; each decodes its share, rank 0 scores. Scoring can be repeated without the
model from hyp.jsonl (data/scoring/files.py).
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.audio_sets import heldout
from ..data.index import Corpus
from ..data.loader import AudioBatch, utterance_key
from ..data.payload import PayloadReader
from ..data.plan import MicroBatch, PlanLimits
from ..data.scoring import ScoredUtterance, ScoreReport, score, write_report, write_score_folder
from ..data.scoring.report import read_metrics
from ..model.audio_llm import AudioLLM, acllm_facts
from ..model.decoding import DecodeConfig
from .runtime.artifacts import Artifact, ArtifactSpec, ArtifactWriter
from .runtime.config import StageConfig
from .runtime.train_config import PRECISIONS, require_choice
from .runtime.world import World, init_world

AUDIO = ("own", "silence", "other")
MIME_TYPES = {b"fLaC": "audio/flac", b"RIFF": "audio/wav", b"OggS": "audio/ogg"}


@dataclass(kw_only=True)
class EvaluateConfig(StageConfig):
    data: str  # folder of shards
    decode: DecodeConfig | None = None  # None: the recogniser's own; what is set here replaces all of it
    normalizer: str = "whisper-basic"
    unit: str = ""  # word, char or mixed; empty: the normaliser's own
    equivalences: str = ""  # JSON file: groups of words that sound alike, counted as one in a second rate
    # What the model hears: the utterance's own audio; silence, so that only the language model speaks; or the audio of
    # its neighbour in the batch (its own backwards where it is alone in one). A model whose error rate is no worse on
    # the last two is not listening.
    audio: str = "own"
    batch_seconds: float = 120.0
    precision: str = "fp32"
    learning_curves: dict[str, str] = field(default_factory=dict)  # stage -> its run folder, for the report
    worst: int = 40  # utterances in the report

    def __post_init__(self):
        require_choice("audio", self.audio, AUDIO)
        require_choice("precision", self.precision, PRECISIONS)


class Evaluate:
    """Decode, score, report."""

    consumes = {"acllm": ArtifactSpec("acllm")}
    produces = "report"
    Config = EvaluateConfig

    def run(self, cfg: EvaluateConfig, inputs: dict[str, Artifact], writer: ArtifactWriter) -> None:
        world = init_world()
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.precision]
        model = AudioLLM.from_pretrained(inputs["acllm"].path, dtype=dtype).to(world.device).eval()
        inputs["acllm"].require(acllm_facts(model), wanted_by="what was loaded from it")
        cfg.decode = cfg.decode or model.decode_config
        shares = world.gather(list(self._decode(cfg, model, world)))
        if not world.is_main:
            return
        records = sorted((record for share in shares for record in share), key=lambda record: record.id)
        report = score(
            records,
            normalizer=cfg.normalizer,
            unit=cfg.unit or None,
            equivalences=json.loads(Path(cfg.equivalences).read_text()) if cfg.equivalences else None,
            seed=cfg.seed,
        )
        self._write(cfg, report, writer, acllm=inputs["acllm"])

    def _decode(self, cfg: EvaluateConfig, model: AudioLLM, world: World) -> Iterator[ScoredUtterance]:
        """This rank's share of the corpus, decoded."""
        planned = heldout(
            cfg.data,
            PlanLimits(),
            micro_batch_seconds=cfg.batch_seconds,
            micro_batches=world.size,
            sample_rate=model.fbank.cfg.sample_rate,
        )
        summary = planned.plan.summary(0)
        if summary.num_refused and world.is_main:
            named = ", ".join(f"{refused.key} ({refused.reason})" for refused in summary.refused[:5])
            raise ValueError(
                f"{cfg.data}: {summary.num_refused} utterances cannot be decoded: {named}; raise batch_seconds "
                f"({cfg.batch_seconds:g}) or leave them out of the corpus"
            )
        for step in planned.plan.steps(epochs=1):
            for micro_batch in step.share(world.rank, world_size=world.size):
                if micro_batch.utterances:
                    yield from self._decode_batch(cfg, model, planned.dataset, micro_batch, world)

    def _decode_batch(
        self, cfg: EvaluateConfig, model: AudioLLM, dataset: Dataset, micro_batch: MicroBatch, world: World
    ) -> Iterator[ScoredUtterance]:
        batch = dataset[micro_batch].to(world.device)
        if batch.bad:
            raise ValueError(f"{batch.bad[0]}; repair the corpus (`seedling check-data {cfg.data}`) or leave it out")
        waveforms_BN, lengths_B = _heard(cfg.audio, batch)
        started = time.perf_counter()
        nbests = model.transcribe_ids(waveforms_BN, lengths_B, config=cfg.decode)
        rtf = (time.perf_counter() - started) / batch.seconds
        seconds = (batch.lengths_B / model.fbank.cfg.sample_rate).tolist()
        for key, reference, nbest, duration in zip(batch.keys, batch.texts, nbests, seconds):
            texts = [model.processor.decode(hypothesis.ids) for hypothesis in nbest]
            yield ScoredUtterance(
                id=key,
                reference=reference,
                hypothesis=texts[0],
                seconds=duration,
                nbest=tuple(texts),
                scores=tuple(hypothesis.score for hypothesis in nbest),
                rtf=rtf,
            )

    def _write(self, cfg: EvaluateConfig, report: ScoreReport, writer: ArtifactWriter, *, acllm: Artifact) -> None:
        summary = write_score_folder(report, writer.path, model_hash=acllm.hash, decode=asdict(cfg.decode))
        write_report(
            report,
            writer.path / "report.html",
            title=f"{acllm.path.parent.name} on {Path(cfg.data).name}",
            runs={name: read_metrics(Path(run) / "metrics.jsonl") for name, run in cfg.learning_curves.items()},
            details={"model": acllm.hash, "data": cfg.data, **asdict(cfg.decode)},
            audio=_AudioClips(cfg.data),
            worst=cfg.worst,
        )
        writer.metrics.update({name: rate["fraction"] for name, rate in summary["rates"].items()})
        if summary["merged"]:
            writer.metrics[f"{summary['metric']}_sound_alikes_merged"] = summary["merged"]["fraction"]
        low, high = summary["interval"]["fraction"]
        writer.metrics.update({f"{summary['metric']}_low": low, f"{summary['metric']}_high": high})
        if report.rtf is not None:
            writer.metrics["rtf"] = report.rtf


def _heard(audio: str, batch: AudioBatch) -> tuple[Tensor, Tensor]:
    """Return the waveforms and lengths that the model is given."""
    if audio == "silence":
        return torch.zeros_like(batch.waveforms_BN), batch.lengths_B
    if audio == "other" and len(batch) == 1:
        return batch.waveforms_BN.flip(1), batch.lengths_B
    if audio == "other":
        return batch.waveforms_BN.roll(1, dims=0), batch.lengths_B.roll(1)
    return batch.waveforms_BN, batch.lengths_B


class _AudioClips:
    """The corpus's own encoded audio, by key, for the report's players."""

    def __init__(self, folder: str):
        corpus, self.reader = Corpus.open(folder), PayloadReader()
        self.places = {
            utterance_key(at): (path, at) for shard, path in enumerate(corpus.shards) for at in corpus.index(shard)
        }

    def __call__(self, key: str) -> tuple[bytes, str] | None:
        if key not in self.places:
            return None
        path, at = self.places[key]
        clip = self.reader.read(path, offset=int(at["audio_offset"]), size=int(at["audio_size"]))
        return clip, next((mime for magic, mime in MIME_TYPES.items() if clip.startswith(magic)), "audio/mpeg")
