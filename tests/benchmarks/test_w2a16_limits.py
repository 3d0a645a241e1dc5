"""The roofline is that of the specification, and its edges are those of the machine."""

import importlib.util
from pathlib import Path

import pytest

from seedling.kernels.machine_code import Unit

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "w2a16_limits.py"
# us of 16 bits and of 2 bits in groups of 64, M = 1 / 4 / 16 / 64 / 256 / 4096
IDEAL = {
    (4096, 4096): ((7.8, 7.8, 7.9, 8.1, 10.9, 174), (1.2, 1.2, 1.3, 2.7, 10.9, 174)),
    (4096, 11008): ((21.0, 21.0, 21.1, 21.4, 29.2, 468), (3.3, 3.3, 3.4, 7.3, 29.2, 468)),
    (4096, 14336): ((27.3, 27.4, 27.5, 27.9, 38.1, 609), (4.3, 4.3, 4.4, 9.5, 38.1, 609)),
    (8192, 28672): ((109, 109, 110, 110, 152, 2436), (17.1, 17.1, 17.3, 38.1, 152, 2436)),
}


@pytest.fixture(scope="module")
def limits():
    spec = importlib.util.spec_from_file_location("w2a16_limits", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("shape", IDEAL)
def test_ideal_times_are_those_derived_by_hand(limits, shape):
    K, N = shape
    for bits_a_weight, wanted in zip((16, 2.5), IDEAL[shape]):
        found = [limits.ideal_us(M, K, N, bits_a_weight=bits_a_weight) for M in limits.BATCHES]
        assert found == pytest.approx(wanted, rel=0.03, abs=0.06)


@pytest.mark.parametrize("group_size, bits", [(64, 2.5), (128, 2.25), (32, 3.0), (-1, 2 + 32 / 4096)])
def test_scales_and_zeros_count_as_stored_bits(limits, group_size, bits):
    assert limits.weight_bits(2, group_size, 4096) == bits


def test_every_measured_shape_has_an_aim_and_no_other_has_one(limits):
    for K, N in limits.SHAPES:
        for M in limits.BATCHES:
            must, target = limits.aims(M, K, N)
            assert 0 < must < target < 16 / limits.weight_bits(2, 64, K)
    assert limits.aims(1, 8192, 28672) == (4.0, 5.2) and limits.aims(16, 4096, 11008) == (2.6, 3.5)
    assert limits.aims(2, 4096, 4096) is None and limits.aims(1, 4096, 4097) is None


def test_one_integer_instruction_a_weight_takes_about_as_long_as_reading_it(limits):
    edges = limits.bounds(1, 8192, 28672, limits.Decode(1.0, 0.0, 1.2, tokens=16), bits_a_weight=2.5)
    assert edges.integer == pytest.approx(8192 * 28672 / (132 * 64 * 1.8e9) * 1e6)
    assert edges.memory == pytest.approx(17.1, rel=0.01) and edges.integer == pytest.approx(15.4, rel=0.01)
    assert edges.by == "memory" and edges.us == edges.memory


def test_positions_beyond_a_block_decode_again_and_conversions_are_the_slowest(limits):
    few, many = (
        limits.bounds(M, 4096, 4096, limits.Decode(1.0, 0.0, 3.0, tokens=16), bits_a_weight=2.5) for M in (16, 33)
    )
    assert many.integer == 3 * few.integer and many.issue == 3 * few.issue and few.by == "issue"
    converted = limits.bounds(16, 4096, 4096, limits.Decode(1.0, 1.0, 2.0, tokens=16), bits_a_weight=2.5)
    assert converted.integer == pytest.approx(few.integer * limits.H200.lanes(Unit.INTEGER) / 16)
