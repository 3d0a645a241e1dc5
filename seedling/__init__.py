"""Seedling: from raw speech to a deployed, context-aware speech recogniser."""

from typing import TYPE_CHECKING

from .model.hf import register_lazily

if TYPE_CHECKING:
    from .stages.transcribe import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def _register_packed() -> None:
    from .quant import hf  # noqa: F401 - which registers; where it is half imported, it is about to


# AutoModel, AutoConfig and AutoProcessor know acllm artifacts from here on, and from_pretrained knows packed weights;
# nothing heavy is imported yet.
register_lazily({"transformers.quantizers.auto": _register_packed})


def __getattr__(name: str):
    """Import public names on first use: torch and transformers take seconds."""
    if name == "load":
        from .stages.transcribe import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
