"""Cross-entropy of a vocabulary head, forward and backward: seconds and peak memory with and without all logits.

    python benchmarks/head_cross_entropy.py [--tokens 512] [--shape demo|0.5B|7B] [--dtype float32] [--head frozen]
    python benchmarks/head_cross_entropy.py --device cuda --tokens 2048 --shape 7B --dtype bfloat16

Rows: the reference (all logits), its chunks under torch.utils.checkpoint (the usual remedy), and ours at several sizes
of a chunk. Each runs in a process of its own: CPU seconds of one core or seconds of the GPU, the least of `repeats`,
and the growth of resident or allocated memory at its peak, of which the weight's own gradient is a part.
Shape letters: N tokens, L width of a hidden state, V vocabulary.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seedling.kernels.head_cross_entropy import CHUNK_LOGITS, head_cross_entropy

SHAPES = {"demo": (1200, 128), "0.5B": (151936, 896), "7B": (152064, 3584)}  # V, L; the latter two of Qwen2.5


class Case(NamedTuple):
    tokens: int
    shape: str
    dtype: str
    head: str
    device: str
    repeats: int


class Cost(NamedTuple):
    seconds: float
    peak_bytes: int


def checkpointed(hidden_NL: Tensor, weight_VL: Tensor, targets_N: Tensor, *, chunk_logits: int) -> Tensor:
    """Return nll_N, by chunks of tokens that are computed again in the backward pass."""

    def one(hidden_NL: Tensor, targets_N: Tensor) -> Tensor:
        return head_cross_entropy(hidden_NL, weight_VL, targets_N, impl="reference").nll_N

    rows = max(1, chunk_logits // len(weight_VL))
    pairs = zip(hidden_NL.split(rows), targets_N.split(rows))
    return torch.cat([checkpoint(one, hidden, targets, use_reentrant=False) for hidden, targets in pairs])


def cost(case: Case, impl: str, chunk_logits: int) -> Cost:
    """Measure one row; the process is this row's alone."""
    torch.set_num_threads(1)
    V, L = SHAPES[case.shape]
    dtype, generator = getattr(torch, case.dtype), torch.Generator(case.device).manual_seed(0)
    made = {"generator": generator, "device": case.device}
    weight_VL = torch.empty(V, L, dtype=dtype, device=case.device).normal_(std=0.02, generator=generator)
    weight_VL.requires_grad_(case.head == "trained")
    hidden_NL = torch.randn(case.tokens, L, dtype=dtype, **made).requires_grad_()
    targets_N = torch.randint(0, V, (case.tokens,), **made)

    def step(tokens: int) -> None:
        hidden, targets = hidden_NL[:tokens], targets_N[:tokens]
        if impl == "checkpoint":
            nll_N = checkpointed(hidden, weight_VL, targets, chunk_logits=chunk_logits)
        else:
            nll_N = head_cross_entropy(hidden, weight_VL, targets, impl=impl, chunk_logits=chunk_logits).nll_N
        nll_N.sum().backward()
        hidden_NL.grad = weight_VL.grad = None

    step(2)  # the libraries' own buffers
    before, seconds = start_of_peak(case.device), []
    for _ in range(case.repeats):
        started = clock(case.device)
        step(case.tokens)
        seconds.append(clock(case.device) - started)
    return Cost(min(seconds), peak(case.device) - before)


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def start_of_peak(device: str) -> int:
    """Return the memory in use, in bytes, and forget the highest so far."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak(device: str) -> int:
    return status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--shape", choices=SHAPES, default="0.5B")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--head", choices=("frozen", "trained"), default="frozen")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1 << 22, 1 << 24, CHUNK_LOGITS], help="logits of one")
    args = parser.parse_args()
    case = Case(args.tokens, args.shape, args.dtype, args.head, args.device, args.repeats)
    rows = [("reference", CHUNK_LOGITS), ("checkpoint", max(args.chunks)), *(("chunked", size) for size in args.chunks)]
    V, L = SHAPES[case.shape]
    print(f"{case.tokens} tokens, {V} x {L}, {case.dtype}, head {case.head}, {case.device}")
    print("| | tokens a chunk | s | ratio | peak GB | ratio |\n|---|---|---|---|---|---|")
    spawn = multiprocessing.get_context("spawn")
    first: Cost | None = None
    for impl, size in rows:
        with spawn.Pool(1) as pool:
            one = pool.apply(cost, (case, impl, size))
        first = first or one
        tokens = "all" if impl == "reference" else min(case.tokens, max(1, size // V))
        print(
            f"| {impl} | {tokens} | {one.seconds:.3g} | {first.seconds / one.seconds:.2f}x | "
            f"{one.peak_bytes / 1e9:.3f} | {first.peak_bytes / max(1, one.peak_bytes):.1f}x |",
            flush=True,
        )


if __name__ == "__main__":
    main()
