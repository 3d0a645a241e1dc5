"""The machine code of every kernel of a packed layer, on three generations of GPUs, without one.

No spills; tensor cores where they are meant; codes decoded by LOP3, two weights each, without a conversion.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from seedling.kernels.ahead_of_time import SHARED_BYTES, compile_calls
from seedling.kernels.machine_code import count
from seedling.kernels.w2a16.layout import Layout

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
WIDE = (28672, 8192)  # N, K
# M and form: every regime, both widths, planes of 64 and of 32, groups of one plane and of all
CALLS = {
    "few": (1, Layout(*WIDE, 2, 64)),
    "some": (16, Layout(*WIDE, 2, 64)),
    "middle": (64, Layout(*WIDE, 2, 64)),
    "many": (4096, Layout(*WIDE, 2, 64)),
    "few, 4 bits": (1, Layout(*WIDE, 4, 64)),
    "middle, 4 bits": (64, Layout(*WIDE, 4, 64)),
    "few, groups of 32": (1, Layout(*WIDE, 2, 32)),
    "middle, per channel": (64, Layout(*WIDE, 2, -1)),
    "few, an odd shape": (3, Layout(1001, 1000, 2, 64)),
}
FUSED = [name for name in CALLS if name != "many"]
EVERYWHERE = ("few", "some", "middle", "many")  # on the other generations the rest would take long and say little


@pytest.fixture(scope="module")
def tables():
    """benchmarks/w2a16_compiled.py: what makes the tables of docs/kernels.md."""
    path = list(sys.path)
    sys.path.append(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("w2a16_compiled", ROOT / "benchmarks" / "w2a16_compiled.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("w2a16_limits", None)
    sys.path[:] = path


@pytest.fixture(scope="module")
def compiled(tables):
    """Return {(capability, name): launches}."""
    found = {}
    for capabilities, names in (([90], list(CALLS)), ([80, 100], EVERYWHERE)):
        calls = [tables.linear(*CALLS[name]) for name in names] + [tables.backward(4096, Layout(*WIDE, 2, 64))]
        for capability, launches in compile_calls(calls, capabilities=capabilities).items():
            found |= {(capability, name): of for name, of in zip([*names, "backward"], launches)}
    return found


def named(compiled, *names: str):
    return [(f"{key}: {one.kernel}", one) for key, of in compiled.items() if key[1] in names for one in of]


# Blackwell keeps six registers of the middle kernel in memory: 16 tokens a block would not, and decode twice as often.
SPILLED_BYTES = {("middle_kernel", 100): 24}


def test_nothing_is_spilled_and_shared_memory_fits(compiled):
    for name, one in named(compiled, *CALLS, "backward"):
        allowed = SPILLED_BYTES.get((one.kernel, one.capability), 0)
        assert one.spilled_bytes <= allowed, f"{name} keeps {one.spilled_bytes} bytes of a thread in memory"
        assert one.shared_bytes <= SHARED_BYTES[one.capability] and one.blocks_per_multiprocessor >= 1, name


def test_fused_products_run_on_tensor_cores(compiled, tables):
    for key, launches in compiled.items():
        if key[1] in FUSED:
            assert any(count(one.instructions, *tables.TENSOR_CORES) for one in launches), key
    for capability, opcode in {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}.items():
        launches = compiled[capability, "backward"]
        gradient = next(one for one in launches if one.kernel == "scale_zero_gradient_kernel")
        assert count(gradient.instructions, opcode), f"{capability}: {opcode} is missing in {gradient.kernel}"


def test_codes_are_decoded_two_at_a_time_and_never_converted(compiled, tables):
    for key, launches in compiled.items():
        if key[1] not in FUSED:
            continue
        spent = [(one, found) for one in launches if (found := tables.decode_of(one))]
        assert spent, f"{key}: no kernel decodes by LOP3"
        for one, decode in spent:
            assert count(tables.decoding_loop(one), "I2F", "I2FP") == 0, f"{key}: {one.kernel} converts integers"
            assert 0.5 <= decode.integer <= 3.0, f"{key}: {decode.integer:.2f} integer instructions a weight"


def test_few_positions_are_multiplied_as_decoded_without_shared_memory_between(compiled, tables):
    for name, one in named(compiled, "few", "some"):
        if tables.decode_of(one):
            loop = tables.decoding_loop(one)
            assert count(loop, "STS", "SHFL") == 0, f"{name} exchanges between threads"
            # Codes come through the pipeline of copies, 4 bytes a channel at the least.
            assert count(loop, "LDGSTS.E", "LDGSTS.E.64", "LDGSTS.E.128", "LDG.E.64", "LDG.E.128") > 0, name


def test_types_of_16_bits_decode_alike(tables):
    from seedling.kernels.ahead_of_time import Call

    call = tables.linear(1, Layout(4096, 4096, 2, 64))
    x_MK, codes, scale_zero, *rest = call.args
    half = Call(call.function, (x_MK.to(torch.float16), codes, scale_zero.to(torch.float16), *rest))
    pair = compile_calls([call, half], capabilities=[90])[90]
    bfloat, float16 = (next(found for one in launches if (found := tables.decode_of(one))) for launches in pair)
    assert float16.integer <= bfloat.integer + 0.1
