"""A Hugging Face model made of parts that initialise themselves, whose folder is whole or refused.

transformers would draw weights anew when a model is built or when a folder lacks some; here parts may come trained, and
a folder that lacks a weight is not the model that was saved.
"""

from pathlib import Path
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel


class AssembledModel(PreTrainedModel):
    base_model_prefix = ""

    def _init_weights(self, module: nn.Module) -> None:
        """Every part initialises itself when it is built; nothing may be drawn anew when parts are joined."""

    def init_weights(self) -> None:
        """Tie what a part ties, and leave all values alone: some parts come trained."""
        self.tie_weights(recompute_mapping=False)

    @classmethod
    def from_pretrained(cls, path: str | Path, *args, **kwargs) -> Any:
        """Load a folder that `save_pretrained` wrote; missing or misshapen weights are an error, not a fresh draw."""
        report = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        if absent:
            raise ValueError(f"{path}: {len(absent)} weights are missing or misshapen, first {absent[0]}: not complete")
        return (model, info) if report else model
