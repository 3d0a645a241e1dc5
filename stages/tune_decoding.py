"""tune_decoding: the settings of joint context search that recall most names without harm by wrong contexts.

A development corpus is decoded once without context, and for every setting of a grid with the right contexts and with
wrong ones; data/scoring/tuning.py chooses. The search on the prompt with context alone stands beside, as a reference.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ..data.scoring import NONE, ScoredUtterance, score_conditions
from ..data.scoring.tuning import RIGHT, WRONG, Choice, Trial, choose, tuning_figure, tuning_table
from ..model.audio_llm import AudioLLM
from ..model.decoding import DecodeConfig
from .recogniser.decoding import DecodingConfig, decoded, given_batches, load_recogniser, require_contexts
from .runtime.artifacts import Artifact, ArtifactSpec, ArtifactWriter
from .runtime.config import yaml_scalar
from .runtime.world import World, init_world

Decoded = tuple[int, str, ScoredUtterance]  # number of the setting (-1: without context), condition, utterance


@dataclass(kw_only=True)
class TuneDecodingConfig(DecodingConfig):
    right: str  # folder of contexts with the names that are said
    wrong: str  # folder of contexts without them
    alphas: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0, 2.0, 4.0])
    prunes: list[float] = field(default_factory=lambda: [3.0, 5.0, 8.0])
    top_ks: list[int] = field(default_factory=lambda: [20])
    forms: list[str] = field(default_factory=lambda: ["log"])
    # What wrong contexts may cost: so much more of the error rate, and of the echo rate above chance, as fractions.
    max_loss: float = 0.003
    max_echo: float = 0.02

    def __post_init__(self):
        super().__post_init__()
        for name in ("alphas", "prunes", "top_ks", "forms"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one value to try, or leave it out")
        for settings in self.grid():
            replace(DecodeConfig(), **settings)  # a value that cannot be is named before any work

    def grid(self) -> list[dict[str, Any]]:
        names = ("context_form", "context_top_k", "context_prune", "context_alpha")
        values = itertools.product(self.forms, self.top_ks, self.prunes, self.alphas)
        return [{"context_search": "joint", **dict(zip(names, value))} for value in values]


class TuneDecoding:
    """Decode under every setting, choose, write the table and the figure."""

    consumes = {"acllm": ArtifactSpec("acllm")}
    produces = "report"
    Config = TuneDecodingConfig

    def run(self, cfg: TuneDecodingConfig, inputs: dict[str, Artifact], writer: ArtifactWriter) -> None:
        world, acllm, equivalences = init_world(), inputs["acllm"], cfg.groups()
        for name, folder in ((RIGHT, cfg.right), (WRONG, cfg.wrong)):
            require_contexts(folder, cfg, wanted_by=name)
        model, decode = load_recogniser(acllm, cfg, world)
        tried = [*cfg.grid(), {"context_search": "plain"}]  # the last one is the reference
        shares = world.gather(list(self._decode(cfg, model, world, [replace(decode, **one) for one in tried])))
        problem = ""
        if world.is_main:
            try:
                everything = [one for share in shares for one in share]
                *trials, plain = self._trials(cfg, tried, everything, equivalences=equivalences)
                problem = self._choose(cfg, writer, trials, plain)
            except ValueError as error:  # the other ranks wait for what is wrong
                problem = str(error)
        if problem := world.gather(problem)[0]:
            raise ValueError(problem)

    def _decode(
        self, cfg: TuneDecodingConfig, model: AudioLLM, world: World, tried: list[DecodeConfig]
    ) -> Iterator[Decoded]:
        for batch in given_batches(cfg, model, world, contexts={RIGHT: cfg.right, WRONG: cfg.wrong}):
            for utterance in decoded(model, batch, NONE, tried[0], cfg=cfg):
                yield -1, NONE, utterance
            for number, settings in enumerate(tried):
                for condition in (RIGHT, WRONG):
                    for utterance in decoded(model, batch, condition, settings, cfg=cfg):
                        yield number, condition, utterance

    def _trials(
        self,
        cfg: TuneDecodingConfig,
        tried: list[dict[str, Any]],
        everything: list[Decoded],
        *,
        equivalences: list[list[str]] | None,
    ) -> list[Trial]:
        found: dict[tuple[int, str], list[ScoredUtterance]] = {}
        for number, condition, utterance in sorted(everything, key=lambda one: one[2].id):
            found.setdefault((number, condition), []).append(utterance)
        trials = []
        for number, settings in enumerate(tried):
            scores = score_conditions(
                {NONE: found[-1, NONE]} | {name: found[number, name] for name in (RIGHT, WRONG)},
                normalizer=cfg.normalizer or None,
                unit=cfg.unit or None,
                equivalences=equivalences,
                seed=cfg.seed,
            )
            trials.append(Trial.of(settings, scores))
        return trials

    def _choose(self, cfg: TuneDecodingConfig, writer: ArtifactWriter, trials: list[Trial], plain: Trial) -> str:
        """Choose and write; return what is wrong where every setting harms, else ""."""
        choice = choose(trials, max_loss=cfg.max_loss, max_echo=cfg.max_echo)
        self._write(cfg, writer, trials, plain, choice)
        if choice.allowed:
            return ""
        return (
            f"no setting keeps max_loss ({cfg.max_loss:g}) and max_echo ({cfg.max_echo:g}) with wrong contexts; try "
            f"smaller alphas or prunes, or allow more; see {writer.set_aside('refused')}/tuning.md"
        )

    def _write(
        self, cfg: TuneDecodingConfig, writer: ArtifactWriter, trials: list[Trial], plain: Trial, choice: Choice
    ) -> None:
        limits = {"max_loss": cfg.max_loss, "max_echo": cfg.max_echo}
        best = choice.trial
        entry = {
            "limits": limits,
            "allowed": choice.allowed,
            "overrides": [f"decode.{name}={yaml_scalar(value)}" for name, value in best.settings.items()],
            "trials": [*map(_entry, trials)],
            "plain_context_search": _entry(plain),
        }
        (writer.path / "tuning.json").write_text(json.dumps(entry, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        table = tuning_table([*trials, plain], best, **limits)
        (writer.path / "tuning.md").write_text(table, encoding="utf-8")
        figure = tuning_figure(trials, best, along="context_alpha", max_loss=cfg.max_loss)
        (writer.path / "tuning.svg").write_text(figure, encoding="utf-8")
        writer.metrics.update(
            {f"none/{best.metric}": best.rate(NONE)}
            | {f"{name}/{best.metric}": best.rate(name) for name in (RIGHT, WRONG)}
            | {"right/strict_recall": best.rate(RIGHT, "strict_recall"), "right/recall": best.rate(RIGHT, "recall")}
            | {"wrong/echo_rate": best.rate(WRONG, "echo_rate")}
        )


def _entry(trial: Trial) -> dict[str, Any]:
    """Return a trial for JSON, which has no infinity."""
    return {"settings": {name: yaml_scalar(value) for name, value in trial.settings.items()}, "rates": trial.rates}
