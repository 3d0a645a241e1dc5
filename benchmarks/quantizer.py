"""Solvers of quant/ on the oracle's layers: errors and seconds beside those of the official decoupleQ code.

    SEEDLING_ORACLE=FOLDER python benchmarks/quantizer.py [--methods default second_level] [--sizes 512] [--threads 2]
    python benchmarks/quantizer.py --large second_level [--device cuda]

FOLDER holds the oracle's generate.py and results.json. A row is one layer and method: error on calibration inputs and
on held-out ones (output's error over its energy, undamped), both over what the official code recorded, wall and CPU
seconds of solve_layer, and the seconds recorded. Methods of ours that the official code does not have (default) stand
beside its second level; `first` is the held-out error over the official first level's. The recorded seconds are of
another day: only runs on one quiet machine compare, and those marked * were not alone on theirs.

--large solves one layer of 4096 x 11008 in groups of 64 and reports seconds and peak memory: of the process on a CPU
(weight and Hessian, 1.1 GB, included), of the device's allocations on a GPU.
Shape letters: N output channels, K input channels, n inputs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import time
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from seedling.quant import LayerSolution, solve_layer
from seedling.quant.decoupleq import METHODS

BESIDE = {"rtn": "rtn", "gptq": "official_gptq", "first_level": "official_first_level"}
LARGE, LARGE_GROUP, LARGE_INPUTS = (4096, 11008), 64, 2048


def load_oracle(folder: str | None) -> ModuleType:
    """Import generate.py from the oracle's folder."""
    if not folder or not (file := Path(folder) / "generate.py").is_file():
        raise SystemExit(
            f"the oracle is not at {folder!r}; give --oracle or SEEDLING_ORACLE, the folder of generate.py"
        )
    spec = importlib.util.spec_from_file_location("oracle_generate", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def timed(weight_NK: Tensor, hessian_KK: Tensor, *, group_size: int, method: str) -> tuple[LayerSolution, float, float]:
    """Return the solution at 2 bits, wall seconds and CPU seconds of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    solved = solve_layer(weight_NK, hessian_KK, bits=2, group_size=group_size, method=method)
    if weight_NK.is_cuda:
        torch.cuda.synchronize()
    return solved, time.perf_counter() - wall, time.process_time() - cpu


def compare(oracle: ModuleType, *, methods: list[str], sizes: list[int], device: str) -> None:
    print(
        f"{'size':>5}{'group':>6}{'seed':>5}  {'method':13}{'cal':>9}{'held-out':>9}  {'cal':>6}{'held-out':>9}", end=""
    )
    print(f"{'first':>7}{'wall s':>8}{'CPU s':>7}{'official s':>12}")
    for size, group_size, seed in oracle.CASES:
        if size not in sizes:
            continue
        weight_NK, calibration_nK, heldout_nK = oracle.make_layer(size, size, seed)
        moments = [oracle.second_moment(inputs_nK) for inputs_nK in (calibration_nK, heldout_nK)]
        on_device = torch.tensor(weight_NK, device=device), torch.tensor(moments[0], device=device)
        for method in methods:
            solved, wall, cpu = timed(*on_device, group_size=group_size, method=method)
            found = [oracle.rel(weight_NK, solved.dequantised_NK().cpu().numpy(), H_KK) for H_KK in moments]
            row = recorded(oracle, size, group_size, seed, BESIDE.get(method, "official_second_level"))
            first = recorded(oracle, size, group_size, seed, "official_first_level")
            print(f"{size:5}{group_size:6}{seed:5}  {method:13}{found[0]:9.5f}{found[1]:9.5f}  ", end="")
            print(f"{ratio(found[0], row, 'rel_cal'):>6}{ratio(found[1], row, 'rel_test'):>9}", end="")
            official = f"{row['seconds']:.2f}{'*' if row['contended'] else ' '}" if row else "-"
            print(f"{ratio(found[1], first, 'rel_test'):>7}{wall:8.2f}{cpu:7.2f}{official:>12}", flush=True)


def recorded(oracle: ModuleType, size: int, group_size: int, seed: int, method: str) -> dict | None:
    try:
        return oracle.recorded(size, group_size, seed, method)
    except KeyError:
        return None


def ratio(found: float, row: dict | None, key: str) -> str:
    return f"{found / row[key]:.3f}" if row else "-"


def large(method: str, *, device: str) -> None:
    """Solve one layer as large as a 7B model's widest, made of random weights and inputs of falling energy."""
    N, K = LARGE
    generator = torch.Generator().manual_seed(0)
    weight_NK = 0.02 * torch.randn(N, K, generator=generator)
    inputs_nK = torch.randn(LARGE_INPUTS, K, generator=generator) * torch.randn(K, generator=generator).mul(0.5).exp()
    hessian_KK = (inputs_nK.t() @ inputs_nK / LARGE_INPUTS).to(device)
    weight_NK, inputs_nK = weight_NK.to(device), None
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    solved, wall, cpu = timed(weight_NK, hessian_KK, group_size=LARGE_GROUP, method=method)
    if device == "cpu":
        peak, of = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "process"
    else:
        peak, of = torch.cuda.max_memory_allocated(), "device"
    energy = float(((weight_NK @ hessian_KK) * weight_NK).sum())
    print(f"{N} x {K}, groups of {LARGE_GROUP}, {method}: {wall:.1f} s ({cpu:.1f} CPU s), peak of the {of} ", end="")
    print(f"{peak / 1e9:.2f} GB, error {float(solved.row_errors_N.sum()) / energy:.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracle", default=os.environ.get("SEEDLING_ORACLE"), help="folder of generate.py")
    quick = ["rtn", "gptq", "second_level", "default"]
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=quick, help="first_level takes minutes at 1024"
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--large", choices=METHODS, help="one layer of 4096 x 11008 instead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.large:
        large(arguments.large, device=arguments.device)
    else:
        oracle = load_oracle(arguments.oracle)
        compare(oracle, methods=arguments.methods, sizes=arguments.sizes, device=arguments.device)


if __name__ == "__main__":
    main()
