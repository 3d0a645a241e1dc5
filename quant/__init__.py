"""Floor 2: low-bit quantisation (decoupleQ): calibrate, solve, refine, pack."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .decoupleq import solve_layer
    from .solution import LayerSolution

__all__ = ["LayerSolution", "solve_layer"]


def __getattr__(name: str):
    """Import public names on first use: `import seedling` passes by here and must not cost the seconds of torch."""
    if name == "solve_layer":
        from .decoupleq import solve_layer

        return solve_layer
    if name == "LayerSolution":
        from .solution import LayerSolution

        return LayerSolution
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
