"""What the benchmark does around its clock: copies, rows, verdicts, the same numbers for every implementation."""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "w2a16.py"


@pytest.fixture(scope="module")
def benchmark():
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("w2a16_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("w2a16_limits", "w2a16_compiled"):
        del sys.modules[name]
    sys.path[:] = path


def row(benchmark, *, M=1, K=8192, N=28672, name="seedling", us=20.0, torch_us=110.0, stored=2.5):
    return benchmark.row(M, K, N, name, us, 0.01, torch_us, stored=stored, dtype="bfloat16")


@pytest.mark.parametrize("weight_bytes", [1e6, 5.3e6, 33.6e6, 470e6, 2e9])
def test_copies_fill_more_than_any_cache_and_never_repeat_the_last(benchmark, weight_bytes):
    copies = benchmark.copies_of(weight_bytes)
    assert copies >= 3 and copies * weight_bytes >= 1 << 30
    assert copies == 3 or (copies - 1) * weight_bytes <= 1 << 30


def test_the_middle_of_rounds_is_the_median_and_the_spread_that_of_quartiles(benchmark):
    assert benchmark.middle([4.0, 1.0, 2.0, 3.0, 100.0]) == (3.0, pytest.approx((4 - 2) / 3))
    assert benchmark.middle([7.0]) == (7.0, 0.0)


def test_a_row_says_what_was_moved_and_how_often_it_beats_torch(benchmark):
    found = json.loads(json.dumps(row(benchmark)))
    assert found["shape"] == [1, 8192, 28672] and found["ratio"] == 5.5
    assert found["GB/s"] == round((8192 * 28672 * 2.5 / 8 + 2 * (8192 + 28672)) / 20e-6 / 1e9)
    assert {"op", "impl", "shape", "dtype", "us", "GB/s", "ratio"} <= set(found)


@pytest.mark.parametrize(
    "us, said", [(20.0, "4.00 / 5.20  target"), (25.0, "4.00 / 5.20  must"), (40.0, "4.00 / 5.20  BELOW must")]
)
def test_the_table_says_what_was_to_be_reached(benchmark, us, said):
    line = benchmark.line(row(benchmark, us=us), copy=4e12)
    assert line.endswith(said)
    assert "must" not in benchmark.line(row(benchmark, name="torch"), copy=4e12)
    assert "must" not in benchmark.line(row(benchmark, M=2), copy=4e12)


@pytest.mark.parametrize("bits, group_size", [(2, 64), (4, 32), (2, -1)])
def test_every_implementation_multiplies_with_the_same_weight(benchmark, bits, group_size, monkeypatch):
    """GemLite has (code - zero) * scale: a stand-in for its layer keeps what it is given."""
    monkeypatch.setitem(sys.modules, "gemlite", types.ModuleType("gemlite"))
    stand_in = types.ModuleType("gemlite.core")
    stand_in.DType, stand_in.GemLiteLinear = types.SimpleNamespace(BF16=0, FP16=1), StandIn
    monkeypatch.setitem(sys.modules, "gemlite.core", stand_in)
    torch.manual_seed(0)
    layout = benchmark.Layout(24, 160, bits, group_size)
    weight = benchmark.Weight(layout, dtype=torch.float16, device="cpu")
    weight.scale_zero[..., 0].abs_().add_(0.1)
    x_MK = torch.randn(3, 160, dtype=torch.float16)
    wanted = benchmark.torch_product(weight)(x_MK)
    assert benchmark.relative_error(benchmark.gemlite_product(weight)(x_MK), wanted) < 3e-3
    monkeypatch.setattr(benchmark, "packed_linear", without_a_gpu(benchmark.packed_linear))
    assert benchmark.relative_error(benchmark.packed_product(weight)(x_MK), wanted) < 1e-3


class StandIn:
    def __init__(self, bits, *, group_size, in_features, out_features, input_dtype, output_dtype):
        self.group_size = group_size

    def pack(self, codes_NK, scale_NG, zero_NG, bias):
        K = codes_NK.shape[1]
        zero_NK, scale_NK = (v.float().repeat_interleave(self.group_size, 1)[:, :K] for v in (zero_NG, scale_NG))
        self.weight_NK = (codes_NK.float() - zero_NK) * scale_NK

    def __call__(self, x_MK):
        return x_MK.float() @ self.weight_NK.T


def without_a_gpu(packed_linear):
    def on_cpu(x_MK, codes, scale_zero, *, bits, group_size, impl):
        assert impl == "triton"
        return packed_linear(x_MK, codes, scale_zero, bits=bits, group_size=group_size, impl="reference")

    return on_cpu


def test_a_figure_is_drawn_of_some_shapes_and_batches(benchmark, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        row(benchmark, M=M, K=K, N=N, name=name)
        for K, N in ((4096, 4096), (640, 5120))
        for M in (1, 3)
        for name in ("torch", "seedling")
    ]
    benchmark.figure(rows, tmp_path / "w2a16.png")
    assert (tmp_path / "w2a16.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_ends_with_status_2_and_one_line():
    ended = subprocess.run([sys.executable, FILE, "--quick"], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.strip().splitlines() == [
        "no CUDA device: nothing is measured; --model and --compiled work without one"
    ]
