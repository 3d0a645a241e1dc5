"""A packed recogniser against its dequantised twin: tokens a second and real-time factor, with the same transcripts.

    python benchmarks/decode.py [--sizes demo 6x512] [--device cpu] [--dtypes float32 bfloat16] [--out rows.jsonl]
    python benchmarks/decode.py --run runs/demo/quant_finetune --data runs/demo/shards_test

The twin has plain linear layers with the dequantised weights. The packed one runs three times: as codes alone, with
dense weights for half of what is packed (the LLM's first), and for all of it. Without --run, recognisers have random
weights of 2 bits in groups of 64 and hear noise; the end token is out of reach, so that all take the same steps. With
--run, the whole corpus is decoded by the recogniser's own settings, and any text that is not the twin's ends in exit
code 1.

Runs of a row take turns. On a CPU the median of CPU seconds on --threads threads, so that other work on the machine
does not count; on a GPU that of the clock. There sums of another order may let a token tip over in bf16: the share of
equal transcripts is a column, and only float32 must agree.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from seedling.data.scoring import NONE
from seedling.data.tokenizer import train_bpe
from seedling.model.audio_llm import AudioLLM
from seedling.model.conformer import PRESETS, ConformerConfig, ConformerEncoder
from seedling.model.converter import ConverterConfig
from seedling.model.decoding import DecodeConfig
from seedling.quant.linear import PackedLinear
from seedling.quant.packed_model import model_storage, packed_modules, replace_module
from seedling.quant.solution import LayerSolution
from seedling.stages.evaluate import EvaluateConfig
from seedling.stages.recogniser.decoding import decoded, given_batches, load_recogniser
from seedling.stages.recogniser.unpacking import unpack_recogniser
from seedling.stages.runtime.artifacts import load_artifact
from seedling.stages.runtime.world import init_world

END, PER_SECOND, BITS, GROUP = 2, 3.5, 2, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DENSE = "dense"


class Size(NamedTuple):
    encoder: ConformerConfig
    layers: int
    width: int
    heads: int
    vocabulary: int


SIZES = {
    "demo": Size(PRESETS["demo"], 2, 128, 4, 1200),
    "6x512": Size(ConformerConfig(dim=512, num_layers=6, num_heads=8, dropout=0.0), 6, 512, 8, 8000),
    "28x1024": Size(PRESETS["0.6B"], 28, 1024, 16, 32000),
    "36x4096": Size(PRESETS["0.6B"], 36, 4096, 32, 32000),
}


def packed_recogniser(size: Size, *, device: torch.device, dtype: torch.dtype) -> AudioLLM:
    """Return a recogniser whose encoder and LLM layers are random codes, as large as freshly drawn weights."""
    torch.manual_seed(0)
    with device:
        llm = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=size.width,
                intermediate_size=3 * size.width,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                num_key_value_heads=size.heads,
                vocab_size=size.vocabulary,
                initializer_range=0.05,
                bos_token_id=1,
                eos_token_id=END,
                pad_token_id=0,
            )
        )
        llm.lm_head.bias = nn.Parameter(torch.zeros(size.vocabulary), requires_grad=False)
        llm.lm_head.bias[END] = -1e4
        encoder = ConformerEncoder(size.encoder)
    letters, rng = list("etaoinshrdlu"), np.random.default_rng(0)
    words = ["".join(rng.choice(letters, size=rng.integers(2, 9))) for _ in range(4000)]
    tokenizer = train_bpe(words, vocab_size=1200)
    model = AudioLLM.assemble(encoder=encoder, llm=llm, tokenizer=tokenizer, converter=ConverterConfig(stride=2))
    model = model.to(device).eval()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.startswith(("encoder.layers.", "llm.model.layers.")):
            packed = PackedLinear.from_solution(random_solution(module.weight), bias=module.bias)
            replace_module(model, name, packed)
    model.llm.to(dtype)
    return model


def random_solution(weight_NK: Tensor) -> LayerSolution:
    N, K = weight_NK.shape
    scale_NG = weight_NK.new_full((N, math.ceil(K / GROUP)), float(weight_NK.detach().std()) / 1.12)  # of codes 0..3
    codes_NK = torch.randint(0, 2**BITS, (N, K), dtype=torch.uint8, device=weight_NK.device)
    return LayerSolution(codes_NK, scale_NG, -1.5 * scale_NG, BITS, GROUP)


def twin_of(model: AudioLLM) -> AudioLLM:
    """Return a copy with plain linear layers; experts, which are no linear layers, have dense weights beside codes."""
    twin = copy.deepcopy(model)
    for part in (twin.llm, twin.encoder, twin.converter):
        dtype = next(part.parameters()).dtype
        for name, packed in packed_modules(part).items():
            if isinstance(packed, PackedLinear):
                replace_module(part, name, dense_layer(packed, dtype))
    if packed_modules(twin):
        unpack_recogniser(twin, gb=math.inf)
    return twin


def dense_layer(packed: PackedLinear, dtype: torch.dtype) -> nn.Linear:
    has_bias = packed.bias is not None
    dense = nn.Linear(packed.in_features, packed.out_features, bias=has_bias, device="meta")
    dense.weight = nn.Parameter(packed.dequantised_NK(dtype), requires_grad=False)
    if has_bias:
        dense.bias = nn.Parameter(packed.bias.detach().to(dtype), requires_grad=False)
    return dense


def variants(model: AudioLLM) -> dict[str, AudioLLM]:
    """Return the twin and the packed recogniser by how much of it is dense."""
    weights = sum(matrix.weights for matrix in model_storage(model).matrices)
    half_gb = weights * next(model.llm.parameters()).dtype.itemsize / 2e9
    found = {DENSE: twin_of(model)}
    for name, gb in (("packed", 0.0), ("packed, half unpacked", half_gb), ("packed, unpacked", math.inf)):
        found[name] = copy.deepcopy(model)
        unpack_recogniser(found[name], gb=gb)
    for variant in found.values():
        variant.record_steps()
    return found


class Timer:
    """Seconds of a call: of the CPU's work, or of the clock where a GPU works."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def __call__(self, run: Callable[[], Any]) -> tuple[float, Any]:
        now = time.perf_counter if self.on_gpu else time.process_time
        if self.on_gpu:
            torch.cuda.synchronize()
        started, result = now(), run()
        if self.on_gpu:
            torch.cuda.synchronize()
        return now() - started, result


def by_turns(runs: dict[str, Callable[[], Any]], timer: Timer, *, rounds: int) -> tuple[dict, dict]:
    """Return each run's median seconds and its result; a first turn does not count."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    results = {}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            seconds, results[name] = timer(run)
            if turn:
                took[name].append(seconds)
    return {name: float(np.median(seconds)) for name, seconds in took.items()}, results


def row(impl: str, *, took: dict[str, float], tokens: int, audio_seconds: float, same: float, **of: Any) -> dict:
    device = of.pop("device")
    return {
        "op": "decode",
        "impl": impl,
        **of,
        "tokens_per_second": round(tokens / took[impl], 1),
        "rtf": round(took[impl] / audio_seconds, 5),
        "ratio": round(took[DENSE] / took[impl], 3),  # times as fast as dense
        "same": same,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(": ")[2] for line in info.read_text().splitlines() if "model name" in line]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.machine()


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"


def random_rows(args: argparse.Namespace) -> Iterator[dict]:
    """Yield a row for each size, type and variant, of noise between 2 and 14 seconds."""
    device = torch.device(args.device)
    seconds = np.random.default_rng(0).uniform(2, 14, size=args.utterances)
    lengths_B = torch.tensor([int(16000 * s) for s in seconds], device=device)
    torch.manual_seed(1)
    waveforms_BN = (0.1 * torch.randn(len(seconds), int(lengths_B.max()))).to(device)
    config = DecodeConfig(beam_size=args.beams, max_tokens_per_second=PER_SECOND, extra_tokens=0)
    for size in args.sizes:
        for dtype in args.dtypes:
            models = variants(packed_recogniser(SIZES[size], device=device, dtype=DTYPES[dtype]))
            runs = {
                name: lambda model=model: [
                    n[0].ids for n in model.transcribe_ids(waveforms_BN, lengths_B, config=config)
                ]
                for name, model in models.items()
            }
            took, ids = by_turns(runs, Timer(device), rounds=args.rounds)
            for name in runs:
                same = float(np.mean([a == b for a, b in zip(ids[name], ids[DENSE])]))
                assert same == 1 or (device.type == "cuda" and dtype != "float32"), f"{name} writes other transcripts"
                yield row(
                    name,
                    took=took,
                    tokens=sum(map(len, ids[name])),
                    audio_seconds=float(seconds.sum()),
                    same=same,
                    size=size,
                    dtype=dtype,
                    beams=args.beams,
                    utterances=args.utterances,
                    device=device,
                )


def corpus_rows(args: argparse.Namespace) -> Iterator[dict]:
    """Decode a corpus with a finished packed recogniser; yield a row for each variant, and print what differs."""
    world, acllm = init_world(), load_artifact(artifact_of(args.run), kind="acllm")
    precision = {"float32": "fp32", "bfloat16": "bf16"}[args.dtypes[0]]
    cfg = EvaluateConfig(
        stage="evaluate", run_dir="unused", data=args.data, inputs={}, precision=precision, unpack_gb=0.0
    )
    model, decode = load_recogniser(acllm, cfg, world)
    models = variants(model)
    took, texts, audio_seconds = dict.fromkeys(models, 0.0), {name: {} for name in models}, 0.0
    timer = Timer(world.device)
    for batch in given_batches(cfg, model, world, contexts={}):
        audio_seconds += batch.audio.seconds
        for name, variant in models.items():
            seconds, found = timer(
                lambda variant=variant, batch=batch: list(decoded(variant, batch, NONE, decode, cfg=cfg))
            )
            took[name] += seconds
            texts[name] |= {utterance.id: utterance.hypothesis for utterance in found}
    count = model.processor.tokenizer
    for name, said in texts.items():
        different = [key for key, text in said.items() if text != texts[DENSE][key]]
        for key in different:
            print(f"{name}: {key}: {said[key]!r}, dense {texts[DENSE][key]!r}", file=sys.stderr)
        yield row(
            name,
            took=took,
            tokens=sum(len(count(text)["input_ids"]) for text in said.values()),
            audio_seconds=audio_seconds,
            same=1 - len(different) / len(said),
            size=str(args.run),
            dtype=args.dtypes[0],
            beams=decode.beam_size,
            utterances=len(said),
            device=world.device,
        )


def artifact_of(run: Path) -> Path:
    return run if (run / "manifest.json").is_file() else run / "artifact"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["demo", "6x512"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"], help="of the LLM")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--utterances", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run", type=Path, help="a run that has made a packed recogniser, or its artifact")
    parser.add_argument("--data", help="folder of shards that --run decodes")
    parser.add_argument("--out", type=Path, help="rows are added to this file, one JSON object a line")
    args = parser.parse_args()
    if bool(args.run) != bool(args.data):
        parser.error("--run and --data belong together")
    torch.set_num_threads(args.threads)
    print("| size | LLM's type | weights | tokens a second | real-time factor | times dense | same text |")
    print("|---|---|---|---|---|---|---|")
    worst = 1.0
    for one in corpus_rows(args) if args.run else random_rows(args):
        figures = f"{one['tokens_per_second']} | {one['rtf']} | {one['ratio']} | {one['same']:.0%}"
        print(f"| {one['size']} | {one['dtype']} | {one['impl']} | {figures} |", flush=True)
        worst = min(worst, one["same"])
        if args.out:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(one) + "\n")
    return int(bool(args.run) and worst < 1)


if __name__ == "__main__":
    sys.exit(main())
