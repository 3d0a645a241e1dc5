"""Small kernels of known machine code, for tests of what reads it."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _doubled(x):
    return x + x


@triton.jit
def double_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, _doubled(tl.load(x_ptr + at, mask=at < n)), mask=at < n)


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N), tl.arange(0, BK)
    sums = tl.zeros([M, N], tl.float32)
    for first in range(0, K, BK):
        a = tl.load(a_ptr + m * K + first + k[None, :])
        b = tl.load(b_ptr + (first + k[:, None]) * N + n[None, :])
        sums = tl.dot(a, b, sums)
    tl.store(c_ptr + m * N + n[None, :], sums)


@triton.jit
def convert_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, (tl.load(x_ptr + at) & 3).to(tl.float32))


def double(x: Tensor, *, block: int = 256) -> Tensor:
    y = torch.empty_like(x)
    double_kernel[(triton.cdiv(x.numel(), block),)](x, y, x.numel(), BLOCK=block)
    return y


def double_twice(x: Tensor) -> Tensor:
    return double(double(x), block=512)


def product(a_MK: Tensor, b_KN: Tensor, *, stages: int = 3, warps: int = 4) -> Tensor:
    (M, K), N = a_MK.shape, b_KN.shape[1]
    c_MN = torch.empty(M, N, dtype=torch.float32, device=a_MK.device)
    product_kernel[(1,)](a_MK, b_KN, c_MN, K, M=M, N=N, BK=64, num_stages=stages, num_warps=warps)
    return c_MN


def convert(x: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    convert_kernel[(1,)](x, y, BLOCK=x.numel())
    return y
