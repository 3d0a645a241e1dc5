"""layer_probe: which layer of a frozen encoder is closest to text; a CTC head on every layer, all trained at once.

Layers count from 1: layer n is the output of the n-th Conformer layer, with the encoder's final norm on it as on all
layers (`return_layers`). One forward pass of the encoder, without gradients, feeds every head. The heads share nothing:
same starting weights, a loss each, no common clipping, so each ends as if it had been trained alone. In Seed-ASR the
layer of the lowest word error rate, 25 of 32, becomes the tokenizer of the next iteration.
Shape letters: B utterances, T frames of 40 ms, D width.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..data.audio_sets import AudioDataConfig
from ..data.batches import STAND_IN_KEY, PlannedBatches
from ..data.loader import AudioBatch
from ..data.scoring import count_errors, get_normalizer, tokenize
from ..data.scoring.figure import Mark, svg_figure
from ..model.ctc import CTCHead, CTCLoss, bytes_text, ctc_loss_sum, greedy_decode, text_bytes
from ..model.speech_encoder import SpeechEncoder, speech_encoder_facts
from .runtime.artifacts import Artifact, ArtifactSpec, ArtifactWriter
from .runtime.config import TrainingStageConfig
from .runtime.stage import StepOutput
from .runtime.train_config import TrainConfig, require_choice

METRICS = ("wer", "cer", "loss")
HEADS = "heads.safetensors"
SATURATED = 0.95  # CTC begins with blanks only, which is an error rate of 1, and stays there for a while
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class LayerProbeConfig(TrainingStageConfig):
    data: AudioDataConfig = field(default_factory=AudioDataConfig)
    layers: list[int] = field(default_factory=list)  # counted from 1; empty: all
    # The error that chooses the layer, on the set `choose_on` (empty: the first one); equal ones are told apart by the
    # other metrics. Where heads learn too little to spell words, all word error rates are near 1 and cer says more.
    choose_by: str = "wer"
    choose_on: str = ""
    normalizer: str = "whisper-basic"
    train: TrainConfig = field(default_factory=lambda: TrainConfig(grad_clip=0.0))

    def __post_init__(self):
        require_choice("choose_by", self.choose_by, METRICS)
        if self.train.grad_clip:
            raise ValueError(
                f"train.grad_clip is {self.train.grad_clip}: clipping by the norm over all layers would let one head "
                "slow down the others; set train.grad_clip=0"
            )

    def chosen_on(self) -> str:
        """Return the validation set that chooses the layer; ValueError where there is none."""
        if not self.data.valid:
            raise ValueError("data.valid is empty: layers are compared on it; set data.valid.dev=DIR")
        if self.choose_on and self.choose_on not in self.data.valid:
            raise ValueError(f"choose_on ({self.choose_on}) is none of data.valid: {', '.join(self.data.valid)}")
        return self.choose_on or next(iter(self.data.valid))


class ProbedEncoder(nn.Module):
    """A frozen encoder, always in evaluation mode, and a LayerNorm with a CTC head for each layer, under its number."""

    def __init__(self, encoder: SpeechEncoder, layers: list[int]):
        super().__init__()
        self.encoder = encoder.eval()
        # All heads start from the same weights, so that layers differ by nothing but their layer.
        dim = encoder.encoder.cfg.dim
        start = nn.Sequential(nn.LayerNorm(dim), CTCHead(dim)).state_dict()
        self.heads = nn.ModuleDict({str(n): nn.Sequential(nn.LayerNorm(dim), CTCHead(dim)) for n in layers})
        for head in self.heads.values():
            head.load_state_dict(start)

    def train(self, mode: bool = True) -> "ProbedEncoder":
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, waveforms_BN: Tensor, lengths_B: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        """Return {layer: log_probs_BTV} and lengths_B in frames."""
        with torch.no_grad():
            _, frames_B, layers = self.encoder(waveforms_BN, lengths_B, return_layers=True)
        return {int(n): head(layers[int(n) - 1]) for n, head in self.heads.items()}, frames_B


class LayerProbe:
    """CTC over bytes on every layer of a frozen encoder."""

    consumes = {"encoder": ArtifactSpec("speech_encoder")}
    produces = "layer_probe"
    Config = LayerProbeConfig

    def build(self, cfg: LayerProbeConfig, inputs: dict[str, Artifact]) -> ProbedEncoder:
        self.cfg, self.normalize, self.encoder_hash = cfg, get_normalizer(cfg.normalizer), inputs["encoder"].hash
        self.chosen_on = cfg.chosen_on()
        with torch.device("cpu"):  # also for `seedling check`: weights that are loaded cannot be on meta
            encoder = SpeechEncoder.from_pretrained(inputs["encoder"].path)
        inputs["encoder"].require(speech_encoder_facts(encoder), wanted_by="what was loaded from it")
        depth = encoder.encoder.cfg.num_layers
        outside = [n for n in cfg.layers if not 1 <= n <= depth]
        if outside:
            raise ValueError(f"layers has {outside[0]}; {inputs['encoder'].path} has layers 1 to {depth}")
        self.sample_rate = encoder.fbank.cfg.sample_rate
        return ProbedEncoder(encoder, sorted(set(cfg.layers)) or list(range(1, depth + 1)))

    def trainable(self, parameter_name: str) -> str | None:
        return None if parameter_name.startswith("encoder.") else "ctc_head"

    def batches(self, cfg: LayerProbeConfig, split: str) -> PlannedBatches | dict[str, PlannedBatches]:
        limits = {
            "micro_batch_seconds": cfg.train.micro_batch_seconds,
            "micro_batches": cfg.train.micro_batches,
            "sample_rate": self.sample_rate,
            "require_text": True,
        }
        if split == "train":
            return cfg.data.training(seed=cfg.seed, **limits)
        return cfg.data.validation(**limits)

    def count(self, batch: AudioBatch) -> int:
        return sum(len(text_bytes(text)) for text in batch.texts)

    def loss(self, model: ProbedEncoder, batch: AudioBatch) -> StepOutput:
        losses = self._losses(*model(batch.waveforms_BN, batch.lengths_B), batch)
        count = self.count(batch)
        metrics = {f"train/{_name(n)}/loss": (loss.loss_sum.detach(), count) for n, loss in losses.items()}
        first = next(iter(losses.values()))
        metrics["too_short_frac"] = (first.too_short, len(batch))
        # A sum of terms that share no parameter: each head's gradient is that of its own loss.
        loss_sum = torch.stack([loss.loss_sum for loss in losses.values()]).sum()
        return StepOutput(loss_sum * (batch.keys != [STAND_IN_KEY]), metrics)

    @torch.no_grad()
    def evaluate(self, model: ProbedEncoder, batches: Iterable[AudioBatch]) -> dict[str, tuple[float, float]]:
        """Loss per byte, and word and character error rates of greedy CTC, for each layer."""
        sums: dict[str, tuple[float, float]] = {}

        def add(n: int, metric: str, value: float, count: float) -> None:
            before = sums.get(f"{_name(n)}/{metric}", (0.0, 0))
            sums[f"{_name(n)}/{metric}"] = (before[0] + value, before[1] + count)

        for batch in batches:
            if batch.keys == [STAND_IN_KEY]:
                continue  # nothing in it could be read; the trainer has named it
            log_probs, frames_B = model(batch.waveforms_BN, batch.lengths_B)
            references = [self.normalize(text) for text in batch.texts]
            for n, loss in self._losses(log_probs, frames_B, batch).items():
                add(n, "loss", float(loss.loss_sum), self.count(batch))
                heard = [self.normalize(bytes_text(ids)) for ids in greedy_decode(log_probs[n], frames_B)]
                for metric, unit in (("wer", "word"), ("cer", "char")):
                    for reference, hypothesis in zip(references, heard):
                        counts = count_errors(tokenize(reference, unit), tokenize(hypothesis, unit))
                        add(n, metric, counts.errors, counts.reference_tokens)
        return sums

    def _losses(self, log_probs: dict[int, Tensor], frames_B: Tensor, batch: AudioBatch) -> dict[int, CTCLoss]:
        targets = [text_bytes(text) for text in batch.texts]
        return {n: ctc_loss_sum(log_probs_BTV, frames_B, targets) for n, log_probs_BTV in log_probs.items()}

    def export(self, model: ProbedEncoder, writer: ArtifactWriter) -> None:
        """Write the chosen layer, the errors of all (layers.json, layers.svg), and the heads."""
        layers = [int(n) for n in model.heads]
        errors = {name: errors_by_layer(writer.metrics, name, layers) for name in self.cfg.data.valid}
        chosen = choose_layer(errors[self.chosen_on], by=self.cfg.choose_by)
        if self.cfg.choose_by != "loss" and errors[self.chosen_on][chosen][self.cfg.choose_by] > SATURATED:
            log.warning(
                f"all layers have a {self.cfg.choose_by} near 1 on {self.chosen_on}: their heads have hardly begun to "
                "spell, and the choice of a layer is chance; train longer (train.max_steps), or choose_by=loss"
            )
        depth = model.encoder.encoder.cfg.num_layers
        facts = {
            "layer": chosen,
            "num_layers": depth,
            "chosen_by": f"lowest {self.cfg.choose_by} on {self.chosen_on}",
            "encoder_manifest": self.encoder_hash,
        }
        writer.facts |= facts | speech_encoder_facts(model.encoder)
        best = errors[self.chosen_on][chosen]
        writer.metrics = writer.metrics | {"layer": chosen, "depth": chosen / depth, **best}
        report = {**facts, "sets": {name: {str(n): row for n, row in rows.items()} for name, rows in errors.items()}}
        (writer.path / "layers.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (writer.path / "layers.svg").write_text(error_figure(errors, chosen=chosen), encoding="utf-8")
        save_file({name: value.cpu() for name, value in model.heads.state_dict().items()}, writer.path / HEADS)


def _name(layer: int) -> str:
    return f"layer_{layer:02d}"


def errors_by_layer(metrics: dict[str, float], valid: str, layers: list[int]) -> dict[int, dict[str, float]]:
    """Return {layer: {"wer", "cer", "loss"}} of a validation set from the trainer's metrics."""
    absent = [n for n in layers if any(f"valid/{valid}/{_name(n)}/{metric}" not in metrics for metric in METRICS)]
    if absent:
        raise ValueError(
            f"data.valid.{valid} has no utterance with a usable text, so layers cannot be compared on it; repair it "
            "(`seedling check-data`) or leave it out"
        )
    return {n: {metric: metrics[f"valid/{valid}/{_name(n)}/{metric}"] for metric in METRICS} for n in layers}


def choose_layer(errors: dict[int, dict[str, float]], *, by: str) -> int:
    """Return the layer with the lowest error; equal ones by the other metrics, then the one nearest to the input."""
    others = [metric for metric in METRICS if metric != by]
    return min(errors, key=lambda n: (errors[n][by], *(errors[n][metric] for metric in others), n))


def error_figure(errors: dict[str, dict[int, dict[str, float]]], *, chosen: int) -> str:
    """Return the SVG of WER and CER against depth."""
    marks = [
        Mark(f"{metric.upper()} on {name}", list(rows), [row[metric] for row in rows.values()], kind)
        for name, rows in errors.items()
        for metric, kind in (("wer", "line"), ("cer", "dashed"))
    ]
    every = [value for mark in marks for value in mark.values]
    marks.append(Mark(f"chosen: layer {chosen}", [chosen, chosen], [min(0.0, *every), max(every)], "dashed"))
    ticks = {n: str(n) for n in next(iter(errors.values()))}
    shown = dict(list(ticks.items())[:: -(-len(ticks) // 16)])
    return svg_figure(
        marks, title="CTC on the frozen layers", x_label="layer", y_label="error rate", percent=True, x_ticks=shown
    )
