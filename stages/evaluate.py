"""evaluate: decode a prepared corpus, score it, and write the files and the report that people look at.

Greedy or beam search on any number of ranks; each decodes its share, rank 0 scores. Every utterance is decoded without
context and, with `contexts`, once more under each condition. Scoring can be repeated without the model from the
hyp.jsonl files (data/scoring/conditions.py).
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..data.audio_clips import AudioClips
from ..data.scoring import NONE, ScoredUtterance, score_conditions, write_conditions, write_report
from ..data.scoring.report import read_metrics
from ..model.decoding import DecodeConfig
from .recogniser.decoding import (
    AUDIO,
    DecodingConfig,
    decoded,
    given_batches,
    load_recogniser,
    require_condition,
    require_contexts,
)
from .runtime.artifacts import Artifact, ArtifactSpec, ArtifactWriter
from .runtime.train_config import require_choice
from .runtime.world import init_world


@dataclass(kw_only=True)
class EvaluateConfig(DecodingConfig):
    # Condition, such as right or wrong -> folder of contexts (`seedling contextualize`). "none" is always decoded.
    contexts: dict[str, str] = field(default_factory=dict)
    # Condition -> the highest echo rate allowed, a fraction. Above it the run fails, after everything is written.
    max_echo: dict[str, float] = field(default_factory=dict)
    # What the model hears: the utterance's own audio; silence, so that only the language model speaks; or the audio of
    # its neighbour in the batch (its own backwards where it is alone in one). A model whose error rate is no worse on
    # the last two is not listening.
    audio: str = "own"
    learning_curves: dict[str, str] = field(default_factory=dict)  # stage -> its run folder, for the report
    worst: int = 40  # utterances in the report

    def __post_init__(self):
        super().__post_init__()
        require_choice("audio", self.audio, AUDIO)
        if self.audio == "silence" and self.window_seconds:
            raise ValueError(
                f"audio is silence and window_seconds {self.window_seconds:g}: silent windows are left out, so that "
                "nothing is decoded; set window_seconds=0"
            )
        for name in self.contexts:
            require_condition(name)
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
        world, acllm, equivalences = init_world(), inputs["acllm"], cfg.groups()
        for name in cfg.max_echo:
            require_contexts(cfg.contexts[name], cfg.data, wanted_by=f"max_echo.{name}")
        model, decode = load_recogniser(acllm, cfg, world)
        shares = world.gather(
            [
                (condition, utterance)
                for batch in given_batches(cfg, model, world, contexts=cfg.contexts)
                for condition in batch.contexts
                for utterance in decoded(model, batch, condition, decode, cfg=cfg, hears=cfg.audio)
            ]
        )
        problem = ""
        if world.is_main:
            try:
                problem = self._report(cfg, shares, writer, acllm=acllm, decode=decode, equivalences=equivalences)
            except ValueError as error:  # the other ranks wait for what is wrong
                problem = str(error)
        if problem := world.gather(problem)[0]:
            raise ValueError(problem)

    def _report(
        self,
        cfg: EvaluateConfig,
        shares: list[list[tuple[str, ScoredUtterance]]],
        writer: ArtifactWriter,
        *,
        acllm: Artifact,
        decode: DecodeConfig,
        equivalences: list[list[str]] | None,
    ) -> str:
        """Score and write everything; return what is wrong with the recogniser, "" where nothing is."""
        decoded = sorted((one for share in shares for one in share), key=lambda one: one[1].id)
        scores = score_conditions(
            {name: [utterance for under, utterance in decoded if under == name] for name in [NONE, *cfg.contexts]},
            normalizer=cfg.normalizer or None,
            unit=cfg.unit or None,
            equivalences=equivalences,
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
            audio=AudioClips(cfg.data),
            worst=cfg.worst,
        )
        writer.metrics.update(scores.metrics())
        problems = scores.over_limit(cfg.max_echo)
        return f"{'; '.join(problems)}; see {writer.set_aside('refused')}/report.html" if problems else ""
