"""quantize: a recogniser's linear layers in few bits, by decoupleQ, on calibration audio (quant/calibration.py).

Part by part (encoder, converter where a rule asks for it, LLM) and block by block: solve, pack, refine. Finished blocks
are kept in RUN/checkpoints, and a killed run goes on behind the last one. Any number of ranks share the calibration
batches. Which module gets how many bits is said by rules, or chosen under a budget from measured sensitivities.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.audio_sets import AudioDataConfig
from ..data.batches import STAND_IN_KEY, PlannedBatches, make_loader
from ..data.contexts.draw import ContextConfig, DrawnContexts
from ..data.loader import AudioBatch
from ..model.audio_llm import AudioLLM, acllm_facts
from ..model.prompt import tokenize
from ..quant.blocks import Part, SpeechPrompts, parts_of, quantisable
from ..quant.blockwise import RefineConfig, refine_block
from ..quant.calibration import NEVER_CALLED, Calibration, CalibrationConfig
from ..quant.decoupleq import METHODS, solve_layer
from ..quant.hf import declare_packed
from ..quant.linear import SCALE_DTYPES
from ..quant.packed_model import codes_hash, model_storage, packed_modules
from ..quant.report import BlockReport, size_in_words, summary_metrics, worst_module, write_reports
from ..quant.sensitivity import Sensitivity, SensitivityReport, choose_bits
from ..quant.targets import (
    UNTOUCHED,
    QuantRule,
    Target,
    choose_targets,
    fixed_by_rules,
    require_bits,
    require_group_size,
)
from .recogniser.contextual import fitted_contexts
from .runtime.artifacts import Artifact, ArtifactSpec, ArtifactWriter
from .runtime.config import StageConfig
from .runtime.kept_work import KeptWork
from .runtime.train_config import PRECISIONS, RESUME_MODES, require_choice
from .runtime.world import init_world

CANDIDATES = (2, 3, 4, 8)
DTYPES: dict[str, Any] = {"": "auto", "fp32": torch.float32, "bf16": torch.bfloat16}
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class QuantizeConfig(StageConfig):
    data: AudioDataConfig = field(default_factory=AudioDataConfig)  # train: what it is calibrated on
    seconds: float = 7200.0  # of audio that is taken from it; decoupleQ's authors took 3,200 utterances
    batch_seconds: float = 60.0
    contexts: list[str] = field(default_factory=list)  # a sidecar for each folder in data.train; "": pairs only
    context: ContextConfig = field(default_factory=ContextConfig)  # max_tokens: the recogniser says how many it takes
    tell_language: bool = False  # whether the instruction names each utterance's language, where it is known
    method: str = "default"
    bits: int = 2
    group_size: int = 64  # input channels that share a scale and a zero; -1: all of a row
    # In order, the last that matches a module decides; full names, as llm.model.layers.0.mlp.down_proj. The converter
    # stays as it is where no rule names it; embeddings, output head, audio front end and CTC head stay always.
    rules: list[QuantRule] = field(default_factory=list)
    budget: float = 0.0  # mean stored bits per weight, for which `candidates` are dealt out; 0: bits and rules say all
    candidates: list[int] = field(default_factory=lambda: list(CANDIDATES))
    budget_method: str = "gptq"  # that sensitivities are measured with
    scale_dtype: str = "bfloat16"
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    refine: RefineConfig | None = field(default_factory=RefineConfig)  # null: no block-wise refinement
    precision: str = ""  # of weights and activations, fp32 or bf16; empty: as the recogniser is stored
    num_workers: int = 0  # processes that read audio
    max_bad_fraction: float = 0.01  # of the utterances, that may not be readable
    resume: str = "auto"  # never: delete what an earlier run has kept

    def __post_init__(self):
        require_choice("resume", self.resume, RESUME_MODES)
        require_choice("method", self.method, tuple(METHODS))
        require_choice("budget_method", self.budget_method, tuple(METHODS))
        require_choice("scale_dtype", self.scale_dtype, tuple(SCALE_DTYPES))
        if self.precision:
            require_choice("precision", self.precision, PRECISIONS)
        require_bits("bits", self.bits, also_untouched=True)
        require_group_size("group_size", self.group_size)
        for bits in self.candidates:
            require_bits("one of candidates", bits)
        if not self.candidates:
            raise ValueError("candidates is empty; give numbers of bits, as candidates=[2,3,4]")
        if self.budget < 0:
            raise ValueError(f"budget is {self.budget:g}; it must be above 0 (a budget of 0 is none)")
        for name in ("seconds", "batch_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name):g}; it must be above 0")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {self.max_bad_fraction}; give a share from 0 to 1")
        if self.data.augment.speed_probability or self.data.augment.noise_probability:
            raise ValueError("data.augment is on, and calibration is on audio as it will come; leave it out")
        if self.data.valid:
            raise ValueError("data.valid takes no effect in quantize; leave it out, and see `seedling run evaluate`")
        self._refuse_what_has_no_effect()

    def _refuse_what_has_no_effect(self) -> None:
        if self.budget and self.bits != QuantizeConfig.bits:
            raise ValueError(
                f"bits is {self.bits} and budget {self.budget:g}, which deals out candidates instead; leave bits out, "
                "set budget=0, or fix the bits of some modules with rules"
            )
        if not self.budget:
            for name, default in (("candidates", list(CANDIDATES)), ("budget_method", QuantizeConfig.budget_method)):
                if (value := getattr(self, name)) != default:
                    raise ValueError(
                        f"{name} is {value} and has no effect without a budget; set budget, or leave it out"
                    )
        if self.refine is None and (share := self.calibration.full_share) != CalibrationConfig.full_share:
            raise ValueError(
                f"calibration.full_share is {share} and says what refinement aims at, which refine=null turns off; "
                "leave one of them out"
            )


class Quantize:
    """Calibrate, solve, refine, pack."""

    consumes = {"acllm": ArtifactSpec("acllm")}
    produces = "acllm"
    Config = QuantizeConfig

    def run(self, cfg: QuantizeConfig, inputs: dict[str, Artifact], writer: ArtifactWriter) -> None:
        self.cfg, self.world, acllm = cfg, init_world(), inputs["acllm"]
        model = AudioLLM.from_pretrained(acllm.path, dtype=DTYPES[cfg.precision]).to(self.world.device).eval()
        acllm.require(acllm_facts(model), wanted_by="what was loaded from it")
        if packed_modules(model):
            raise ValueError(f"{acllm.path} is quantised already; give inputs.acllm in full precision")
        parts, data = parts_of(model), self._data(model)
        targets = wanted_targets(cfg, model, parts)  # refused before anything is deleted or computed
        what = {"acllm": str(acllm.hash), **what_decides_the_codes(cfg, data)}
        folder = Path(cfg.run_dir) / "checkpoints"
        kept = KeptWork.open(folder, begun_with=what, anew=cfg.resume == "never", world=self.world)
        read, sensitivity = partial(self._read, model, data), []
        if cfg.budget:
            sensitivity = self._sensitivity(model, parts, read, targets, kept)
            targets = within_budget(cfg, targets, sensitivity)
        calibration = Calibration(
            model,
            solve=partial(solve_layer, method=cfg.method),
            scale_dtype=SCALE_DTYPES[cfg.scale_dtype],
            cfg=cfg.calibration,
            folder=folder / "activations",
            kept=kept,
            refine=self._refine if cfg.refine else None,
            ranks=self.world,
            on_block=self._say,
        )
        blocks = calibration.run(parts, read, targets=targets)
        if self.world.is_main:
            declare_packed(model)
            model.save_pretrained(writer.path)
            storage = model_storage(model)
            write_reports(writer.path, blocks, storage=storage, sensitivity=sensitivity)
            writer.facts |= acllm_facts(model) | {"codes": codes_hash(model)}
            writer.metrics |= summary_metrics(blocks, storage=storage)
            worst = worst_module(blocks)
            print(size_in_words(storage))
            if worst is not None:
                print(f"largest error {worst.error:.4f}, in {worst.name}", flush=True)

    # ---- calibration audio

    def _data(self, model: AudioLLM) -> PlannedBatches:
        cfg, contexts = self.cfg, None
        if any(cfg.contexts):
            drawn = self._as_trained(model)
            contexts = DrawnContexts.open(
                cfg.contexts, corpora=cfg.data.train, cfg=drawn, seed=cfg.seed, remote=cfg.data.remote
            )
        # Steps of one micro-batch are the same ones, bit for bit, for any number of ranks.
        return cfg.data.training(
            micro_batch_seconds=cfg.batch_seconds,
            micro_batches=1,
            seed=cfg.seed,
            sample_rate=model.fbank.cfg.sample_rate,
            require_text=True,
            contexts=contexts,
        )

    def _as_trained(self, model: AudioLLM) -> ContextConfig:
        """Return how contexts are drawn, as long as this recogniser takes them; ValueError where it takes none."""
        takes, wanted = model.processor.prompts.context_tokens, self.cfg.context.max_tokens
        if not model.config.reads_contexts:
            raise ValueError(
                "contexts are given, and this recogniser has not been trained with any; leave contexts out, or go on "
                "with context_sft first"
            )
        if wanted not in (takes, ContextConfig.max_tokens):
            raise ValueError(
                f"context.max_tokens is {wanted}, and this recogniser takes {takes} tokens of context; leave it out"
            )
        return replace(self.cfg.context, max_tokens=takes)

    def _read(self, model: AudioLLM, data: PlannedBatches) -> Iterator[tuple[int, SpeechPrompts]]:
        """Yield this rank's calibration batches with their numbers among all.

        Behind the last one all ranks judge together how many could be read: ValueError where they are too few.
        """
        planned = data.first_seconds(self.cfg.seconds)
        mine = range(self.world.rank, len(planned), self.world.size)
        loader = make_loader(data, [planned[number] for number in mine], num_workers=self.cfg.num_workers)
        batches = unusable = 0
        for number, batch in zip(mine, loader):
            for bad in batch.bad:
                log.warning("bad utterance: %s", bad)
            unusable += len(batch.bad)
            if batch.keys != [STAND_IN_KEY]:
                batches += 1
                yield number, self._prompts(model, batch.to(self.world.device))
        batches, unusable = (int(total) for total in self.world.sum([float(batches), float(unusable)]))
        self._judge(batches, unusable, utterances=sum(len(one.utterances) for one in planned))

    def _judge(self, batches: int, unusable: int, *, utterances: int) -> None:
        if not batches:
            raise ValueError(
                f"no calibration audio could be read: all of {utterances} utterances in data.train were unusable (each "
                "is named in the log above); see `seedling check-data`"
            )
        if unusable > self.cfg.max_bad_fraction * utterances:
            raise ValueError(
                f"{unusable} of {utterances} utterances for calibration were unusable, more than max_bad_fraction="
                f"{self.cfg.max_bad_fraction} (each is named in the log above); repair the data "
                "(`seedling check-data`) or raise the limit"
            )

    def _prompts(self, model: AudioLLM, batch: AudioBatch) -> SpeechPrompts:
        """Return what the LLM reads in training: transcript and, where there is one, context are part of it."""
        processor, contexts_ids, languages = model.processor, None, None
        if batch.contexts is not None:
            fitted = fitted_contexts(processor, batch, keep_relevant=self.cfg.context.keep_relevant)
            contexts_ids = [fit.ids if fit is not None else None for fit in fitted]
        if self.cfg.tell_language:
            known = processor.prompts.languages
            languages = [tag if (tag := meta.get("lang")) in known else None for meta in batch.meta]
        transcripts_ids = [tokenize(processor.tokenizer, text) for text in batch.texts]
        return SpeechPrompts(batch.waveforms_BN, batch.lengths_B, transcripts_ids, contexts_ids, languages)

    # ---- what is done with it

    def _sensitivity(
        self, model: AudioLLM, parts: list[Part], read: Any, targets: dict[str, Target], kept: KeptWork
    ) -> list[Sensitivity]:
        cfg = self.cfg
        report = SensitivityReport(
            model,
            candidates=sorted({*cfg.candidates, *(targets[name].bits for name in fixed_by_rules(targets, cfg.rules))}),
            solve=partial(solve_layer, method=cfg.budget_method),
            scale_dtype=SCALE_DTYPES[cfg.scale_dtype],
            folder=kept.folder / "activations",
            arithmetic=cfg.calibration.arithmetic,
            memory_gb=cfg.calibration.memory_gb,
            kept=kept,
            ranks=self.world,
        )
        return report.run(parts, read, targets=targets)

    def _refine(self, block: nn.Module, inputs: Any, targets_BTD: Any, *, name: str) -> dict[str, Any]:
        assert self.cfg.refine is not None
        return asdict(refine_block(block, inputs, targets_BTD, cfg=self.cfg.refine, name=name))

    def _say(self, block: BlockReport) -> None:
        if self.world.is_main:
            errors = [one.error for one in block.modules if one.error is not None]
            refined = block.refinement
            after = f", of the block {refined['before']:.4f}, refined {refined['after']:.4f}" if refined else ""
            said = f"{block.name}: {len(block.modules)} modules, largest error {max(errors, default=0):.4f}"
            print(said + after, flush=True)


def wanted_targets(cfg: QuantizeConfig, model: AudioLLM, parts: list[Part]) -> dict[str, Target]:
    """Return the modules to quantise and how. ValueError where a rule matches none, or where none is left."""
    defaults = {
        name: Target(cfg.bits if part.by_default else UNTOUCHED, cfg.group_size)
        for part in parts
        for block in part.blocks
        for name in quantisable(model, block)
    }
    targets = choose_targets(list(defaults), cfg.rules, defaults=defaults)
    if not targets:
        raise ValueError("rules leave every module as it is (bits=16): there is nothing to quantise")
    return targets


def within_budget(cfg: QuantizeConfig, targets: dict[str, Target], measured: list[Sensitivity]) -> dict[str, Target]:
    """Return the targets with bits dealt out; a module keeps those that a rule gives it.

    What no calibration batch calls has not been measured, and stays in full precision.
    """
    known = {one.name for one in measured}
    for name in (name for name in targets if name not in known):
        log.warning(NEVER_CALLED, name)
    targets = {name: target for name, target in targets.items() if name in known}
    fixed = fixed_by_rules(targets, cfg.rules)
    given = {name: targets[name].bits for name in fixed}
    bits = choose_bits(measured, budget=cfg.budget, candidates=sorted(cfg.candidates), fixed=given)
    return {name: Target(bits[name], target.group_size) for name, target in targets.items()}


def what_decides_the_codes(cfg: QuantizeConfig, data: PlannedBatches) -> dict[str, str]:
    """Return what, beside the recogniser, finished blocks that are gone on from must have been made with."""
    said = asdict(cfg)
    for name in ("stage", "run_dir", "inputs", "data", "resume", "num_workers", "max_bad_fraction", "contexts"):
        del said[name]
    said["calibration"].pop("memory_gb")
    return {"data": data.fingerprint, "settings": json.dumps(said, sort_keys=True)}
