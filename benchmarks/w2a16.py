"""A packed linear layer against torch's product in 16 bits, and against GemLite where that is installed.

    python benchmarks/w2a16.py [--bits 2] [--group-size 64] [--dtype bfloat16] [--out FOLDER] [--batches 1 16] [--quick]
    python benchmarks/w2a16.py --model       what limits each shape, from the machine code; needs no GPU
    python benchmarks/w2a16.py --compiled    registers, shared memory, instructions a weight; needs no GPU

Weights are cold: a CUDA graph calls every implementation on so many copies of its weights that none is in the L2 cache
when it comes round again, 1 GB of them at least. Same shapes, same type, same input for all. Microseconds are the
median of --rounds replays over the calls of a replay, spread the distance of the quartiles over the median. Results are
compared before anything is timed. GB/s counts what has to be moved: weights as stored, activations, outputs; its share
is of a copy of 1 GB measured in the same run. Rows go to FOLDER/w2a16.jsonl, a figure to FOLDER/w2a16.png where
matplotlib is installed. Exit status 2: no GPU.
Shape letters: M positions, K input channels, N output channels.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from seedling.kernels.w2a16.layout import Layout
from seedling.kernels.w2a16.op import packed_linear

sys.path.append(str(Path(__file__).resolve().parent))  # left out where PYTHONSAFEPATH is set
from w2a16_compiled import compiled_table, modelled_table
from w2a16_limits import BATCHES, SHAPES, aims, moved_bytes, weight_bits

COLD_BYTES = 1 << 30
Product = Callable[[Tensor], Tensor]


def copies_of(weight_bytes: float, *, cold_bytes: int = COLD_BYTES) -> int:
    """Return how many weights a graph goes through; three at least, so that reading one never repeats the last."""
    return max(3, -(-cold_bytes // int(weight_bytes)))


# --- implementations: one weight each, all of the same numbers -------------------------------------------------------


class Weight:
    """Random codes, scales and zeros in packed form, and their product of 16 bits."""

    def __init__(self, layout: Layout, *, dtype: torch.dtype, device: str):
        self.layout, self.dtype = layout, dtype
        self.codes = torch.randint(0, 256, (layout.rows, layout.N), dtype=torch.uint8, device=device)
        self.scale_zero = torch.randn(layout.G, layout.N, 2, device=device).mul_(layout.K**-0.5).to(dtype)

    def dense_NK(self) -> Tensor:
        from seedling.kernels.w2a16.reference import dequantise

        return dequantise(self.codes, self.scale_zero, self.layout, self.dtype)


def torch_product(weight: Weight) -> Product:
    dense_NK = weight.dense_NK()
    return lambda x_MK: torch.nn.functional.linear(x_MK, dense_NK)


def packed_product(weight: Weight) -> Product:
    _, _, bits, group_size = weight.layout
    arguments = {"bits": bits, "group_size": group_size, "impl": "triton"}
    codes, scale_zero = weight.codes.clone(), weight.scale_zero.clone()
    return lambda x_MK: packed_linear(x_MK, codes, scale_zero, **arguments)


def gemlite_product(weight: Weight) -> Product:
    """GemLite's form is (code - zero) * scale; ours with its zero divided by minus the scale."""
    from gemlite.core import DType, GemLiteLinear

    from seedling.kernels.w2a16.packing import unpack_codes

    N, K, bits, group_size = weight.layout
    codes_NK = unpack_codes(weight.codes, K, bits=bits, group_size=group_size)
    scale_NG, zero_NG = weight.scale_zero.permute(2, 1, 0)
    kind = {torch.bfloat16: DType.BF16, torch.float16: DType.FP16}[weight.dtype]
    g = K if group_size == -1 else group_size
    layer = GemLiteLinear(bits, group_size=g, in_features=K, out_features=N, input_dtype=kind, output_dtype=kind)
    layer.pack(codes_NK, scale_NG.contiguous(), (-zero_NG.float() / scale_NG.float()).to(weight.dtype), None)
    return layer


def implementations() -> dict[str, Callable[[Weight], Product]]:
    found = {"torch": torch_product, "seedling": packed_product}
    if importlib.util.find_spec("gemlite"):
        found["gemlite"] = gemlite_product
    else:
        print("gemlite is not installed: compared with torch alone", file=sys.stderr)
    return found


# --- measuring -------------------------------------------------------------------------------------------------------


def timed_us(products: list[Product], x_MK: Tensor, *, rounds: int) -> tuple[float, float]:
    """Return the median of one call's microseconds, and the distance of the quartiles over it."""
    for product in products[:3]:
        product(x_MK)  # compiles, and tunes where an implementation does
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product(x_MK)
    graph.replay()
    took = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(1e3 * start.elapsed_time(end) / len(products))
    return middle(took)


def middle(took: list[float]) -> tuple[float, float]:
    """Return the median, and the distance of the quartiles over it."""
    median = statistics.median(took)
    if len(took) < 2:
        return median, 0.0
    low, _, high = statistics.quantiles(took, n=4, method="inclusive")
    return median, (high - low) / median


def copy_bandwidth(*, rounds: int) -> float:
    """Return bytes a second, read and written, of a copy of 1 GB."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    us, _ = timed_us([lambda _: target.copy_(source)] * 3, source, rounds=rounds)
    return 2 * source.numel() / us * 1e6


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def measured(M: int, K: int, N: int, args: argparse.Namespace, *, provenance: dict) -> Iterator[dict]:
    """Yield a row for each implementation of one shape, torch first."""
    dtype = getattr(torch, args.dtype)
    weight = Weight(Layout(N, K, args.bits, args.group_size), dtype=dtype, device="cuda")
    x_MK = torch.randn(M, K, device="cuda", dtype=dtype)
    wanted, torch_us = None, None
    for name, make in args.implementations.items():
        stored = 16 if name == "torch" else weight_bits(args.bits, args.group_size, K)
        products = [make(weight) for _ in range(copies_of(K * N * stored / 8))]
        found = products[-1](x_MK)
        wanted = found if wanted is None else wanted
        error = relative_error(found, wanted)
        if not error < 2e-2:  # two roundings of weights to 16 bits, and another order of sums
            raise SystemExit(f"{name}: {M} x {K} x {N} differs from torch by {error:.3g} of its norm")
        us, spread = timed_us(products, x_MK, rounds=args.rounds)
        torch_us = us if torch_us is None else torch_us
        yield row(M, K, N, name, us, spread, torch_us, stored=stored, dtype=args.dtype) | provenance
        del products


def row(
    M: int, K: int, N: int, name: str, us: float, spread: float, torch_us: float, *, stored: float, dtype: str
) -> dict:
    gigabytes = moved_bytes(M, K, N, bits_a_weight=stored) / us / 1e3
    return {
        "op": "w2a16", "impl": name, "shape": [M, K, N], "dtype": dtype, "us": round(us, 2),
        "spread": round(spread, 3), "GB/s": round(gigabytes), "ratio": round(torch_us / us, 3),
    }  # fmt: skip


def provenance_of(args: argparse.Namespace) -> dict:
    """Return what every row carries: where, when and of what it was measured."""
    head = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    gpu = torch.cuda.get_device_name()
    return {
        "bits": args.bits, "group_size": args.group_size, "gpu": gpu, "commit": commit, "date": f"{date.today()}",
        "torch": torch.__version__,
    }  # fmt: skip


def line(found: dict, *, copy: float) -> str:
    """Return a row as the table has it."""
    must_target = aims(*found["shape"]) if found["impl"] == "seedling" else None
    verdict = ""
    if must_target:
        must, target = must_target
        reached = "target" if found["ratio"] >= target else "must" if found["ratio"] >= must else "BELOW must"
        verdict = f"{must:.2f} / {target:.2f}  {reached}"
    M, K, N = found["shape"]
    share = found["GB/s"] * 1e9 / copy
    return (
        f"{M:6} {K:6} {N:6}  {found['impl']:9}{found['us']:10.2f}{found['spread']:8.1%}{found['GB/s']:8}"
        f"{share:8.0%}{found['ratio']:8.2f}  {verdict}"
    ).rstrip()


def figure(rows: list[dict], file: Path) -> None:
    """Draw ratios over M, a panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = sorted({tuple(found["shape"][1:]) for found in rows})
    drawn, panels = plt.subplots(1, len(shapes), figsize=(4 * len(shapes), 3.4), sharey=True, squeeze=False)
    for panel, (K, N) in zip(panels[0], shapes):
        of_shape = [found for found in rows if tuple(found["shape"][1:]) == (K, N)]
        for name in dict.fromkeys(found["impl"] for found in of_shape):
            points = [(found["shape"][0], found["ratio"]) for found in of_shape if found["impl"] == name]
            panel.plot(*zip(*points), marker="o", label=name)
        wanted = [(M, *aims(M, K, N)) for M in sorted({f["shape"][0] for f in of_shape}) if aims(M, K, N)]
        if wanted:
            batches, musts, targets = zip(*wanted)
            panel.plot(batches, musts, "k_", label="must")
            panel.plot(batches, targets, "k^", markersize=4, label="target")
        panel.set(xscale="log", title=f"{K} x {N}", xlabel="M")
    panels[0][0].set_ylabel("times torch, 16 bits")
    panels[0][-1].legend()
    drawn.tight_layout()
    drawn.savefig(file, dpi=150)


def measure(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    args.implementations = implementations()
    copy, provenance = copy_bandwidth(rounds=args.rounds), provenance_of(args)
    print(f"{provenance['gpu']}: a copy of 1 GB moves {copy / 1e12:.2f} TB/s; share is of that")
    head = f"{'M':>6} {'K':>6} {'N':>6}  {'impl':9}{'us':>10}{'spread':>8}{'GB/s':>8}{'share':>8}{'ratio':>8}"
    print(f"{head}  must / target")
    rows = []
    with open(args.out / "w2a16.jsonl", "a", encoding="utf-8") as file:
        for K, N in SHAPES[:: 3 if args.quick else 1]:
            for M in args.batches:
                for found in measured(M, K, N, args, provenance=provenance):
                    rows.append(found)
                    file.write(json.dumps(found) + "\n")
                    print(line(found, copy=copy), flush=True)
    if importlib.util.find_spec("matplotlib"):
        figure(rows, args.out / "w2a16.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=2, choices=(2, 4))
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="the smallest and the largest shape")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--model", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args()
    if args.model or args.compiled:
        table = compiled_table if args.compiled else modelled_table
        print("\n".join(table(bits=args.bits, group_size=args.group_size)))
    elif torch.cuda.is_available():
        measure(args)
    else:
        print("no CUDA device: nothing is measured; --model and --compiled work without one", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
