"""Launchers run without a GPU, and the machine code they would have launched is found: on three generations."""

import pytest
import torch

pytest.importorskip("triton")

import toy_kernels

from seedling.kernels import ahead_of_time
from seedling.kernels.ahead_of_time import Call, compile_calls
from seedling.kernels.machine_code import busiest_loop, count

TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.fixture(scope="module")
def compiled_everywhere():
    """What the toys launch, compiled in a process started while the interpreter was asked for."""
    calls = [
        Call(toy_kernels.double, (meta(1000),)),
        Call(toy_kernels.double_twice, (meta(1000, dtype=torch.float32),)),
        Call(toy_kernels.product, (meta(128, 512), meta(512, 128))),
        Call(toy_kernels.convert, (meta(1024, dtype=torch.uint8),)),
        Call(toy_kernels.product, (meta(64, 512), meta(512, 128)), {"warps": 1, "stages": 1}),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return compile_calls(calls, capabilities=list(TENSOR_CORES))


@pytest.fixture(params=list(TENSOR_CORES))
def compiled(compiled_everywhere, request):
    return request.param, *compiled_everywhere[request.param]


def test_a_launcher_runs_with_its_own_grid_and_block_sizes(compiled):
    capability, (double,), twice, *_ = compiled
    assert (double.kernel, double.grid, double.constants["BLOCK"]) == ("double_kernel", (4, 1, 1), 256)
    assert double.capability == capability and f"sm_{capability}" in double.ptx
    assert [launch.grid[0] for launch in twice] == [4, 2]
    assert [launch.constants["BLOCK"] for launch in twice] == [256, 512]


def test_simple_kernels_use_few_registers_no_stack_and_no_shared_memory(compiled):
    _, (double,), *_ = compiled
    assert 0 < double.registers <= 32
    assert (double.spilled_bytes, double.shared_bytes) == (0, 0)
    assert double.blocks_per_multiprocessor == 16  # 64 warps of 32 threads, 4 a block


def test_a_product_runs_on_the_tensor_cores_of_its_generation(compiled):
    capability, _, _, (product,), *_ = compiled
    assert count(product.instructions, TENSOR_CORES[capability])
    assert count(busiest_loop(product.instructions, TENSOR_CORES[capability]), TENSOR_CORES[capability])
    assert 2 * 64 * 256 * 2 <= product.shared_bytes <= ahead_of_time.SHARED_BYTES[capability]


def test_a_conversion_of_every_element_is_seen(compiled):
    _, (double,), _, _, (convert,), _ = compiled
    assert count(convert.instructions, "I2F", "I2FP") == 1024 / 128
    assert not count(double.instructions, "I2F", "I2FP")


def test_registers_that_do_not_fit_are_reported_as_spilled(compiled_everywhere):
    (launch,) = compiled_everywhere[80][-1]  # 256 sums a thread, and 255 registers
    assert launch.spilled_bytes > 0 and count(launch.instructions, "STL") > 0


def test_shared_memory_that_does_not_fit_is_refused_as_by_the_device():
    too_much = Call(toy_kernels.product, (meta(128, 512), meta(512, 128)), {"stages": 8})
    with pytest.raises(Exception, match="out of resource: shared memory"):
        compile_calls([too_much], capabilities=[80])


def test_an_unknown_capability_and_a_missing_tool_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"compute capability 75 .*\[80, 90, 100\]"):
        compile_calls([], capabilities=[90, 75])
    monkeypatch.setattr("triton.knobs.NvidiaTool.from_path", lambda path: None)
    monkeypatch.setenv("TRITON_CUOBJDUMP_PATH", "/nowhere/cuobjdump")
    with pytest.raises(ValueError, match="triton has no cuobjdump here"):
        ahead_of_time.cuobjdump()
