"""evaluate: decode a prepared corpus, score it, and write the files and the report that people look at.

Greedy or beam search on any number of ranks; each decodes its share, rank 0 scores. Every utterance is decoded without
context and, with `contexts`, once more under each condition. Scoring can be repeated without the model from the
hyp.jsonl files (data/scoring/conditions.py).
"""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..data.audio_sets import heldout
from ..data.batches import PlannedBatches
from ..data.concat import ConcatConfig
from ..data.contexts.sidecar import Contexts, UtteranceContext
from ..data.index import Corpus
from ..data.loader import AudioBatch, utterance_key
from ..data.payload import PayloadReader
from ..data.plan import MicroBatch, PlanLimits
from ..data.scoring import (
    NONE,
    ScoredUtterance,
    get_normalizer,
    keywords_of,
    score_conditions,
    write_conditions,
    write_report,
)
from ..data.scoring.report import read_metrics
from ..data.windows import require_window
from ..model.audio_llm import AudioLLM, acllm_facts
from ..model.decoding import DecodeConfig
from .recogniser.listening import hear
from .runtime.artifacts import Artifact, ArtifactSpec, ArtifactWriter
from .runtime.config import StageConfig
from .runtime.meters import peak_memory_gb, reset_peak_memory
from .runtime.schema import all_optional, given_values
from .runtime.train_config import PRECISIONS, require_choice
from .runtime.world import World, init_world

AUDIO = ("own", "silence", "other")
MIME_TYPES = {b"fLaC": "audio/flac", b"RIFF": "audio/wav", b"OggS": "audio/ogg"}
NO_CONTEXT = UtteranceContext("empty", "")
DecodeOverrides = all_optional(DecodeConfig, name="DecodeOverrides")


@dataclass(kw_only=True)
class EvaluateConfig(StageConfig):
    data: str  # folder of shards
    decode: DecodeOverrides = field(default_factory=DecodeOverrides)  # what is set here changes the recogniser's own
    # Condition, such as right or wrong -> folder of contexts (`seedling contextualize`). "none" is always decoded.
    contexts: dict[str, str] = field(default_factory=dict)
    # Condition -> the highest echo rate allowed, a fraction. Above it the run fails, after everything is written.
    max_echo: dict[str, float] = field(default_factory=dict)
    normalizer: str = ""  # empty: what suits the languages of the corpus (data/scoring/languages.py)
    unit: str = ""  # word, char or mixed; empty: the normaliser's own, or what suits the languages
    equivalences: str = ""  # JSON file: groups of words that sound alike, counted as one in a second rate
    # What the model hears: the utterance's own audio; silence, so that only the language model speaks; or the audio of
    # its neighbour in the batch (its own backwards where it is alone in one). A model whose error rate is no worse on
    # the last two is not listening.
    audio: str = "own"
    concat: ConcatConfig = field(default_factory=ConcatConfig)  # decode utterances joined to long ones
    window_seconds: float = 0.0  # decode window by window (data/windows.py); 0: each utterance as a whole
    batch_seconds: float = 120.0
    precision: str = "fp32"
    learning_curves: dict[str, str] = field(default_factory=dict)  # stage -> its run folder, for the report
    worst: int = 40  # utterances in the report

    def __post_init__(self):
        require_choice("audio", self.audio, AUDIO)
        require_choice("precision", self.precision, PRECISIONS)
        require_window(self.window_seconds)
        if self.concat.share and self.contexts:
            raise ValueError(
                f"concat.share is {self.concat.share} and there are contexts, which belong to single utterances; set "
                "concat.share=0 or leave out the contexts"
            )
        for name in self.contexts:
            if name == NONE or not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
                raise ValueError(
                    f"contexts.{name}: a condition is named by lower-case letters, digits, - and _, and {NONE!r} is "
                    "the one without context, which is always decoded; choose another name"
                )
        for name, limit in self.max_echo.items():
            if name not in self.contexts:
                raise ValueError(f"max_echo.{name}: there is no contexts.{name}; give it, or leave the limit out")
            if not 0 <= limit <= 1:
                raise ValueError(f"max_echo.{name} ({limit:g}) is a share of utterances; give a number from 0 to 1")


class Evaluate:
    """Decode, score, report."""

    consumes = {"acllm": ArtifactSpec("acllm")}
    produces = "report"
    Config = EvaluateConfig

    def run(self, cfg: EvaluateConfig, inputs: dict[str, Artifact], writer: ArtifactWriter) -> None:
        world, acllm = init_world(), inputs["acllm"]
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.precision]
        model = AudioLLM.from_pretrained(acllm.path, dtype=dtype).to(world.device).eval()
        acllm.require(acllm_facts(model), wanted_by="what was loaded from it")
        decode = replace(model.decode_config, **given_values(cfg.decode))
        shares = world.gather(list(self._decode(cfg, model, world, decode)))
        problem = self._report(cfg, shares, writer, acllm=acllm, decode=decode) if world.is_main else ""
        if problem := world.gather(problem)[0]:
            raise ValueError(problem)

    def _decode(
        self, cfg: EvaluateConfig, model: AudioLLM, world: World, decode: DecodeConfig
    ) -> Iterator[tuple[str, ScoredUtterance]]:
        """Yield (condition, utterance) of this rank's share of the corpus."""
        planned = heldout(
            cfg.data,
            PlanLimits(),
            micro_batch_seconds=cfg.batch_seconds,
            micro_batches=world.size,
            sample_rate=model.fbank.cfg.sample_rate,
            concat=cfg.concat,
        )
        summary = planned.plan.summary(0)
        if summary.num_refused and world.is_main:
            named = ", ".join(f"{refused.key} ({refused.reason})" for refused in summary.refused[:5])
            raise ValueError(
                f"{cfg.data}: {summary.num_refused} utterances cannot be decoded: {named}; raise batch_seconds "
                f"({cfg.batch_seconds:g}) or leave them out of the corpus"
            )
        sidecars = {name: Contexts(folder) for name, folder in cfg.contexts.items()}
        for step in planned.plan.steps(epochs=1):
            for micro_batch in step.share(world.rank, world_size=world.size):
                if micro_batch.utterances:
                    batch = planned.dataset[micro_batch].to(world.device)
                    if batch.bad:
                        advice = f"repair the corpus (`seedling check-data {cfg.data}`) or leave it out"
                        raise ValueError(f"{batch.bad[0]}; {advice}")
                    given = {name: _contexts(name, one, planned, micro_batch) for name, one in sidecars.items()}
                    yield from self._decode_batch(cfg, model, batch, given, decode)

    def _decode_batch(
        self,
        cfg: EvaluateConfig,
        model: AudioLLM,
        batch: AudioBatch,
        given: dict[str, list[UtteranceContext]],
        decode: DecodeConfig,
    ) -> Iterator[tuple[str, ScoredUtterance]]:
        waveforms_BN, lengths_B = _heard(cfg.audio, batch)
        seconds = (batch.lengths_B / model.fbank.cfg.sample_rate).tolist()
        normalize = get_normalizer(cfg.normalizer or "multilingual")
        keywords = [
            keywords_of(meta, reference=text, phrases=[p for c in contexts for p in c.phrases], normalize=normalize)
            for meta, text, *contexts in zip(batch.meta, batch.texts, *given.values())
        ]
        for condition, contexts in ({NONE: [NO_CONTEXT] * len(batch)} | given).items():
            started = time.perf_counter()
            reset_peak_memory()
            heard = hear(
                model,
                waveforms_BN,
                lengths_B,
                contexts_ids=model.processor.context_ids([context.text or None for context in contexts]),
                languages=[None] * len(batch),
                config=decode,
                window_seconds=cfg.window_seconds,
                batch_seconds=cfg.batch_seconds,
            )
            rtf, memory_gb = (time.perf_counter() - started) / batch.seconds, peak_memory_gb()
            for i, (nbest, _) in enumerate(heard):
                yield (
                    condition,
                    ScoredUtterance(
                        id=batch.keys[i],
                        reference=batch.texts[i],
                        hypothesis=nbest[0][0],
                        seconds=seconds[i],
                        nbest=tuple(text for text, _ in nbest),
                        scores=tuple(score for _, score in nbest),
                        rtf=rtf,
                        memory_gb=memory_gb,
                        lang=batch.meta[i].get("lang") or "",
                        keywords=keywords[i],
                        phrases=contexts[i].phrases,
                    ),
                )

    def _report(
        self,
        cfg: EvaluateConfig,
        shares: list[list[tuple[str, ScoredUtterance]]],
        writer: ArtifactWriter,
        *,
        acllm: Artifact,
        decode: DecodeConfig,
    ) -> str:
        """Score and write everything; return what is wrong with the recogniser, "" where nothing is."""
        decoded = sorted((one for share in shares for one in share), key=lambda one: one[1].id)
        scores = score_conditions(
            {name: [utterance for under, utterance in decoded if under == name] for name in [NONE, *cfg.contexts]},
            normalizer=cfg.normalizer or None,
            unit=cfg.unit or None,
            equivalences=json.loads(Path(cfg.equivalences).read_text()) if cfg.equivalences else None,
            seed=cfg.seed,
        )
        write_conditions(scores, writer.path, model_hash=acllm.hash, decode=asdict(decode))
        write_report(
            scores.plain,
            writer.path / "report.html",
            title=f"{acllm.path.parent.name} on {Path(cfg.data).name}",
            conditions=scores,
            runs={name: read_metrics(Path(run) / "metrics.jsonl") for name, run in cfg.learning_curves.items()},
            details={
                "model": acllm.hash,
                "data": cfg.data,
                "contexts": cfg.contexts,
                "window_seconds": cfg.window_seconds,
                **asdict(decode),
            },
            audio=_AudioClips(cfg.data),
            worst=cfg.worst,
        )
        writer.metrics.update(scores.metrics())
        problems = scores.over_limit(cfg.max_echo)
        return f"{'; '.join(problems)}; see {writer.set_aside('refused')}/report.html" if problems else ""


def _contexts(
    condition: str, sidecar: Contexts, planned: PlannedBatches, micro_batch: MicroBatch
) -> list[UtteranceContext]:
    """Return the context of each utterance of a micro-batch."""
    corpus, found = planned.dataset.corpus, []
    for shard, row in micro_batch.utterances:
        key = utterance_key(corpus.index(shard)[row])
        contexts = sidecar.of(corpus.shards[shard], row, key=key)
        if len(contexts) > 1:
            raise ValueError(
                f"contexts.{condition}: utterance {key} has {len(contexts)} contexts, and each condition is decoded "
                "with one; write them with one variant per utterance"
            )
        found.append(contexts[0] if contexts else NO_CONTEXT)
    return found


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
