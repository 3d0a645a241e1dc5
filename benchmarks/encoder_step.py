"""A step of encoder_pretrain against one of transformers' Wav2Vec2-BERT: audio seconds per CPU second of one core.

    python benchmarks/encoder_step.py [--size demo|75M] [--batches 10] [--rounds 3] [--compile]
    python benchmarks/encoder_step.py --device cuda --size 0.6B|2B

Forward and backward of masked prediction in one process and one run, the models taking turns at every batch. For both:
the same utterances (log-normal lengths, 1 to 25 s), log-mel features, codes, masks, and a head on masked frames; 25
frames a second; depth, width, heads, feed-forward width and kernel; no dropout, no optimizer. Theirs gets its 40 ms by
stacking four frames in front of its linear projection (it usually stacks two), and its attention by
scaled_dot_product_attention. It runs with rotary positions, its fastest, and with its default, those of the released
model; on our batches, bucketed by length, and on its usual ones, utterances as they come.

On a GPU it is our step alone: bf16, utterances of 30 s, with and without activation checkpointing; MFU counts the
operations of the forward pass three times, and those of recomputation not at all.

Shape letters: B utterances, N samples, T frames of 10 ms, F mel bins, L label frames of 40 ms, D encoder width, M
masked label frames.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from seedling.data.plan import Plan, PlanConfig
from seedling.model.conformer import PRESETS, SUBSAMPLING, ConformerConfig, ConformerEncoder, valid_frames
from seedling.model.features import Fbank
from seedling.model.masked_prediction import CodeHead, MaskedPrediction
from seedling.model.masking import MaskConfig, draw_spans
from seedling.model.random_quantizer import QuantizerConfig, RandomProjectionQuantizer, stacked

SAMPLE_RATE = 16000
BATCH_SECONDS = 60.0
POOL = 5000  # utterances that batches are planned from: with few, buckets are not yet full
CODES = QuantizerConfig(codebook_size=1024)
GPU_CODES = QuantizerConfig(num_codebooks=16)  # of pretrain_0.6b and pretrain_2b
GPU_BATCH_SECONDS, GPU_UTTERANCE_SECONDS, GPU_STEPS = 240, 30, 10


class StepInput(NamedTuple):
    """A batch with its masks; `seconds` of audio without padding."""

    waveforms_BN: Tensor
    lengths_B: Tensor
    mask_BL: Tensor
    masked_M: Tensor
    seconds: float
    padded_seconds: float


class Row(NamedTuple):
    """One model's median round."""

    name: str
    seconds_per_cpu_second: float
    padding: float


# --- batches ---------------------------------------------------------------------------------------------------------


def lengths_like_conversations(random: np.random.Generator, count: int) -> np.ndarray:
    """Return seconds: half of the utterances below 6 s, some up to 25 s."""
    return random.lognormal(np.log(6.0), 0.7, count).clip(1.0, 25.0)


class LengthIndex:
    """An index of lengths without audio: all that a plan needs."""

    fingerprint = "lengths"

    def __init__(self, seconds: np.ndarray):
        dtype = [("key", "S8"), ("samples", "<i8"), ("sample_rate", "<i4"), ("text_chars", "<i4")]
        self.rows = np.zeros(len(seconds), dtype=dtype)
        self.rows["samples"], self.rows["sample_rate"] = seconds * SAMPLE_RATE, SAMPLE_RATE
        self.shards, self.rows_S = [0], np.array([len(seconds)])

    def expect(self, shards: Sequence[int]) -> None:
        pass

    def index(self, shard: int) -> np.ndarray:
        return self.rows


def bucketed(index: LengthIndex, *, batches: int) -> list[list[int]]:
    """Return the samples of each utterance of the plan's first batches, which are in no order of length."""
    plan = Plan(index, PlanConfig(max_seconds=BATCH_SECONDS), seed=0, micro_batches_per_step=1)
    steps = [step for step, _ in zip(plan.steps(epochs=1), range(batches))]
    return [[int(index.rows["samples"][row]) for _, row in step.micro_batches[0].utterances] for step in steps]


def as_they_come(batches: list[list[int]], random: np.random.Generator) -> list[list[int]]:
    """Return the same utterances, shuffled, in as many batches of equal numbers of utterances."""
    every = random.permutation([length for batch in batches for length in batch])
    return [list(map(int, part)) for part in np.array_split(every, len(batches))]


def step_input(lengths: list[int], *, seed: int) -> StepInput:
    """Return noise of these lengths: what it says does not change what it costs."""
    generator = torch.Generator().manual_seed(seed)
    lengths_B = torch.tensor(lengths)
    waveforms_BN = 0.1 * torch.randn(len(lengths), max(lengths), generator=generator)
    waveforms_BN *= valid_frames(lengths_B, max(lengths))[..., 0]
    frames_B = ConformerEncoder.output_lengths(Fbank().output_lengths(lengths_B))
    mask_BL = draw_spans(frames_B, MaskConfig(), seed=seed)
    padded = waveforms_BN.numel() / SAMPLE_RATE
    return StepInput(
        waveforms_BN, lengths_B, mask_BL, mask_BL.flatten().nonzero()[:, 0], sum(lengths) / SAMPLE_RATE, padded
    )


# --- the models: each maps a batch to its loss -----------------------------------------------------------------------


def quantizer(codes: QuantizerConfig) -> RandomProjectionQuantizer:
    return RandomProjectionQuantizer(codes, num_mel_bins=Fbank().cfg.num_mel_bins)


class OurStep(nn.Module):
    """What encoder_pretrain runs."""

    def __init__(self, cfg: ConformerConfig, *, codes: QuantizerConfig = CODES, compiled: bool = False):
        super().__init__()
        self.model = MaskedPrediction(
            fbank=Fbank(),
            encoder=ConformerEncoder(cfg),
            mask=MaskConfig(),
            codebook_size=codes.codebook_size,
            quantizer=quantizer(codes),
        )
        if compiled:
            # Layer by layer: of the whole encoder with lengths that vary, inductor fails at the strided convolutions.
            for layer in self.model.encoder.layers:
                layer.compile(dynamic=True)

    def forward(self, batch: StepInput) -> Tensor:
        out = self.model(batch.waveforms_BN, batch.lengths_B, mask_BL=batch.mask_BL, masked_M=batch.masked_M)
        return out.loss_sum


class TheirStep(nn.Module):
    """Wav2Vec2-BERT of the same shape on the same features, codes and masks."""

    def __init__(self, cfg: ConformerConfig, *, positions: str):
        super().__init__()
        from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

        config = Wav2Vec2BertConfig(
            hidden_size=cfg.dim,
            num_hidden_layers=cfg.num_layers,
            num_attention_heads=cfg.num_heads,
            intermediate_size=cfg.ff_mult * cfg.dim,
            conv_depthwise_kernel_size=cfg.conv_kernel,
            feature_projection_input_dim=SUBSAMPLING * cfg.num_mel_bins,
            position_embeddings_type=positions,
            feat_proj_dropout=0.0,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            conformer_conv_dropout=0.0,
            layerdrop=0.0,
            attn_implementation="sdpa",
        )
        self.model = Wav2Vec2BertModel(config)
        self.fbank, self.quantizer, self.head = Fbank(), quantizer(CODES), CodeHead(cfg.dim, CODES.codebook_size)

    def forward(self, batch: StepInput) -> Tensor:
        features_BTF, frames_B = self.fbank(batch.waveforms_BN, batch.lengths_B)
        x_BLX, lengths_B = stacked(features_BTF, frames_B)
        labels_M = self.quantizer.codes(x_BLX.flatten(0, 1)[batch.masked_M])[:, 0]
        valid_BL = valid_frames(lengths_B, x_BLX.shape[1])[..., 0]
        # Its own masking, with our masks in the place of random ones. Codes and input share the stacking here.
        out = self.model(x_BLX, attention_mask=valid_BL, mask_time_indices=batch.mask_BL)
        return self.head(out.last_hidden_state.flatten(0, 1)[batch.masked_M], labels_M)[0]


# --- measuring -------------------------------------------------------------------------------------------------------


def forward_and_backward(step: nn.Module, batch: StepInput) -> None:
    step(batch).backward()
    step.zero_grad(set_to_none=True)


def measure(runs: dict[str, tuple[nn.Module, list[StepInput]]], *, rounds: int) -> list[Row]:
    """Let the models take turns batch by batch; return each one's median round."""
    for step, batches in runs.values():
        forward_and_backward(step, batches[0])  # the first call allocates
    took = {name: np.zeros(rounds) for name in runs}
    for round_ in range(rounds):
        for turn in zip(*(batches for _, batches in runs.values())):
            for (name, (step, _)), batch in zip(runs.items(), turn):
                started = time.process_time()
                forward_and_backward(step, batch)
                took[name][round_] += time.process_time() - started
    rows = []
    for name, (_, batches) in runs.items():
        seconds = sum(batch.seconds for batch in batches)
        padded = sum(batch.padded_seconds for batch in batches)
        rows.append(Row(name, seconds / float(np.median(took[name])), 1 - seconds / padded))
    return rows


def cpu_table(cfg: ConformerConfig, *, batches: int, rounds: int, compiled: bool) -> str:
    torch.set_num_threads(1)  # CPU seconds are those of one core
    random = np.random.default_rng(0)
    lengths = bucketed(LengthIndex(lengths_like_conversations(random, POOL)), batches=batches)
    ours = [step_input(batch, seed=seed) for seed, batch in enumerate(lengths)]
    unsorted = [step_input(batch, seed=seed) for seed, batch in enumerate(as_they_come(lengths, random))]
    own = OurStep(cfg).train()
    rotary, default = (TheirStep(cfg, positions=positions).train() for positions in ("rotary", "relative_key"))
    runs: dict[str, tuple[nn.Module, list[StepInput]]] = {
        "seedling, bucketed": (own, ours),
        "Wav2Vec2-BERT, rotary, the same batches": (rotary, ours),
        "Wav2Vec2-BERT, rotary, utterances as they come": (rotary, unsorted),
        "Wav2Vec2-BERT, relative keys (its default), the same batches": (default, ours),
        "Wav2Vec2-BERT, relative keys (its default), utterances as they come": (default, unsorted),
    }
    if compiled:
        step = OurStep(cfg, compiled=True).train()
        started = time.process_time()
        for batch in ours:
            forward_and_backward(step, batch)
        print(f"compiled in {time.process_time() - started:.0f} CPU seconds, a first round included")
        runs["seedling, bucketed, torch.compile"] = (step, ours)
    rows = measure(runs, rounds=rounds)
    lines = [
        f"{sum(batch.seconds for batch in ours):.0f} s of audio in {batches} batches of {BATCH_SECONDS:.0f} s, median "
        f"of {rounds} rounds; encoder parameters: seedling {parameters(own.model.encoder):,}, "
        f"Wav2Vec2-BERT {parameters(rotary.model):,}",
        "",
        "| model | audio s / CPU s | padding | seedling is |",
        "|---|---|---|---|",
    ]
    for row in rows:
        speed, ratio = row.seconds_per_cpu_second, rows[0].seconds_per_cpu_second / row.seconds_per_cpu_second
        lines.append(f"| {row.name} | {speed:.1f} | {row.padding:.1%} | {ratio:.2f}x |")
    return "\n".join(lines)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- on a GPU --------------------------------------------------------------------------------------------------------


def gpu_table(cfg: ConformerConfig, *, peak_tflops: float) -> str:
    """Return speed, MFU and memory of our step in bf16, without and with checkpointing."""
    lengths = [GPU_UTTERANCE_SECONDS * SAMPLE_RATE] * (GPU_BATCH_SECONDS // GPU_UTTERANCE_SECONDS)
    lines = [
        f"{torch.cuda.get_device_name()}, bf16, {len(lengths)} utterances of {GPU_UTTERANCE_SECONDS} s a step, no "
        f"optimizer; MFU of {peak_tflops:g} TFLOP/s",
        "",
        "| activation checkpointing | audio s / s | MFU | peak memory |",
        "|---|---|---|---|",
    ]
    for checkpointing in (False, True):
        shape = dataclasses.replace(cfg, activation_checkpointing=checkpointing)
        own = OurStep(shape, codes=GPU_CODES).cuda().train()
        own.model.encoder.bfloat16()
        own.model.heads.bfloat16()
        batch = StepInput(*(x.cuda() if isinstance(x, Tensor) else x for x in step_input(lengths, seed=0)))
        try:
            took, flops = gpu_step(own, batch)
            memory = torch.cuda.max_memory_allocated() / 1e9
            mfu = 3 * flops / took / (peak_tflops * 1e12)
            cells = f"{batch.seconds / took:,.0f} | {mfu:.1%} | {memory:.1f} GB"
        except torch.cuda.OutOfMemoryError:
            cells = "does not fit | | "
        lines.append(f"| {'on' if checkpointing else 'off'} | {cells} |")
        del own, batch
        torch.cuda.empty_cache()
    return "\n".join(lines)


def gpu_step(step: nn.Module, batch: StepInput) -> tuple[float, int]:
    """Return the seconds of a step, and the floating point operations of its forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = step(batch)
        loss.backward()
        step.zero_grad(set_to_none=True)

    torch.cuda.reset_peak_memory_stats()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        step(batch)
    flops = counter.get_total_flops()
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(GPU_STEPS):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / GPU_STEPS, flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=PRESETS, help="shape of the encoder (cpu: demo, cuda: 0.6B)")
    parser.add_argument("--batches", type=int, default=10, help=f"of {BATCH_SECONDS:.0f} s (10)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="one more row: our layers under torch.compile")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the GPU in bf16 (989, an H100 SXM)")
    args = parser.parse_args()
    tables: dict[str, Callable[[ConformerConfig], str]] = {
        "cpu": lambda cfg: cpu_table(cfg, batches=args.batches, rounds=args.rounds, compiled=args.compile),
        "cuda": lambda cfg: gpu_table(cfg, peak_tflops=args.peak_tflops),
    }
    size = args.size or {"cpu": "demo", "cuda": "0.6B"}[args.device]
    cfg = dataclasses.replace(PRESETS[size], dropout=0.0, activation_checkpointing=False)
    print(f"encoder {size}: {cfg.num_layers} x {cfg.dim}, {cfg.num_heads} heads, kernel {cfg.conv_kernel}")
    print(tables[args.device](cfg))


if __name__ == "__main__":
    main()
