"""Tables from the compiled kernels of packed linear layers, made without a GPU: what they use, and what limits them.

A decoded pair of weights is one LOP3 that takes codes out of a word and puts an exponent over them, so instructions a
weight are those of the loop over half its pairs.
Shape letters: M positions, K input channels, N output channels.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from w2a16_limits import BATCHES, H200, SHAPES, Decode, aims, bounds, ideal_us, weight_bits

from seedling.kernels.ahead_of_time import Call, Compiled, compile_calls
from seedling.kernels.machine_code import Instruction, Unit, busiest_loop, by_unit, count
from seedling.kernels.w2a16.layout import Layout

CAPABILITIES = {80: "A100", 90: "H100, H200", 100: "B200"}
TENSOR_CORES = {"HMMA": "mma", "HGMMA": "wgmma", "UTCHMMA": "tcgen05"}
# (mask & word) | exponent: 128 in bfloat16, 1024 in float16, twice in a word; ptxas keeps one of the two in a register.
EXPONENTS = (0x43004300, 0x64006400)
MASKS = tuple((2**bits - 1 << field) * 0x00010001 for bits in (2, 4) for field in range(11 - bits))


def is_pair(instruction: Instruction) -> bool:
    """Say whether an instruction decodes two weights."""
    if instruction.name != "LOP3":
        return False
    values = {int(word, 16) for word in instruction.operands.replace(",", " ").split() if word.startswith("0x")}
    return bool(values & {0xEA, 0xEC, 0xF8}) and bool(values & {*EXPONENTS, *MASKS})


def decoding_loop(compiled: Compiled) -> Sequence[Instruction]:
    """Return the loop that decodes weights; all instructions where that is no loop, or nothing is decoded."""
    loop = busiest_loop(compiled.instructions, "LOP3")
    return loop if any(map(is_pair, loop)) else compiled.instructions


def decode_of(compiled: Compiled) -> Decode | None:
    """Return the instructions a weight of a kernel; None where it decodes nothing by LOP3."""
    loop = decoding_loop(compiled)
    weights = 2 * sum(map(is_pair, loop))
    if not weights:
        return None
    units = by_unit(loop)
    each = [found / weights for found in (units[Unit.INTEGER], units[Unit.CONVERT], len(loop))]
    return Decode(*each, tokens=compiled.constants.get("BM", 1 << 30))


def meta_arguments(layout: Layout, M: int, *, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Return x, codes and scale_zero of a layer on "meta"."""
    N, K = layout.N, layout.K
    return (
        torch.empty(M, K, dtype=dtype, device="meta"),
        torch.empty(layout.rows, N, dtype=torch.uint8, device="meta"),
        torch.empty(layout.G, N, 2, dtype=dtype, device="meta"),
    )


def linear(M: int, layout: Layout) -> Call:
    """Return the call of a layer on M positions, of whichever regime the table has for it."""
    from seedling.kernels.w2a16 import regimes

    x_MK, codes, scale_zero = meta_arguments(layout, M)
    return Call(regimes.linear, (x_MK, codes, scale_zero, None, layout))


def backward(M: int, layout: Layout) -> Call:
    """Return the call of the gradients of inputs, scales and zeros, as fine-tuning has them: those in float32."""
    from seedling.kernels.w2a16.gradients import gradients

    x_MK, codes, scale_zero = meta_arguments(layout, M)
    dy_MN = torch.empty(M, layout.N, dtype=x_MK.dtype, device="meta")
    wanted = {"wants_x": True, "wants_scale_zero": True}
    return Call(gradients, (dy_MN, x_MK, codes, scale_zero.float(), layout), wanted)


def compiled_table(*, bits: int, group_size: int) -> Iterator[str]:
    """Yield a Markdown table: every kernel that a layer of 8192 x 28672 launches, on three generations.

    Registers and spilled bytes are a thread's, shared bytes a block's; blocks are those that fit a multiprocessor;
    integer and issued are instructions a weight.
    """
    layout = Layout(28672, 8192, bits, group_size)
    calls = {f"{M}": linear(M, layout) for M in BATCHES} | {"4096, backward": backward(4096, layout)}
    compiled = compile_calls(list(calls.values()), capabilities=list(CAPABILITIES))
    yield "| GPU | M | kernel | registers | spilled | shared | blocks | tensor cores | integer | issued |"
    yield "|" + "---|" * 10
    for capability, found in compiled.items():
        for M, launches in zip(calls, found):
            for one in {launch.instructions: launch for launch in launches}.values():
                decode = decode_of(one)
                spent = f"{decode.integer:.2f} | {decode.issued:.2f}" if decode else "- | -"
                cores = next((name for code, name in TENSOR_CORES.items() if count(one.instructions, code)), "-")
                yield (
                    f"| {CAPABILITIES[capability]} | {M} | {one.kernel} | {one.registers} | {one.spilled_bytes} | "
                    f"{one.shared_bytes} | {one.blocks_per_multiprocessor} | {cores} | {spent} |"
                )


def modelled_table(*, bits: int, group_size: int) -> Iterator[str]:
    """Yield a Markdown table: for each shape what an H200 would need at least, and what limits it."""
    yield (
        f"Assumed of {H200.name}: {H200.bytes_per_second / 1e12} TB/s, {H200.tensor_flops / 1e12:.0f} TFLOP/s, "
        f"{H200.multiprocessors} multiprocessors at {H200.clock / 1e9} GHz, 64 integer lanes and 128 slots each."
    )
    yield "Lower bounds, each by itself: latency, launches and imperfect overlap come on top. bf16 is torch's product."
    yield ""
    yield "| K x N | M | bf16 us | memory | tensor | integer | issue | bound us | by | at most | must / target |"
    yield "|" + "---|" * 11
    for K, N in SHAPES:
        layout = Layout(N, K, bits, group_size)
        calls = compile_calls([linear(M, layout) for M in BATCHES], capabilities=[90])[90]
        for M, launches in zip(BATCHES, calls):
            yield modelled_row(M, K, N, launches, bits_a_weight=weight_bits(bits, group_size, K))


def modelled_row(M: int, K: int, N: int, launches: Sequence[Compiled], *, bits_a_weight: float) -> str:
    dense = ideal_us(M, K, N, bits_a_weight=16)
    decode = next((found for launch in launches if (found := decode_of(launch))), Decode(0, 0, 0, tokens=M))
    edges = bounds(M, K, N, decode, bits_a_weight=bits_a_weight)
    us, by = edges.us, edges.by
    if not any(count(launch.instructions, *TENSOR_CORES) for launch in launches):  # decoded first, multiplied after
        us, by = dense + max(edges.integer, edges.issue, ideal_us(0, K, N, bits_a_weight=bits_a_weight)), "both passes"
    must_target = aims(M, K, N)
    wanted = f"{must_target[0]:.2f} / {must_target[1]:.2f}" if must_target else "-"
    times = " | ".join(f"{edge:.1f}" for edge in edges)
    return f"| {K} x {N} | {M} | {dense:.1f} | {times} | {us:.1f} | {by} | {dense / us:.2f}x | {wanted} |"
