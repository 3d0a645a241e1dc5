"""Fused experts: where a model has them, and which way their weights lie.

transformers keeps the E experts of a layer as two three-dimensional weights, gate_up_proj (up_proj where experts have
no gate) and down_proj, in one module that is called with (hidden states, top-k index, top-k weights). Sixty
architectures share that form (transformers/integrations/moe.py); they differ in three things, which are read off the
module and not off its class:
- the orientation: [E, N, K] as in nn.Linear, or transposed, [E, K, N] (gpt_oss, aria). Two shapes that fit together
  one way do not fit the other way, as gate_up_proj has twice the channels that down_proj takes in;
- biases (gpt_oss), gate_up_proj_bias and down_proj_bias, [E, N];
- what happens between the projections, `_apply_gate`, also where gate and up are interleaved (gpt_oss).
What does not fit is refused by the name of its class: nothing is left in full precision in silence.

The two projections are called "gate_up" and "down" here and in what is saved.
Shape letters: E experts, N output channels, K input channels of one projection, n tokens.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

GATE_UP, DOWN = "gate_up", "down"
PROJECTIONS = (GATE_UP, DOWN)  # in the order in which tokens pass them


@dataclass(frozen=True)
class ExpertLayout:
    """How one module keeps its experts; it holds no weights, so modules on the meta device have one as well."""

    experts: int
    parameters: dict[str, str]  # projection -> name of its weight
    shapes: dict[str, tuple[int, int]]  # projection -> (N, K)
    transposed: bool

    def weight_NK(self, module: nn.Module, projection: str, expert: int) -> Tensor:
        """Return one expert's weight as nn.Linear would hold it, a view."""
        weight = getattr(module, self.parameters[projection])[expert].detach()
        return weight.T if self.transposed else weight

    def bias_EN(self, module: nn.Module, projection: str) -> Tensor | None:
        """Return the biases of all experts, or None where they have none."""
        bias_EN = getattr(module, f"{self.parameters[projection]}_bias", None)
        return None if bias_EN is None else bias_EN.detach()


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of `model` that keep experts in weights of their own, by name, in the model's order.

    These are all that have a three-dimensional down_proj, and all others whose class says that it is one of experts and
    that have weights: whether they can be quantised is for `expert_layout` to say.
    """
    return {name: module for name, module in model.named_modules() if _keeps_experts(module)}


def _keeps_experts(module: nn.Module) -> bool:
    weights = {name: value.dim() for name, value in module.named_parameters(recurse=False) if value.dim() > 1}
    return weights.get("down_proj") == 3 or (bool(weights) and "Expert" in type(module).__name__)


def expert_layout(module: nn.Module, *, name: str) -> ExpertLayout:
    """Return how `module`, called `name` in its model, keeps its experts.

    Raises ValueError, naming the class and what is in the way, where that is no form which can be quantised.
    """
    own = dict(module.named_parameters(recurse=False))
    gated = "gate_up_proj" in own
    parameters = {GATE_UP: "gate_up_proj" if gated else "up_proj", DOWN: "down_proj"}
    missing = [parameter for parameter in parameters.values() if parameter not in own or own[parameter].dim() != 3]
    if missing:
        raise _unreadable(module, name, f"it has no three-dimensional {missing[0]}")
    known = {*parameters.values(), *(f"{parameter}_bias" for parameter in parameters.values())}
    others = sorted({key for key, _ in module.named_parameters()} - known | {key for key, _ in module.named_buffers()})
    if others:
        raise _unreadable(module, name, f"its forward also uses {', '.join(others)}")
    if len(inspect.signature(module.forward).parameters) != 3:
        raise _unreadable(module, name, "its forward does not take (hidden states, top-k index, top-k weights)")
    if not callable(getattr(module, "_apply_gate" if gated else "act_fn", None)):
        raise _unreadable(module, name, "it does not say by _apply_gate what happens between its projections")
    first, second = (tuple(own[parameter].shape) for parameter in parameters.values())
    orientations = _orientations(first, second, halved=2 if gated else 1)
    # Experts without a gate may be square enough to fit both ways: then the module has to know.
    transposed = orientations[0] if len(orientations) == 1 else getattr(module, "is_transposed", None)
    if not orientations or transposed is None or first[0] != second[0]:
        raise _unreadable(module, name, f"the shapes {list(first)} and {list(second)} do not fit together")
    shapes = {
        projection: (shape[2], shape[1]) if transposed else (shape[1], shape[2])
        for projection, shape in zip(PROJECTIONS, (first, second))
    }
    return ExpertLayout(first[0], parameters, shapes, transposed)


def _orientations(first: tuple[int, ...], second: tuple[int, ...], *, halved: int) -> list[bool]:
    """Return for which `transposed` the second projection takes in what the first gives, and gives what that takes."""
    fitting = []
    for transposed in (False, True):
        (n1, k1), (n2, k2) = (shape[:0:-1] if transposed else shape[1:] for shape in (first, second))
        if n1 == halved * k2 and k1 == n2:
            fitting.append(transposed)
    return fitting


def _unreadable(module: nn.Module, name: str, why: str) -> ValueError:
    return ValueError(
        f"{name} is a {type(module).__name__}, experts that cannot be quantised: {why}; leave it out of the targets"
    )


def activation_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what the module does between its projections, gate_up_nN -> down's input_nK, without its weights.

    It is the module's own method on a bare copy: settings such as gpt_oss's limit come along, parameters and hooks do
    not, so that nothing of the full-precision module stays in memory.
    """
    if not hasattr(module, "gate_up_proj"):
        return cast(Callable[[Tensor], Tensor], module.act_fn)
    bare = type(module).__new__(type(module))
    nn.Module.__init__(bare)
    own = vars(bare).keys()
    vars(bare).update({key: value for key, value in vars(module).items() if key not in own})
    vars(bare)["_modules"] = dict(module._modules)
    return cast(Callable[[Tensor], Tensor], bare._apply_gate)


def routing_layers(model: nn.Module) -> set[str]:
    """Return the names of the linear layers beside fused experts that say how much of whom a token gets.

    Those have an output for every expert, or one (the gate of a shared expert). Most routers are no linear layer but a
    module of their own; all of them stay in full precision: they are E x K weights, and a token that is sent elsewhere
    costs more than those would save.
    """
    found = set()
    for name, experts in fused_experts(model).items():
        outputs = {1, *(len(weight) for weight in experts.parameters(recurse=False) if weight.dim() == 3)}
        owner = name.rpartition(".")[0]
        beside = model.get_submodule(owner).named_modules(prefix=owner)
        found |= {other for other, module in beside if isinstance(module, nn.Linear) and module.out_features in outputs}
    return found
