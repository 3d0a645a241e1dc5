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
from .exact_products import exact_products
from .gptq import GPTQRounding, gptq
from .initial import group_clip, row_clip
from .problem import Problem, Quantised
from .rtn import rtn
from .solution import LayerSolution

ROUNDS = 3
FEW_ROWS = 1e-4  # a share of them; a step that helps fewer ends the search
NARROWER_STEPS = 0.15  # of a range, in steps of its scale


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
    with exact_products(weight_NK.device):
        problem = Problem.of(weight_NK, hessian_KK, bits=bits, group_size=group_size)
        return problem.solution(METHODS[method](problem))


def default(problem: Problem) -> Quantised:
    return box_aware(problem, columns=block_columns(problem.weight_NK.shape[1]))


def first_level(problem: Problem) -> Quantised:
    return box_aware(problem, columns=1)


def box_aware(problem: Problem, *, columns: int) -> Quantised:
    """Round within the box and refit, in turn; a round counts as a whole, and no row gets worse."""
    rounding, found = BoxRounding(ActOrder(problem), columns=columns), group_clip(problem)
    for attempt in range(ROUNDS):
        tried = refitted(problem, rounding(narrowed(problem, found) if attempt else found))
        helped = (tried.errors_N < found.errors_N).float().mean()
        found = found.or_better(tried)
        if helped < FEW_ROWS:
            break
    return found


def narrowed(problem: Problem, found: Quantised) -> Quantised:
    """Return a row's only group with a range that is somewhat narrower; more groups stay as they are.

    Codes hold their scale where it is: refitted, it moves by less than it should. With one group a row, which has to
    choose for all columns, a push lowers the error by 1.3 %; groups of 64 choose well by themselves, and lose 1.3 %.
    """
    if problem.groups > 1:
        return found
    part = 1 - NARROWER_STEPS / problem.top
    scale_NG = part * found.scale_NG
    return found._replace(scale_NG=scale_NG, zero_NG=found.zero_NG + problem.top / 2 * (found.scale_NG - scale_NG))


def second_level(problem: Problem) -> Quantised:
    """The published rounds: codes and then scales are taken, each where the row's error falls."""
    rounding, found = GPTQRounding(ActOrder(problem)), rtn(problem)
    found, grid = found.or_better(rounding(found)), row_clip(problem)
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
