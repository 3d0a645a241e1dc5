"""Packed models as Hugging Face folders: `quantization_config` in config.json, and who reads it.

`declare_packed(model)` writes into the model's config which matrices are packed and how; save_pretrained then needs
nothing else. from_pretrained finds the method "decoupleq" among transformers' quantizers, puts a packed module in the
place of each that the config names, refuses files that hold fewer packed tensors or more, and loads them as they are:
codes and scales keep their types whatever `dtype` is asked for, which everything else follows.

    "quantization_config": {
      "quant_method": "decoupleq", "version": 1,
      "matrices": {"llm.model.layers.0.self_attn.q_proj":
                   {"bits": 2, "group_size": 64, "scale_dtype": "bfloat16", "shape": [N, K]}, ...}}

A matrix of shape [E, N, K] is one projection of a module of experts, which its name ends with. Padding, spans and the
order of planes follow from bits and group size; kernels/w2a16/packing.py states them, and `version` counts its changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .packed_model import KINDS, forms, packed_modules, replace_module, tuned_modules
from .storage import PACKED_TENSORS

if TYPE_CHECKING:  # it may be half imported here: it imports transformers' quantizers, and the last of them this file
    from transformers.modeling_utils import PreTrainedModel

METHOD = "decoupleq"
VERSION = 1
FORM = '{"bits": 2, "group_size": 64, "scale_dtype": "bfloat16", "shape": [N, K]}'


class DecoupleQConfig(QuantizationConfigMixin):
    """Which matrices of a model are packed, and how."""

    def __init__(self, *, version: int = VERSION, matrices: Mapping[str, dict] | None = None, **others: Any):
        others.pop("quant_method", None)
        if version != VERSION:
            raise ValueError(
                f"quantization_config.version is {version}, this version of seedling reads packed weights of version "
                f"{VERSION}; update seedling, or pack the model again"
            )
        if others:
            raise ValueError(
                f"quantization_config.{min(others)}={others[min(others)]!r} is unknown in version {version}"
            )
        self.quant_method = METHOD
        self.version = version
        if not isinstance(matrices or {}, Mapping):
            raise ValueError(f"quantization_config.matrices is {matrices!r}; it must map names to forms")
        self.matrices = dict(matrices or {})
        for name, form in self.matrices.items():
            if not isinstance(form, Mapping):
                raise ValueError(f"quantization_config.matrices.{name} is {form!r}; it must be a form, such as {FORM}")

    def modules(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return the forms of the matrices of each module, by their names below it."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for name, form in self.matrices.items():
            module, inner = name, ""
            if _of_experts(form):
                module, _, inner = name.rpartition(".")
            found.setdefault(module, {})[inner] = form
        return found


class DecoupleQQuantizer(HfQuantizer):
    """Lets from_pretrained build and fill packed modules."""

    requires_calibration = True  # from_pretrained cannot pack a model: stage quantize does

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **_):
        place_packed(model, self.quantization_config)
        if checkpoint_files:  # none where a state dict is given
            check_files(model, checkpoint_files, self.quantization_config)

    def get_new_dtype(self, converter, param, dtype):
        """Keep scales as they are in the file: a part kept in float32 would have them in float32."""
        if any(target.endswith("scale_zero") for target in converter.target_patterns):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model, **_):
        freeze_packed(model)
        # transformers would save the state dict of a model that has its quantizer, and ignore the one it is given
        # (gathered from ranks). The config says all that a packed model's folder needs.
        del model.hf_quantizer
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def place_packed(model: torch.nn.Module, config: DecoupleQConfig) -> None:
    """Put packed modules of undefined values where the config names them, on the device of those they replace."""
    for name, inner in config.modules().items():
        kind = KINDS["experts" if any(map(_of_experts, inner.values())) else "linear"]
        try:
            before = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"quantization_config names {name}, which {type(model).__name__} does not have; config.json does not "
                "belong to this model"
            ) from None
        replace_module(model, name, kind.packed.place_for(before, inner, name=name))


def check_files(model: PreTrainedModel, files: Sequence[str | Path], config: DecoupleQConfig) -> None:
    """Raise ValueError where files lack a packed tensor that the config names, or hold one that it does not name.

    Loading would leave the former undefined, and draw the weight that the latter stands for anew. A model may have
    other names in files than in memory, as Mixtral has, whose mlp is block_sparse_moe there; `model` knows them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    named = {f"{name}.{tensor}" for name in config.matrices for tensor in PACKED_TENSORS}
    there: set[str] = set()
    for file in files:
        if Path(file).suffix != ".safetensors":
            raise ValueError(f"{file} is to hold packed weights, which are read from .safetensors files only")
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                there.add(name if name in named else apply_renamings(name, renamings))
    packed, folder = {name for name in there if name.rpartition(".")[2] in PACKED_TENSORS}, Path(files[0]).parent
    if missing := named - packed:
        way_out = "the files are not complete: copy or make them again"
        if any(name.endswith(".initial_scale_zero") for name in there):
            way_out = "it was saved while its scales were trained: fold the model (packed_model.fold) and save it again"
        raise ValueError(
            f"{folder} lacks {len(missing)} tensors that quantization_config needs, first {min(missing)}; {way_out}"
        )
    if unnamed := packed - named:
        raise ValueError(
            f"{folder} holds {len(unnamed)} packed tensors that quantization_config does not name, first "
            f"{min(unnamed)}; restore the config.json that was saved with them"
        )


def _of_experts(form: Mapping[str, Any]) -> bool:
    shape = form.get("shape")
    return isinstance(shape, (list, tuple)) and len(shape) == 3


def freeze_packed(model: torch.nn.Module) -> None:
    """Freeze the biases of packed modules, as they are when packed: loading makes parameters anew."""
    for module in packed_modules(model).values():
        module.requires_grad_(False)


def declare_packed(model: Any) -> None:
    """Write into a Hugging Face model's config what is packed, so that save_pretrained writes a folder that loads.

    ValueError where nothing is packed, or where scales are still being trained (packed_model.fold).
    """
    if tuned := tuned_modules(model):
        raise ValueError(f"{min(tuned)} is in its trainable form, which no folder holds; fold the model before saving")
    matrices = forms(model)
    if not matrices:
        raise ValueError(f"{type(model).__name__} has no packed module to declare; quantise some first")
    for module in model.modules():
        # A part that was loaded as a packed model of its own: names are those of the whole from here on.
        if hasattr(module, "config") and getattr(module.config, "quantization_config", None) is not None:
            del module.config.quantization_config
    head = model.get_output_embeddings()
    if any(head is module for module in packed_modules(model).values()):
        _untie(model)
    model.config.quantization_config = DecoupleQConfig(matrices=matrices)


def _untie(model: Any) -> None:
    """Say that the head has a weight of its own: loading would put the token embeddings into it."""
    for module in model.modules():
        if hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = {}
        if getattr(getattr(module, "config", None), "tie_word_embeddings", False):
            module.config.tie_word_embeddings = False


def register() -> None:
    """Make from_pretrained read packed folders; importing this module does. Doing it again changes nothing."""
    from transformers.quantizers import auto

    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(DecoupleQConfig)
        auto.register_quantizer(METHOD)(DecoupleQQuantizer)


register()
