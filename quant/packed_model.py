"""A model with packed layers in it: find them, put them in, make them trainable, fold them back, and vouch for codes.

A kind of packed module is a class, its trainable form, and what it says about its matrices (`PackedModule`); KINDS
lists them, and everything here and in quant/hf.py goes through that list.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import nn

from .linear import PackedLinear
from .packed_experts import PackedExperts
from .storage import Storage, storage_of
from .tuned import TunedLinear
from .tuned_experts import TunedExperts


class Kind(NamedTuple):
    """A packed class and its trainable form, which has `of(packed)` and `packed()`."""

    packed: type[nn.Module]
    tuned: type[nn.Module]


KINDS: dict[str, Kind] = {
    "linear": Kind(PackedLinear, TunedLinear),
    "experts": Kind(PackedExperts, TunedExperts),
}


class PackedModule(Protocol):
    """What files need to know about a packed module."""

    def matrices(self) -> dict[str, dict[str, Any]]:
        """Return the form of each packed matrix by its name below the module ("" is the module itself).

        A form is {"bits", "group_size", "scale_dtype", "shape"}, as JSON has it; shape is [N, K], or [E, N, K].
        """
        ...

    @classmethod
    def place_for(cls, module: nn.Module, forms: Mapping[str, Mapping[str, Any]], *, name: str) -> "PackedModule":
        """Return the packed module, with undefined values, that takes the place of `module`, `name` in its model."""
        ...


def packed_modules(model: nn.Module) -> dict[str, Any]:
    """Return the packed modules by name, in the model's order."""
    classes = tuple(kind.packed for kind in KINDS.values())
    return {name: module for name, module in model.named_modules() if isinstance(module, classes)}


def tuned_modules(model: nn.Module) -> dict[str, Any]:
    """Return the trainable forms of packed modules by name, in the model's order."""
    classes = tuple(kind.tuned for kind in KINDS.values())
    return {name: module for name, module in model.named_modules() if isinstance(module, classes)}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is in the model, in the same mode. ValueError where there is no such module."""
    parent, _, leaf = name.rpartition(".")
    try:
        owner, before = model.get_submodule(parent), model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no module {name!r} to replace") from None
    if before is model:
        raise ValueError("the model itself cannot be replaced; name one of its modules")
    setattr(owner, leaf, module.train(before.training))


def tune(model: nn.Module) -> None:
    """Make every packed module below `model` trainable, in place. Until it is folded, `save_pretrained` is refused."""
    for kind in KINDS.values():
        for name, module in packed_modules(model).items():
            if isinstance(module, kind.packed):
                replace_module(model, name, kind.tuned.of(module))  # type: ignore[attr-defined]
    for part in model.modules():
        if hasattr(part, "save_pretrained") and tuned_modules(part):
            part.save_pretrained = _refuse_to_save  # type: ignore[assignment]


def fold(model: nn.Module) -> None:
    """Make every trainable form packed again, in place. ValueError names the module whose scales do not fit 16 bits."""
    for name, module in tuned_modules(model).items():
        try:
            replace_module(model, name, module.packed())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for part in model.modules():
        part.__dict__.pop("save_pretrained", None)


def _refuse_to_save(*_: Any, **__: Any) -> None:
    """Take the place of `save_pretrained`: no folder holds trainable forms."""
    raise ValueError("scales of this model are being trained, which no folder holds; fold the model before saving it")


def codes_hash(model: nn.Module) -> str:
    """Return a hash of all codes with their names, the same for packed and trainable forms."""
    digest = hashlib.blake2b(digest_size=16)
    for module_name, module in sorted({**packed_modules(model), **tuned_modules(model)}.items()):
        for name, buffer in sorted(module.named_buffers()):
            if name.rpartition(".")[2] == "codes":
                digest.update(f"{module_name}.{name} {list(buffer.shape)}\n".encode())
                digest.update(buffer.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def forms(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the form of every packed matrix below `model` by its name, as config.json has it."""
    return {
        ".".join(filter(None, (name, inner))): form
        for name, module in packed_modules(model).items()
        for inner, form in module.matrices().items()
    }


def model_storage(model: nn.Module) -> Storage:
    """Return how many bits the model's weights take, by packed matrix and overall; what is shared counts once."""
    seen, sizes = set(), {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            sizes[name] = tensor.nbytes
    return storage_of(forms(model), sizes)
