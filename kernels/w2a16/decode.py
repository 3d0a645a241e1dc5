"""From packed bytes to what a tensor core multiplies, in registers: no shared memory, no conversion of integers.

A tensor core takes the codes of one channel in pairs of neighbouring columns; the bytes of kernels/w2a16/packing.py lie
channel by channel. Four loads, of four rows each apart by steps that the layout of the matrix instruction dictates,
give a thread four bytes of each of V neighbouring channels; eight byte permutations turn four such registers into four
words, each with four rows of one channel. From there one `lop3` gives two numbers: with the exponent of a power of two
put over it, a code in the low bits of a mantissa is `base + 2^field * code`, exactly, for base 128 in bfloat16 and 1024
in float16. What multiplies them takes `base` out again, with the sum of the activations.

A tile of words is cut so that each thread's words become its operand by renaming registers: the compiled kernels have
no shuffle and no shared memory between load and product. Integer instructions per weight at 2 bits: 8 of 64 for words,
8 of 16 for fields, 3 or 4 of 16 for shifts.

Shape letters of a tile of words: H blocks of 16 rows, W warps, 8 and 4 the lanes of a warp, V channels that a thread
loads at once. A slab is one plane of the tile, [channels, R] or, where each warp has rows of its own, [W, channels, R].
"""

import triton
import triton.language as tl


@triton.constexpr_function
def base_of(dtype, fast):
    """Return what a decoded number has on top of its code: a power of two whose last bit is 1; 0 on the plain path."""
    if not fast:
        return 0
    return 1024 if dtype == tl.float16 else 128


@triton.constexpr_function
def field_of(plane, bits, dtype, fast):
    """Return the bit of a mantissa that a plane's codes are read at: as saves shifts, or high, for exactness."""
    if not fast:
        return 0
    if dtype == tl.float16:  # ten bits; at most 64 is added to a code of 2 bits, at most 16 to one of 4
        return min(4 + 2 * plane, 8) if bits == 2 else 6
    return 2 * (plane % 3) if bits == 2 else 0  # seven bits: the fourth plane of 2 bits, the second of 4 do not fit


@triton.constexpr_function
def added(plane, bits, dtype, fast):
    """Return what is added to a code, in units of a code."""
    return base_of(dtype, fast) / 2 ** field_of(plane, bits, dtype, fast)


@triton.constexpr_function
def unit_of(plane, bits, dtype, fast):
    """Return 2^-field: a code's 1 in units of what is decoded."""
    return 1 / 2 ** field_of(plane, bits, dtype, fast)


@triton.constexpr_function
def _field_asm(bits, field, base):
    mask, exponent = (2**bits - 1 << field) * 0x00010001, {128: 0x43004300, 1024: 0x64006400}[base]
    # 0xea is (a & b) | c.
    return f"{{ .reg .b32 t; lop3.b32 t, $2, {mask:#x}, {exponent:#x}, 0xea; mov.b32 {{$0, $1}}, t; }}"


@triton.jit
def tile_rows(R: tl.constexpr, STEP: tl.constexpr):
    """Return the first row of each word, [H, 1, 1, 4, 1]; its others are 1, STEP and STEP + 1 further.

    STEP is 2 where the compiler gives a lane four neighbouring columns of the left operand, 8 where two and two.
    """
    block = tl.arange(0, R // 16)[:, None, None, None, None]
    return block * 16 + tl.arange(0, 4)[None, None, None, :, None] * (4 if STEP == 2 else 2)


@triton.jit
def load_words(
    codes_ptr, rows, channels, N, STEP: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr
):
    """Return int32 words [H, W, 8, 4, V]: of one channel the rows r, r + STEP, r + 1, r + STEP + 1, lowest byte first.

    `rows` are those of tile_rows in the matrix, `channels` the first of each lane, [1, W or 1, 8, 1, 1]. EVEN says that
    N is a multiple of V and codes_ptr points to four channels at a time; there, channels past the last repeat others.
    """
    if EVEN:
        # No mask: a tensor of bits on the way to a product would have the compiler choose another layout.
        channels = tl.minimum(channels, N - V)
        offsets = rows * (N // 4) + channels // 4 + tl.arange(0, V // 4)[None, None, None, None, :]
        return _words_of_quads(*_four_rows(codes_ptr, offsets, None, N // 4, STEP), V, FAST)
    channels += tl.arange(0, V)[None, None, None, None, :]
    a, b, c, d = _four_rows(codes_ptr, rows * N + channels, channels < N, N, STEP)
    return a.to(tl.int32) | b.to(tl.int32) << 8 | c.to(tl.int32) << 16 | d.to(tl.int32) << 24


@triton.jit
def _four_rows(codes_ptr, offsets, mask, row, STEP: tl.constexpr):
    """Return what lies at the offsets in rows r, r + STEP, r + 1, r + STEP + 1."""
    # Each byte is read once: it should not displace activations from the caches.
    a = tl.load(codes_ptr + offsets, mask=mask, eviction_policy="evict_first")
    b = tl.load(codes_ptr + STEP * row + offsets, mask=mask, eviction_policy="evict_first")
    c = tl.load(codes_ptr + row + offsets, mask=mask, eviction_policy="evict_first")
    d = tl.load(codes_ptr + (STEP + 1) * row + offsets, mask=mask, eviction_policy="evict_first")
    return a, b, c, d


@triton.jit
def _words_of_quads(a, b, c, d, V: tl.constexpr, FAST: tl.constexpr):
    """Turn four rows of four channels an integer into four channels of four rows each."""
    H: tl.constexpr = a.shape[0]
    W: tl.constexpr = a.shape[1]
    if FAST:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            """{ .reg .b32 ab0, ab1, cd0, cd1;
            prmt.b32 ab0, $4, $5, 0x5140; prmt.b32 ab1, $4, $5, 0x7362;
            prmt.b32 cd0, $6, $7, 0x5140; prmt.b32 cd1, $6, $7, 0x7362;
            prmt.b32 $0, ab0, cd0, 0x5410; prmt.b32 $1, ab0, cd0, 0x7632;
            prmt.b32 $2, ab1, cd1, 0x5410; prmt.b32 $3, ab1, cd1, 0x7632; }""",
            "=r,=r,=r,=r,r,r,r,r",
            [a, b, c, d],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        w0 = (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24
        w1 = (a >> 8 & 255) | (b >> 8 & 255) << 8 | (c >> 8 & 255) << 16 | d >> 8 << 24
        w2 = (a >> 16 & 255) | (b >> 16 & 255) << 8 | (c >> 16 & 255) << 16 | d >> 16 << 24
        w3 = (a >> 24 & 255) | (b >> 24 & 255) << 8 | (c >> 24 & 255) << 16 | d >> 24 << 24
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape([H, W, 8, 4, V])


@triton.jit
def _pair(word, BIT: tl.constexpr, FIELD: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """Return the numbers of rows r and r + 1 whose codes begin at bits BIT and 16 + BIT."""
    if FAST:
        shifted = word >> BIT - FIELD if BIT >= FIELD else word << FIELD - BIT
        near, far = tl.inline_asm_elementwise(
            _field_asm(BITS, FIELD, base_of(DTYPE, FAST)),
            "=h,=h,r",
            [shifted],
            dtype=(tl.int16, tl.int16),
            is_pure=True,
            pack=1,
        )
        return near.to(DTYPE, bitcast=True), far.to(DTYPE, bitcast=True)
    mask: tl.constexpr = 2**BITS - 1
    return (word >> BIT & mask).to(DTYPE), (word >> BIT + 16 & mask).to(DTYPE)


@triton.jit
def decode_plane(words, PLANE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """Return base + 2^field * code of one plane: [H, W, 8, 4, V, 2, 2], then row r or r + 1, then 0 or STEP further."""
    field: tl.constexpr = field_of(PLANE, BITS, DTYPE, FAST)
    near_0, near_1 = _pair(words, BITS * PLANE, field, BITS, DTYPE, FAST)
    far_0, far_1 = _pair(words, 8 + BITS * PLANE, field, BITS, DTYPE, FAST)
    return tl.join(tl.join(near_0, near_1), tl.join(far_0, far_1))


@triton.jit
def slab_of_warps(values, R: tl.constexpr, W: tl.constexpr, V: tl.constexpr, STEP: tl.constexpr):
    """Return [W, 8 V, R] of a tile whose warps have rows of their own: channels in the order (V, 8)."""
    if STEP == 2:
        values = values.permute(1, 4, 2, 0, 3, 6, 5)
    else:
        values = values.permute(1, 4, 2, 0, 6, 3, 5)
    return values.reshape([W, 8 * V, R])


@triton.jit
def slab(values, R: tl.constexpr, W: tl.constexpr, V: tl.constexpr, STEP: tl.constexpr):
    """Return [8 W V, R] of a tile whose warps have channels of their own: in the order (V / 2, W, 2, 8)."""
    values = values.reshape([R // 16, W, 8, 4, V // 2, 2, 2, 2])
    if STEP == 2:
        values = values.permute(4, 1, 5, 2, 0, 3, 7, 6)
    else:
        values = values.permute(4, 1, 5, 2, 0, 7, 3, 6)
    return values.reshape([8 * W * V, R])
