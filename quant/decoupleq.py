"""decoupleQ: integers and the floats around them as separate unknowns, found in turn.

Scale and zero are not derived from the range of the weights (https://arxiv.org/abs/2404.12759). One round is: codes
for fixed (scale, zero), then (scale, zero) for fixed codes in closed form; each is taken, row by row, where the error
falls.
The methods differ in how codes are found, and in where the search starts:

    default        group_clip, box-aware rounding (quant/box.py)
    first_level    the same, solved anew before every column: slow, for small layers
    second_level   row_clip, GPTQ: the published setting for language models
    gptq, rtn      baselines: the range of minimum and maximum, never changed

Shape letters: N rows (output channels), K columns (input channels), G groups in a row.
"""

from collections.abc import Callable

from torch import Tensor

from .act_order import ActOrder
from .box import BoxRounding, block_columns
from .closed_form import refitted
from .gptq import GPTQRounding, gptq
from .initial import group_clip, row_clip
from .problem import Problem, Quantised
from .rtn import rtn
from .solution import LayerSolution

ROUNDS = 3
FEW_ROWS = 1e-4  # a share of them; a step that helps fewer ends the search


def solve_layer(
    weight_NK: Tensor, hessian_KK: Tensor | None, *, bits: int, group_size: int, method: str = "default"
) -> LayerSolution:
    """Quantise a linear layer's weight for inputs of second moment H = X^T X / n.

    `group_size` columns share scale and zero; -1: a whole row. Units of weight and inputs do not matter. Without H all
    columns count alike. ValueError for a weight or H that is not finite, for shapes that do not fit, and for bits,
    group sizes and methods that there are none of.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it is one of {', '.join(METHODS)}")
    problem = Problem.of(weight_NK, hessian_KK, bits=bits, group_size=group_size)
    return problem.solution(METHODS[method](problem))


def default(problem: Problem) -> Quantised:
    start = group_clip(problem)
    columns = block_columns(problem.weight_NK.shape[1])
    return alternate(start, start, BoxRounding(ActOrder(problem), columns=columns), problem)


def first_level(problem: Problem) -> Quantised:
    start = group_clip(problem)
    return alternate(start, start, BoxRounding(ActOrder(problem), columns=1), problem)


def second_level(problem: Problem) -> Quantised:
    rounding, found = GPTQRounding(ActOrder(problem)), rtn(problem)
    return alternate(found.or_better(rounding(found)), row_clip(problem), rounding, problem)


def alternate(
    found: Quantised, start: Quantised, rounding: Callable[[Quantised], Quantised], problem: Problem
) -> Quantised:
    """Return `found` after the rounds, of which the first rounds on the grid of `start`; no row gets worse."""
    grid = start
    for _ in range(ROUNDS):
        rounded = rounding(grid)
        helped = (rounded.errors_N < found.errors_N).float().mean()
        found = found.or_better(rounded)
        if helped < FEW_ROWS:
            break
        found = grid = refitted(problem, found)
    return found


METHODS: dict[str, Callable[[Problem], Quantised]] = {
    "default": default,
    "first_level": first_level,
    "second_level": second_level,
    "gptq": gptq,
    "rtn": rtn,
}
