"""Small random layers for tests of the solver's parts."""

import torch
from torch import Tensor

from seedling.quant.problem import Problem


def random_layer(rows: int, cols: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return weight_NK and the Hessian of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight_NK = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    mix_KK = torch.randn(cols, cols, generator=generator, dtype=torch.float64)
    inputs_nK = torch.randn(4 * cols, cols, generator=generator, dtype=torch.float64) @ mix_KK
    return weight_NK, inputs_nK.t() @ inputs_nK / len(inputs_nK)


def random_problem(rows: int, cols: int, *, bits: int = 2, group_size: int = 4, seed: int = 0) -> Problem:
    weight_NK, hessian_KK = random_layer(rows, cols, seed=seed)
    return Problem.of(weight_NK, hessian_KK, bits=bits, group_size=group_size)
