"""decoupleQ: integers and the floats around them as separate unknowns, found in turn.

Scale and zero are not derived from the range of the weights (https://arxiv.org/abs/2404.12759). One round is: codes for
fixed (scale, zero), then (scale, zero) for fixed codes in closed form; each is taken, row by row, where the error falls.
Methods differ in how codes are found, and from where the search starts:

    default        group_clip, box-aware rounding (quant/box.py)
    first_level    the same, one column at a time: slow, for small layers
    second_level   row_clip, GPTQ: the published setting for language models
    gptq, rtn      baselines (quant/gptq.py, quant/rtn.py): the range of minimum and maximum, never changed

Shape letters: N rows (output channels), K columns (input channels), G groups in a row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .box import BoxRounding
from .closed_form import refitted
from .gptq import gptq, gptq_rounding
from .initial import group_clip, row_clip
from .problem import Problem, Quantised
from .rounding import inverse_factor
from .rtn import rtn
from .solution import LayerSolution

Rounding = Callable[[Tensor, Tensor], Tensor]  # (scale_NG, zero_NG) -> codes_NK


def second_level(problem: Problem, *, rounds: int = 3) -> Quantised:
    rounding = gptq_rounding(problem)
    found = gptq(problem)
    start = row_clip(problem)
    return alternate(problem, found, rounding, start=start, rounds=rounds)


def alternate(
    problem: Problem, found: Quantised, rounding: Rounding, *, start: Quantised, rounds: int, tolerance: float = 1e-4
) -> Quantised:
    """Return `found` after so many rounds; the first one's codes are for the grid of `start`.

    Ends early when a step helps less than `tolerance` of the rows.
    """
    grid = start
    for _ in range(rounds):
        rounded = problem.judged(rounding(grid.scale_NG, grid.zero_NG), grid.scale_NG, grid.zero_NG)
        better = (rounded.errors_N < found.errors_N).float().mean()
        found = found.or_better(rounded)
        if better < tolerance:
            break
        found = grid = refitted(problem, found)
    return found


def box_aware(problem: Problem, *, columns: int, rounds: int, first: int = 30, steps: int = 8) -> Quantised:
    order_K, start = problem.order_K, group_clip(problem)
    hessian_KK = problem.hessian_KK[order_K][:, order_K]
    box = BoxRounding(
        problem.weight_NK.t()[order_K].contiguous(),
        hessian_KK.float(),
        inverse_factor(hessian_KK).float(),
        columns=columns,
        steps=steps,
        first=first,
    )

    def rounding(scale_NG: Tensor, zero_NG: Tensor) -> Tensor:
        from .gptq import column_grid

        codes_KN = box.codes(column_grid(problem, scale_NG, zero_NG))
        codes_NK = torch.empty_like(problem.weight_NK)
        codes_NK[:, order_K] = codes_KN.t()
        return codes_NK

    return alternate(problem, start, rounding, start=start, rounds=rounds)


METHODS: dict[str, Callable[[Problem], Quantised]] = {
    "default": lambda problem: box_aware(problem, columns=16, rounds=4),
    "first_level": lambda problem: box_aware(problem, columns=1, rounds=4),
    "second_level": second_level,
    "gptq": gptq,
    "rtn": rtn,
}


def solve_layer(
    weight_NK: Tensor, hessian_KK: Tensor | None, *, bits: int, group_size: int, method: str = "default"
) -> LayerSolution:
    """Quantise a linear layer's weight for inputs of second moment H = X^T X / n.

    `group_size` columns share scale and zero, -1 for whole rows. Units of weight and inputs do not matter.
    ValueError for a weight or Hessian that is not finite, shapes that do not fit, unknown bits, groups or methods.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it is one of {', '.join(METHODS)}")
    problem = Problem.of(weight_NK, hessian_KK, bits=bits, group_size=group_size)
    return problem.solution(METHODS[method](problem))
