"""evaluate: decode a prepared corpus, score it, and write the files and the report that people look at.

Greedy or beam search on any number of ranks; each decodes its share, rank 0 scores. Every utterance is decoded without
context and, with `contexts`, once more under each condition. Scoring can be repeated without the model from the
hyp.jsonl files (data/scoring/conditions.py). An earlier evaluation, `inputs.baseline`, is compared with
(data/scoring/baseline.py).
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..data.audio_clips import AudioClips
from ..data.scoring import (
    NONE,
    Baseline,
    ScoredUtterance,
    score,
    score_conditions,
    write_comparison,
    write_conditions,
    write_report,
)
from ..data.scoring.report import read_metrics
from ..model.audio_llm import AudioLLM
from ..model.decoding import DecodeConfig
from .recogniser.decoding import (
    AUDIO,
    DecodingConfig,
    GivenBatch,
    decoded,
    given_batches,
    load_recogniser,
    require_condition,
    require_contexts,
    undecoded,
)
from .runtime.artifacts import Artifact, ArtifactSpec, ArtifactWriter
from .runtime.train_config import require_choice
from .runtime.world import World, init_world


@dataclass(kw_only=True)
class EvaluateConfig(DecodingConfig):
    # Condition, such as right or wrong -> folder of contexts (`seedling contextualize`). "none" is always decoded.
    contexts: dict[str, str] = field(default_factory=dict)
    # Condition -> the highest echo rate allowed, a fraction. Above it the run fails, after everything is written.
    max_echo: dict[str, float] = field(default_factory=dict)
    # The same against inputs.baseline, the artifact of an earlier evaluation. Condition, "none" too -> by how much the
    # error rate may be above the baseline's, a fraction: 0.01 is a point.
    max_rise: dict[str, float] = field(default_factory=dict)
    # Condition -> by how much strict recall may be below, of the keywords that the baseline misses without context.
    max_recall_fall: dict[str, float] = field(default_factory=dict)
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
        for option in ("max_echo", "max_rise", "max_recall_fall"):
            for name, limit in getattr(self, option).items():
                self._require_limit(option, name, limit)

    def _require_limit(self, option: str, name: str, limit: float) -> None:
        if name == NONE and option != "max_rise":
            raise ValueError(f"{option}.{name}: without a context there is nothing to limit; leave it out")
        if name not in (NONE, *self.contexts):
            raise ValueError(f"{option}.{name}: there is no contexts.{name}; give it, or leave the limit out")
        if not 0 <= limit <= 1:
            raise ValueError(f"{option}.{name} ({limit:g}) is a fraction; give a number from 0 to 1")
        if option != "max_echo" and not self.inputs.get("baseline"):
            raise ValueError(
                f"{option}.{name}: there is no inputs.baseline to compare with; set it to the artifact of an earlier "
                "evaluation, or leave the limit out"
            )


class Evaluate:
    """Decode, score, report."""

    consumes = {"acllm": ArtifactSpec("acllm"), "baseline": ArtifactSpec("report", required=False)}
    produces = "report"
    Config = EvaluateConfig

    def run(self, cfg: EvaluateConfig, inputs: dict[str, Artifact], writer: ArtifactWriter) -> None:
        world, acllm, equivalences = init_world(), inputs["acllm"], cfg.groups()
        for name in cfg.max_echo:
            require_contexts(cfg.contexts[name], cfg, wanted_by=f"max_echo.{name}")
        baseline = None
        if "baseline" in inputs:
            baseline = Baseline.read(inputs["baseline"].path, equivalences=equivalences, seed=cfg.seed)
            baseline.require_limits(max_rise=cfg.max_rise, max_recall_fall=cfg.max_recall_fall)
        model, decode = load_recogniser(acllm, cfg, world)
        if baseline is not None:  # reading the corpus once more takes seconds, decoding it in vain would take minutes
            asked = self._gathered(cfg, model, world, undecoded)
            scoring = {"normalizer": cfg.normalizer or None, "unit": cfg.unit or None}
            baseline.require_comparable({name: score(records, **scoring) for name, records in asked.items()})
        records = self._gathered(
            cfg,
            model,
            world,
            lambda batch, condition: decoded(model, batch, condition, decode, cfg=cfg, hears=cfg.audio),
        )
        problem = ""
        if world.is_main:
            try:
                problem = self._report(
                    cfg, records, writer, acllm=acllm, decode=decode, equivalences=equivalences, baseline=baseline
                )
            except ValueError as error:  # the other ranks wait for what is wrong
                problem = str(error)
        if problem := world.gather(problem)[0]:
            raise ValueError(problem)

    def _gathered(
        self,
        cfg: EvaluateConfig,
        model: AudioLLM,
        world: World,
        heard: Callable[[GivenBatch, str], Iterable[ScoredUtterance]],
    ) -> dict[str, list[ScoredUtterance]]:
        """Return heard(batch, condition) of all ranks' batches by condition, in the order of ids."""
        shares = world.gather(
            [
                (condition, utterance)
                for batch in given_batches(cfg, model, world, contexts=cfg.contexts)
                for condition in batch.contexts
                for utterance in heard(batch, condition)
            ]
        )
        everything = sorted((one for share in shares for one in share), key=lambda one: one[1].id)
        return {name: [one for under, one in everything if under == name] for name in (NONE, *cfg.contexts)}

    def _report(
        self,
        cfg: EvaluateConfig,
        records: dict[str, list[ScoredUtterance]],
        writer: ArtifactWriter,
        *,
        acllm: Artifact,
        decode: DecodeConfig,
        equivalences: list[list[str]] | None,
        baseline: Baseline | None,
    ) -> str:
        """Score and write everything; return what is wrong with the recogniser, "" where nothing is."""
        scores = score_conditions(
            records,
            normalizer=cfg.normalizer or None,
            unit=cfg.unit or None,
            equivalences=equivalences,
            seed=cfg.seed,
        )
        comparison = baseline.compare(scores, seed=cfg.seed) if baseline else None
        if comparison:
            write_comparison(comparison, writer.path)
        write_conditions(scores, writer.path, model_hash=acllm.hash, decode=asdict(decode))
        write_report(
            scores.plain,
            writer.path / "report.html",
            title=f"{acllm.path.parent.name} on {Path(cfg.data).name}",
            conditions=scores,
            comparison=comparison,
            runs={name: read_metrics(Path(run) / "metrics.jsonl") for name, run in cfg.learning_curves.items()},
            details={
                "model": acllm.hash,
                "data": cfg.data,
                "contexts": cfg.contexts,
                "window_seconds": cfg.window_seconds,
                **asdict(decode),
            },
            audio=AudioClips(cfg.data, remote=cfg.remote),
            worst=cfg.worst,
        )
        writer.metrics.update(scores.metrics())
        problems = scores.over_limit(cfg.max_echo)
        if comparison:
            writer.metrics.update(comparison.metrics())
            problems += comparison.over_limits(max_rise=cfg.max_rise, max_recall_fall=cfg.max_recall_fall)
        return f"{'; '.join(problems)}; see {writer.set_aside('refused')}/report.html" if problems else ""
