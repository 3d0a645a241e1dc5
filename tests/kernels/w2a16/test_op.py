"""The op as callers meet it: registration, gradients, types, dispatch, and what it refuses."""

import logging
import os

import pytest
import torch
from packed_weights import explicit, random_weight

from seedling.kernels.w2a16 import op
from seedling.kernels.w2a16.op import packed_linear

LAYOUTS = [(2, 64), (2, -1), (4, 32), (3, 96), (8, 64)]


def arguments(*, bits=2, group_size=64, shape=(2, 5), dtype=torch.float32, grad=True):
    weight = random_weight(12, 200, bits=bits, group_size=group_size, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    x, bias_N = torch.randn(*shape, 200, generator=generator).to(dtype), torch.randn(12, generator=generator).to(dtype)
    leaves = [value.requires_grad_(grad) for value in (x, weight.scale_zero_GN2, bias_N)]
    return weight, *leaves


@pytest.mark.parametrize("bits, group_size", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_torch_finds_the_op_registered_as_it_must_be(bits, group_size, bias):
    weight, x, scale_zero, bias_N = arguments(bits=bits, group_size=group_size)
    torch.library.opcheck(
        torch.ops.seedling.packed_linear.default,
        (x, weight.codes, scale_zero, bias_N if bias else None, bits, group_size, "auto"),
    )


@pytest.mark.parametrize("bits, group_size", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0,)])
def test_gradients_are_those_of_the_layer_written_out(bits, group_size, shape):
    weight, *leaves = arguments(bits=bits, group_size=group_size, shape=shape, dtype=torch.float64)
    x, scale_zero, bias_N = leaves
    y = packed_linear(x, weight.codes, scale_zero, bias_N, bits=bits, group_size=group_size)
    wanted = explicit(x, weight, scale_zero, bias_N)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    dy = torch.randn(wanted.shape, dtype=torch.float64)
    names = ("x", "scale_zero", "bias")
    found_wanted = zip(names, torch.autograd.grad(y, leaves, dy), torch.autograd.grad(wanted, leaves, dy), strict=True)
    for name, one, other in found_wanted:
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("frozen", ["x", "scale_zero", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen):
    weight, x, scale_zero, bias_N = arguments()
    leaves = {"x": x, "scale_zero": scale_zero, "bias": bias_N}
    leaves[frozen].requires_grad_(False)
    packed_linear(x, weight.codes, scale_zero, bias_N, bits=2, group_size=64).sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is None} == {frozen}


def test_it_survives_compilation_with_its_gradients():
    weight, *leaves = arguments()

    def layer(x, scale_zero, bias_N):
        return torch.tanh(packed_linear(x, weight.codes, scale_zero, bias_N, bits=2, group_size=64))

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found, wanted = (torch.autograd.grad(function(*leaves).sum(), leaves) for function in (compiled, layer))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_the_backward_pass_computes_in_the_type_of_the_forward_pass_under_autocast():
    weight, x, scale_zero, _ = arguments()
    plain = torch.autograd.grad(packed_linear(x, weight.codes, scale_zero, bits=2, group_size=64).sum(), x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = packed_linear(x, weight.codes, scale_zero, bits=2, group_size=64)
        assert y.dtype == torch.float32  # the op does not choose types: its caller has
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], plain)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"bits": 5}, "bits is 5"),
        ({"group_size": 40}, "group_size 40 cannot be packed"),
        ({"bits": 4}, "codes has shape"),
        ({"x": torch.randn(2, 300)}, "300 inputs"),
        ({"x": torch.ones(2, 200, dtype=torch.int64)}, "x is torch.int64"),
        ({"codes": torch.zeros(64, 12)}, "codes torch.float32"),
        ({"bias_N": torch.zeros(11)}, r"bias is torch.float32 \[11\]; it must be torch.float32 \[12\]"),
        ({"bias_N": torch.zeros(12).half()}, "bias is torch.float16"),
        ({"codes": torch.zeros(64, 12, dtype=torch.uint8, device="meta")}, r"lie on \['cpu', 'meta'\]"),
        ({"impl": "cuda"}, "impl is 'cuda'; it is auto, triton or reference"),
        ({"impl": "triton"}, "impl='triton' cannot run.*x is on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change, said, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weight, x, scale_zero, bias_N = arguments(grad=False)
    given = {"x": x, "codes": weight.codes, "scale_zero_GN2": scale_zero, "bias_N": bias_N, "bits": 2, "group_size": 64}
    with pytest.raises(ValueError, match=said):
        packed_linear(**given | change)


class Gpu:
    """A machine with a GPU of this compute capability, as torch would describe it."""

    def __init__(self, monkeypatch, capability):
        op._obstacle.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")

    def __enter__(self):
        return torch.device("cuda:0")

    def __exit__(self, *_):
        op._obstacle.cache_clear()


@pytest.mark.parametrize("bits, chosen", [(2, "triton"), (4, "triton"), (3, "reference"), (8, "reference")])
def test_widths_with_a_kernel_take_it_on_a_gpu(bits, chosen, monkeypatch):
    with Gpu(monkeypatch, (9, 0)) as device:
        assert op.implementation("auto", device, bits=bits, dtype=torch.bfloat16) == chosen
        assert op.implementation("auto", device, bits=bits, dtype=torch.float32) == "reference"


def test_a_gpu_that_is_too_old_takes_the_reference_and_says_so_once(monkeypatch, caplog):
    with Gpu(monkeypatch, (7, 5)) as device, caplog.at_level(logging.WARNING):
        assert {op.implementation("auto", device, bits=2, dtype=torch.float16) for _ in range(3)} == {"reference"}
        assert len(caplog.records) == 1 and "Some GPU has compute capability 7.5, below 8.0" in caplog.text
        with pytest.raises(ValueError, match=r"compute capability 7\.5"):
            op.implementation("triton", device, bits=2, dtype=torch.float16)


def test_a_gpu_without_triton_takes_the_reference(monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    with Gpu(monkeypatch, (9, 0)) as device, caplog.at_level(logging.WARNING):
        assert op.implementation("auto", device, bits=2, dtype=torch.float16) == "reference"
        assert "triton is not installed" in caplog.text


@pytest.mark.parametrize("M", [1, 2, 17, 260])
@pytest.mark.parametrize("bits, group_size", [(2, 64), (4, -1)])
def test_the_kernels_of_every_regime_and_their_gradients_agree_with_the_reference(M, bits, group_size):
    """In Triton's interpreter where there is no GPU."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels need a CUDA device or TRITON_INTERPRET=1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = random_weight(40, 200, bits=bits, group_size=group_size, dtype=torch.float16, device=device)
    x = torch.randn(M, 200, generator=torch.Generator().manual_seed(1)).half().to(device).requires_grad_()
    scale_zero, bias_N = weight.scale_zero_GN2.requires_grad_(), torch.ones(40, device=device).half()
    found = {}
    for impl in ("triton", "reference"):
        y = packed_linear(x, weight.codes, scale_zero, bias_N, bits=bits, group_size=group_size, impl=impl)
        found[impl] = [y, *torch.autograd.grad(y.float().square().mean(), (x, scale_zero))]
    for name, one, other in zip(("y", "dx", "dscale_zero"), found["triton"], found["reference"], strict=True):
        error = (one - other).float().norm() / other.float().norm()
        assert one.dtype == other.dtype and error < 3e-3, f"{name}: {error:.2g}"
