"""quant_finetune: trains the scales and zeros of a packed recogniser on labelled speech, all integers frozen.

Goes on from what quantize made (`inputs.acllm`), on pairs and triples as context_sft does. The full-precision
recogniser (`inputs.teacher`) runs beside it and says what the quantised one should have said:

    L = CE + ctc_weight CTC + kl_weight KL(teacher || student) + encoder_weight E          a mean over target tokens

E is the relative squared error of the encoder's frames. Scales are trained as their ratio to what they were, centres
as a shift in units of the scale (quant/tuned.py), so that one learning rate, a relative one, serves all matrices. What
comes out is packed again, its integers those of the input to the bit; scales are rounded to 16 bits there, and the
artifact's metrics say by how much, beside how far they were moved: a change below the rounding has no effect.

The control is context_sft or sft on the unpacked recogniser with the same data and steps: the paper lacks it.
Shape letters: B utterances, N target tokens, V vocabulary.
"""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor

from ..data.loader import AudioBatch
from ..model.audio_llm import AudioLLM, AudioLLMOutput
from ..model.augment import SpecAugmentConfig
from ..model.conformer import ConformerConfig
from ..model.distillation import relative_frame_error, token_kl
from ..quant.hf import DecoupleQConfig, declare_packed, place_packed
from ..quant.packed_model import codes_hash, fold, model_storage, packed_modules, tune
from ..quant.trained_scales import SCALES, TrainedScales, tuned_matrices
from .recogniser.contextual import ContextualConfig, ContextualTraining
from .recogniser.training import Prompts, RecogniserConfig
from .runtime.artifacts import Artifact, ArtifactSpec, ArtifactWriter
from .runtime.metrics import Metrics
from .runtime.stage import StepOutput, on_meta, only_shapes
from .runtime.train_config import TrainConfig

AGREEING = ("tokenizer", "prompts", "feature_fingerprint")  # facts that a teacher shares with its student


@dataclass(kw_only=True)
class QuantFinetuneConfig(ContextualConfig):
    # What the teacher hears is what the student hears: by default nothing is masked or dropped.
    specaugment: SpecAugmentConfig = field(
        default_factory=partial(SpecAugmentConfig, num_time_masks=0, num_freq_masks=0)
    )
    encoder: ConformerConfig = field(default_factory=partial(ConformerConfig, dropout=0.0))
    train: TrainConfig = field(default_factory=partial(TrainConfig, weight_decay=0.0))
    kl_weight: float = 0.5
    temperature: float = 1.0  # of both distributions in the KL
    encoder_weight: float = 0.0
    train_norms: bool = True
    train_biases: bool = True  # of packed matrices
    also_train: list[str] = field(default_factory=list)  # patterns of full-precision parameters, as converter.*

    def __post_init__(self):
        super().__post_init__()
        for name in ("kl_weight", "encoder_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        if self.kl_weight == 0 and self.temperature != QuantFinetuneConfig.temperature:
            raise ValueError(
                f"temperature is {self.temperature} and kl_weight 0, so it has no effect; set kl_weight or leave it out"
            )
        if self.encoder_training != "full":
            raise ValueError(
                f"encoder_training is {self.encoder_training!r}, and this stage trains the scales of what is packed, "
                "wherever it is; leave it out"
            )
        if self.llm_training != "frozen":
            raise ValueError(
                f"llm_training is {self.llm_training!r}, and this stage trains the scales of what is packed; leave it "
                "out, and name full-precision parts in also_train, as also_train=[converter.*]"
            )
        if self.train.optimizer != "adamw":
            raise ValueError(
                f"train.optimizer is {self.train.optimizer}, which is for weight matrices; the integers are frozen: "
                "set train.optimizer=adamw"
            )
        if self.train.weight_decay:
            raise ValueError(
                f"train.weight_decay is {self.train.weight_decay} and would pull every scale towards 0; set "
                "train.weight_decay=0"
            )
        if self.train.precision == "bf16":
            raise ValueError(
                "train.precision is bf16, in which a scale moves by 0.4 % or not at all; set train.precision=autocast "
                "(float32 weights, bf16 arithmetic), or fp32"
            )


class QuantFinetune(ContextualTraining):
    """Cross-entropy and distillation; scales, zeros, norms and biases learn, integers do not."""

    consumes = {"acllm": ArtifactSpec("acllm"), "teacher": ArtifactSpec("acllm", required=False)}
    Config = QuantFinetuneConfig
    takes_packed = True
    cfg: QuantFinetuneConfig

    def build(self, cfg: QuantFinetuneConfig, inputs: dict[str, Artifact]) -> AudioLLM:
        distils = bool(cfg.kl_weight or cfg.encoder_weight)
        if distils != ("teacher" in inputs):
            raise ValueError(
                f"kl_weight is {cfg.kl_weight} and encoder_weight {cfg.encoder_weight}, "
                + (
                    "and there is no teacher; set inputs.teacher to the recogniser that was quantised, or both to 0"
                    if distils
                    else "so inputs.teacher has no effect; set kl_weight=0.5, or leave the teacher out"
                )
            )
        model = super().build(cfg, inputs)
        packed = packed_modules(model)
        if not packed:
            raise ValueError(
                f"{inputs['acllm'].path} holds no packed weights: run stage quantize on it first; the control, the "
                "same fine-tuning of the unpacked recogniser, is stage context_sft, or sft where there are no contexts"
            )
        self.codes = {} if on_meta() else {name: codes_hash(module) for name, module in packed.items()}
        tune(model)
        self.groups = self._groups(cfg, model)
        self.teacher = self._teacher(cfg, inputs, student=model) if distils else None
        return model

    def go_on(self, cfg: RecogniserConfig, acllm: Artifact) -> AudioLLM:
        model = super().go_on(cfg, acllm)
        if on_meta() and (form := getattr(model.config, "quantization_config", None)):
            place_packed(model, DecoupleQConfig(**form))  # what loading does
        return model

    # ---- who teaches

    def _teacher(self, cfg: QuantFinetuneConfig, inputs: dict[str, Artifact], *, student: AudioLLM) -> AudioLLM | None:
        acllm, teacher = inputs["acllm"], inputs["teacher"]
        for name in AGREEING:
            if (wanted := acllm.facts.get(name)) != (found := teacher.facts.get(name)):
                raise ValueError(
                    f"inputs.teacher {teacher.path} has {name} {found!r}, inputs.acllm {acllm.path} has {wanted!r}; "
                    "the teacher must be the recogniser that was quantised, or one made like it"
                )
        if on_meta():
            return None
        dtype = torch.float32 if cfg.train.precision == "fp32" else torch.bfloat16
        model = AudioLLM.from_pretrained(teacher.path, dtype=dtype)
        if packed_modules(model):
            raise ValueError(f"inputs.teacher {teacher.path} is packed itself; give the recogniser that was quantised")
        if cfg.encoder_weight and model.encoder.cfg.dim != student.encoder.cfg.dim:
            raise ValueError(
                f"encoder_weight is {cfg.encoder_weight}, and the encoder of inputs.teacher has width "
                f"{model.encoder.cfg.dim}, the student's {student.encoder.cfg.dim}; set encoder_weight=0"
            )
        model.set_prompts(student.processor.prompts)  # with this run's languages and length of contexts
        return model.eval().requires_grad_(False)

    @torch.no_grad()
    def _taught(self, batch: AudioBatch, prompts: Prompts) -> AudioLLMOutput:
        """Return what the teacher says of a batch. It is no part of the model: no checkpoint or ZeRO shard holds it."""
        assert self.teacher is not None
        self.teacher = self.teacher.to(batch.waveforms_BN.device)
        return self.hear(self.teacher, batch, prompts, ctc=False, return_product=True)

    # ---- what learns

    def _groups(self, cfg: QuantFinetuneConfig, model: AudioLLM) -> dict[str, str]:
        """Return {parameter name: group} of what learns."""
        tuned, groups = tuned_matrices(model), {}
        for owner_name, owner in model.named_modules():
            for own, _ in owner.named_parameters(recurse=False):
                name = f"{owner_name}.{own}"
                if owner_name in tuned and own.startswith(SCALES):
                    groups[name] = "scales"
                elif owner_name in tuned and cfg.train_biases:
                    groups[name] = "biases"
                elif "norm" in type(owner).__name__.lower() and cfg.train_norms:
                    groups[name] = "norms"
        others = [name for name, _ in model.named_parameters() if not name.rpartition(".")[2].startswith(SCALES)]
        for pattern in cfg.also_train:
            found = [name for name in others if fnmatchcase(name, pattern)]
            if not found:
                parts = ", ".join(dict.fromkeys(f"{name.split('.')[0]}.*" for name in others))
                raise ValueError(f"also_train has {pattern!r}, which no parameter is called; parts are {parts}")
            groups |= {name: name.split(".")[0] for name in found if name not in groups}
        if cfg.ctc_weight == 0:  # without its loss nothing tells the CTC head where to go
            groups = {name: group for name, group in groups.items() if not name.startswith("ctc_head.")}
        return groups

    def trainable(self, parameter_name: str) -> str | None:
        return self.groups.get(parameter_name)

    # ---- the loss

    def loss(self, model: AudioLLM, batch: AudioBatch) -> StepOutput:
        cfg, prompts = self.cfg, self.prompts(batch)
        distils = bool(cfg.kl_weight or cfg.encoder_weight)
        out = self.hear(model, batch, prompts, return_product=distils)
        loss_sum, metrics = self.loss_sum(out), self.metrics(out, batch, prompts)
        if distils:
            taught = out if only_shapes(model) else self._taught(batch, prompts)
            sums = self._distances(taught, out)
            for name, weight in (("kl", cfg.kl_weight), ("encoder_error", cfg.encoder_weight)):
                if weight:
                    loss_sum = loss_sum + weight * sums[name]
            metrics |= {name: (distance.detach(), out.count) for name, distance in sums.items()}
        return StepOutput(loss_sum, metrics)

    def _distances(self, taught: AudioLLMOutput, out: AudioLLMOutput) -> dict[str, Tensor]:
        """Return "kl" and "encoder_error", that of the encoder's frames, summed over target tokens.

        Gradients flow through those that have a weight; frames that do not compare, those of another encoder, have no
        error.
        """
        cfg, sums = self.cfg, {}
        teacher, student = (one.logits_NV if one.product is None else one.product for one in (taught, out))
        assert teacher is not None and student is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and cfg.kl_weight > 0):
            sums["kl"] = token_kl(teacher, student, temperature=cfg.temperature).sum()
        theirs_BTD, ours_BTD = taught.speech.encoder_BTD, out.speech.encoder_BTD
        if theirs_BTD.shape == ours_BTD.shape:
            with torch.set_grad_enabled(torch.is_grad_enabled() and cfg.encoder_weight > 0):
                error_B = relative_frame_error(theirs_BTD, ours_BTD, out.speech.encoder_lengths_B)
                sums["encoder_error"] = error_B[out.rows_N].sum()
        return sums

    def beyond_greedy(self, model: AudioLLM, batch: AudioBatch) -> Metrics:
        """Beside the usual: how far from the teacher it is on held-out speech."""
        if self.teacher is None:
            return {}
        found: Metrics = {}
        for prefix, prompts in self.conditions(batch).items():
            out = self.hear(model, batch, prompts, ctc=False, return_product=True)
            sums = self._distances(self._taught(batch, prompts), out)
            found |= {f"{prefix}{name}": (distance, out.count) for name, distance in sums.items()}
        return found

    # ---- what comes out

    @torch.no_grad()
    def export(self, model: AudioLLM, writer: ArtifactWriter) -> None:
        """Fold the scales back and write the packed recogniser; ValueError where an integer is not what it was."""
        trained = TrainedScales.of(model)
        fold(model)
        packed = packed_modules(model)
        for name, before in self.codes.items():
            if codes_hash(packed[name]) != before:
                raise ValueError(
                    f"the integers of {name} are not those of {writer.inputs['acllm'].path} any more; delete the run's "
                    "checkpoints and train again"
                )
        writer.metrics = writer.metrics | {f"quant/{name}": value for name, value in trained.moved(model).items()}
        writer.metrics["quant/bits_per_weight"] = model_storage(model).bits_per_weight
        writer.facts["codes"] = codes_hash(model)
        declare_packed(model)
        super().export(model, writer)
