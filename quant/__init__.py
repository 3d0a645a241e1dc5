"""Floor 2: low-bit quantisation (decoupleQ): calibrate, solve, refine, pack."""

from .decoupleq import solve_layer
from .solution import LayerSolution

__all__ = ["LayerSolution", "solve_layer"]
