"""Decode a corpus under conditions: what the stages share that score a recogniser. Condition "none" is the context-free
one; every other has a folder of contexts, one context at most for each utterance."""

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.audio_sets import heldout
from ...data.batches import PlannedBatches
from ...data.concat import ConcatConfig
from ...data.contexts.sidecar import Contexts, UtteranceContext
from ...data.index import Corpus
from ...data.loader import AudioBatch, utterance_key
from ...data.phonetics import read_groups
from ...data.plan import MicroBatch, PlanLimits
from ...data.remote import RemoteConfig
from ...data.scoring import NONE, ScoredUtterance, get_normalizer, keywords_of
from ...data.scoring.conditions import require_no_language
from ...data.windows import require_window
from ...model.audio_llm import AudioLLM, acllm_facts
from ...model.decoding import DecodeConfig
from ..runtime.artifacts import Artifact
from ..runtime.config import StageConfig
from ..runtime.meters import peak_memory_gb, reset_peak_memory
from ..runtime.schema import all_optional, given_values
from ..runtime.train_config import PRECISIONS, require_choice
from ..runtime.world import World
from .listening import hear
from .unpacking import require_unpack_gb, unpack_recogniser

AUDIO = ("own", "silence", "other")
NO_CONTEXT = UtteranceContext("empty", "")
DecodeOverrides = all_optional(DecodeConfig, name="DecodeOverrides")


@dataclass(kw_only=True)
class DecodingConfig(StageConfig):
    data: str  # folder of shards, here or on a server
    remote: RemoteConfig = field(default_factory=RemoteConfig)  # of a folder on http(s):// and s3://
    decode: DecodeOverrides = field(default_factory=DecodeOverrides)  # what is set here changes the recogniser's own
    # whether the instruction names each utterance's language, where the recogniser knows it
    tell_language: bool = False
    normalizer: str = ""  # empty: what suits the languages of the corpus (data/scoring/languages.py)
    unit: str = ""  # word, char or mixed; empty: the normaliser's own, or what suits the languages
    equivalences: str = ""  # JSON file: groups of words that sound alike, counted as one in a second rate
    batch_seconds: float = 120.0
    precision: str = "fp32"
    concat: ConcatConfig = field(default_factory=ConcatConfig)  # decode utterances joined to long ones
    window_seconds: float = 0.0  # decode window by window (data/windows.py); 0: each utterance as a whole
    # GB that dense weights of a packed recogniser may take beside it (unpacking.py); null is up to the machine
    unpack_gb: float | None = None

    def __post_init__(self):
        require_choice("precision", self.precision, PRECISIONS)
        require_unpack_gb(self.unpack_gb)
        require_window(self.window_seconds)

    def groups(self) -> list[list[str]] | None:
        """Return the groups of `equivalences`. A stage asks before it decodes, as the file may be no good."""
        return read_groups(self.equivalences, option="equivalences") if self.equivalences else None


class GivenBatch(NamedTuple):
    """Utterances, what they may be told beforehand under each condition, and the keywords to look for."""

    audio: AudioBatch
    contexts: dict[str, list[UtteranceContext]]  # "none" first
    keywords: list[tuple[str, ...]]
    languages: list[str | None]


def require_condition(name: str) -> None:
    if name == NONE or not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ValueError(
            f"contexts.{name}: a condition is named by lower-case letters, digits, - and _, and {NONE!r} is "
            "the one without context, which is always decoded; choose another name"
        )


def require_contexts(folder: str, cfg: DecodingConfig, *, wanted_by: str) -> None:
    """Refuse a sidecar that is empty for all of the data: nothing could be counted after decoding."""
    sidecar, corpus = Contexts(folder), Corpus.open(cfg.data, remote=cfg.remote)
    for number, shard in enumerate(corpus.shards):
        for row, at in enumerate(corpus.index(number)):
            if any(context.text for context in sidecar.of(shard, row, key=utterance_key(at))):
                return
    raise ValueError(
        f"{wanted_by}: no utterance of {cfg.data} has a context in {folder}, so that nothing can be checked; "
        "give it such contexts, or leave it out"
    )


def load_recogniser(acllm: Artifact, cfg: DecodingConfig, world: World) -> tuple[AudioLLM, DecodeConfig]:
    """Return the model on this rank's device, and its own settings with the config's over them."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.precision]
    model = AudioLLM.from_pretrained(acllm.path, dtype=dtype).to(world.device).eval()
    acllm.require(acllm_facts(model), wanted_by="what was loaded from it")
    if cfg.tell_language and not model.processor.prompts.languages:
        raise ValueError(f"tell_language: {acllm.path} was trained without prompts.languages; leave it out")
    unpack_recogniser(model, gb=cfg.unpack_gb, processes=world.ranks_here())
    model.record_steps()
    return model, replace(model.decode_config, **given_values(cfg.decode))


def given_batches(
    cfg: DecodingConfig, model: AudioLLM, world: World, *, contexts: Mapping[str, str]
) -> Iterator[GivenBatch]:
    """Yield this rank's share of the corpus. `contexts` are folders by condition."""
    if cfg.concat.share and contexts:
        raise ValueError(
            f"concat.share is {cfg.concat.share} and there are contexts, which belong to single utterances; set "
            "concat.share=0 or leave out the contexts"
        )
    planned = heldout(
        cfg.data,
        PlanLimits(),
        micro_batch_seconds=cfg.batch_seconds,
        micro_batches=world.size,
        sample_rate=model.fbank.cfg.sample_rate,
        concat=cfg.concat,
        remote=cfg.remote,
    )
    summary = planned.plan.summary(0)
    if summary.num_refused and world.is_main:
        named = ", ".join(f"{refused.key} ({refused.reason})" for refused in summary.refused[:5])
        raise ValueError(
            f"{cfg.data}: {summary.num_refused} utterances cannot be decoded: {named}; raise batch_seconds "
            f"({cfg.batch_seconds:g}) or leave them out of the corpus"
        )
    sidecars = {name: Contexts(folder) for name, folder in contexts.items()}
    normalize = get_normalizer(cfg.normalizer or "multilingual")
    for step in planned.plan.steps(epochs=1):
        for micro_batch in step.share(world.rank, world_size=world.size):
            if micro_batch.utterances:
                audio = planned.dataset[micro_batch].to(world.device)
                if audio.bad:
                    advice = f"repair the corpus (`seedling check-data {cfg.data}`) or leave it out"
                    raise ValueError(f"{audio.bad[0]}; {advice}")
                given = {name: _contexts(name, one, planned, micro_batch) for name, one in sidecars.items()}
                known = model.processor.prompts.languages if cfg.tell_language else {}
                tags = [meta.get("lang") or "" for meta in audio.meta]
                for name in sidecars:
                    require_no_language(name, tags)
                keywords = [
                    keywords_of(meta, reference=text, phrases=[p for c in all_ for p in c.phrases], normalize=normalize)
                    for meta, text, *all_ in zip(audio.meta, audio.texts, *given.values())
                ]
                yield GivenBatch(
                    audio=audio,
                    contexts={NONE: [NO_CONTEXT] * len(audio)} | given,
                    keywords=keywords,
                    languages=[tag if tag in known else None for tag in tags],
                )


def undecoded(batch: GivenBatch, condition: str) -> list[ScoredUtterance]:
    """Return the utterances of a batch under one condition, with nothing recognised yet."""
    audio = batch.audio
    return [
        ScoredUtterance(
            id=audio.keys[i],
            reference=audio.texts[i],
            hypothesis="",
            lang=audio.meta[i].get("lang") or "",
            keywords=batch.keywords[i],
            phrases=context.phrases,
            context=context.text,
        )
        for i, context in enumerate(batch.contexts[condition])
    ]


def decoded(
    model: AudioLLM,
    batch: GivenBatch,
    condition: str,
    decode: DecodeConfig,
    *,
    cfg: DecodingConfig,
    hears: str = "own",
) -> Iterator[ScoredUtterance]:
    """Yield the utterances of a batch, decoded under one condition; `hears` is one of AUDIO."""
    audio, contexts = batch.audio, batch.contexts[condition]
    waveforms_BN, lengths_B = _heard(hears, audio)
    seconds = (audio.lengths_B / model.fbank.cfg.sample_rate).tolist()
    started = time.perf_counter()
    reset_peak_memory()
    heard = hear(
        model,
        waveforms_BN,
        lengths_B,
        contexts_ids=model.processor.context_ids([context.text or None for context in contexts]),
        languages=batch.languages,
        config=decode,
        window_seconds=cfg.window_seconds,
        batch_seconds=cfg.batch_seconds,
    )
    rtf, memory_gb = (time.perf_counter() - started) / audio.seconds, peak_memory_gb()
    for utterance, length, (nbest, _) in zip(undecoded(batch, condition), seconds, heard):
        yield replace(
            utterance,
            hypothesis=nbest[0][0],
            seconds=length,
            nbest=tuple(text for text, _ in nbest),
            scores=tuple(score for _, score in nbest),
            memory_gb=memory_gb,
            rtf=rtf,
        )


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
