"""A layer's experts as packed codes: what takes the place of a fused experts module (quant/expert_layout.py).

Each projection holds the matrices of all E experts in two tensors, codes and scale_zero, which are those of
quant/linear.py with E in front. Only the experts that a token goes to are dequantised, one at a time, so that the peak
is one expert's weight however many there are. The result does not depend on the experts implementation that the
model's config chooses, and each token's sum over its experts is taken in their order of choice, not in that in which
a GPU's atomics arrive.

Shape letters: E experts, N output channels, K input channels, G groups per row; n tokens, k experts per token, S pairs
of a token and an expert that it goes to, D width of the model.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.w2a16.layout import Layout
from ..kernels.w2a16.op import packed_linear
from ..kernels.w2a16.reference import dequantise
from ..model.float32_buffers import Float32Buffers
from .expert_layout import DOWN, GATE_UP, PROJECTIONS, activation_of, expert_layout
from .expert_routing import Routing, route
from .linear import PackedLinear, as_computed, form_of, layout_of
from .solution import LayerSolution
from .stored_grid import SCALE_DTYPES, check_scale_dtype


class PackedMatrices(Float32Buffers):
    """E matrices of one layout. `bias` is a frozen [E, N], or None."""

    codes: Tensor
    scale_zero: Tensor
    bias: nn.Parameter | None

    def __init__(self, layout: Layout, *, codes: Tensor, scale_zero: Tensor, bias: Tensor | None):
        super().__init__()
        self.layout = layout
        check_scale_dtype(scale_zero.dtype)
        assert len(codes) == len(scale_zero), "codes and scales are of different numbers of experts"
        layout.check(codes[0], scale_zero[0])
        self.register_buffer("codes", codes)
        self.register_buffer("scale_zero", scale_zero)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), False))

    @classmethod
    def from_solutions(
        cls, solutions: Sequence[LayerSolution], *, bias: Tensor | None, scale_dtype: torch.dtype = torch.bfloat16
    ) -> "PackedMatrices":
        """Pack the solutions of experts 0 .. E - 1; ValueError where they differ in bits or group size."""
        forms = {(solution.bits, solution.group_size) for solution in solutions}
        if len(forms) != 1:
            raise ValueError(
                f"experts of one projection have {sorted(forms)} as (bits, group size); they are one tensor and need "
                "the same: give one rule for all of them"
            )
        packed = [PackedLinear.from_solution(solution, bias=None, scale_dtype=scale_dtype) for solution in solutions]
        return cls(
            packed[0].layout,
            codes=torch.stack([matrix.codes for matrix in packed]),
            scale_zero=torch.stack([matrix.scale_zero for matrix in packed]),
            bias=bias,
        )

    @classmethod
    def empty(
        cls, layout: Layout, *, experts: int, scale_dtype: torch.dtype, bias: Tensor | None, device=None
    ) -> "PackedMatrices":
        """Return one with undefined values of this form, into which a file's are loaded."""
        return cls(
            layout,
            codes=torch.empty(experts, layout.rows, layout.N, dtype=torch.uint8, device=device),
            scale_zero=torch.empty(experts, layout.G, layout.N, 2, dtype=scale_dtype, device=device),
            bias=bias,
        )

    @property
    def bits(self) -> int:
        return self.layout.bits

    @property
    def group_size(self) -> int:
        return self.layout.group_size

    @property
    def weights(self) -> int:
        """E * N * K, the number of weights that are stood for."""
        return len(self.codes) * self.layout.N * self.layout.K

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of codes, padding included, scales and zeros, per weight; the bias is not counted."""
        return 8 * (self.codes.nbytes + self.scale_zero.nbytes) / self.weights

    def dequantised_NK(self, expert: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return one expert's scale * code + zero, computed in float32 and rounded to `dtype`."""
        return dequantise(self.codes[expert], self.scale_zero[expert], self.layout, dtype)

    def one(self, x_nK: Tensor, expert: int) -> Tensor:
        """Return y_nN of one expert."""
        bias_N = None if self.bias is None else self.bias[expert].to(x_nK.dtype)
        codes, scale_zero = self.codes[expert], self.scale_zero[expert]
        return packed_linear(x_nK, codes, scale_zero, bias_N, bits=self.bits, group_size=self.group_size)

    def forward(self, x_SK: Tensor, routing: Routing) -> Tensor:
        """Return y_SN: each pair's row through the matrix of its expert."""
        if not routing.experts:
            return x_SK.new_zeros(0, self.layout.N)
        parts = zip(routing.experts, x_SK.split(routing.counts))
        return torch.cat([self.one(x_nK, expert) for expert, x_nK in parts])

    def extra_repr(self) -> str:
        N, K, bits, group_size = self.layout
        return (
            f"experts={len(self.codes)}, in_features={K}, out_features={N}, bias={self.bias is not None}, "
            f"bits={bits}, group_size={group_size}, scale_dtype={str(self.scale_zero.dtype).removeprefix('torch.')}"
        )


class PackedExperts(nn.Module):
    """Stands for a fused experts module. `from_solutions` makes one; `place_for` makes room for what a file holds."""

    def __init__(self, gate_up: PackedMatrices, down: PackedMatrices, *, activate: Callable[[Tensor], Tensor]):
        super().__init__()
        # Not gate_up_proj and down_proj: by those names transformers cuts tensors into one file entry per expert.
        self.gate_up, self.down, self.activate = gate_up, down, activate

    @classmethod
    def from_solutions(
        cls,
        module: nn.Module,
        solutions: Mapping[str, Sequence[LayerSolution]],
        *,
        name: str = "experts",
        scale_dtype: torch.dtype = torch.bfloat16,
    ) -> "PackedExperts":
        """Pack the solutions of "gate_up" and of "down", one per expert, in place of `module`'s weights.

        Its biases and what it does between the projections are kept; `name` is what an error calls it.
        """
        layout, made = expert_layout(module, name=name), {}
        for projection in PROJECTIONS:
            found = [tuple(solution.codes_NK.shape) for solution in solutions[projection]]
            if found != [layout.shapes[projection]] * layout.experts:
                raise ValueError(
                    f"{name}.{projection} has {len(found)} solutions of the shapes {sorted(set(found))}; "
                    f"{layout.experts} of {layout.shapes[projection]} are needed"
                )
            made[projection] = PackedMatrices.from_solutions(
                solutions[projection], bias=layout.bias_EN(module, projection), scale_dtype=scale_dtype
            )
        return cls.in_place_of(module, made)

    @classmethod
    def in_place_of(cls, module: nn.Module, matrices: Mapping[str, PackedMatrices]) -> "PackedExperts":
        """Join the matrices of "gate_up" and "down" by what `module` does between them."""
        return cls(matrices[GATE_UP], matrices[DOWN], activate=activation_of(module))

    def matrices(self) -> dict[str, dict[str, Any]]:
        """Return what config.json says about both projections; see packed_model.PackedModule."""
        return {
            projection: form_of(matrices.layout, scale_zero=matrices.scale_zero)
            for projection, matrices in ((GATE_UP, self.gate_up), (DOWN, self.down))
        }

    @classmethod
    def place_for(cls, module: nn.Module, forms: Mapping[str, Mapping[str, Any]], *, name: str) -> "PackedExperts":
        """Return a place for a file's values that stands for `module`; ValueError where that has other experts."""
        layout = expert_layout(module, name=name)
        there = {projection: [layout.experts, *layout.shapes[projection]] for projection in PROJECTIONS}
        packed = {projection: list(form["shape"]) for projection, form in forms.items()}
        if packed != there:
            raise ValueError(
                f"{name} is packed as experts {packed}, and the model has {type(module).__name__} {there} there; "
                "config.json does not belong to these weights"
            )
        made = {}
        for projection, form in forms.items():
            made[projection] = PackedMatrices.empty(
                layout_of(form, name=f"{name}.{projection}"),
                experts=layout.experts,
                scale_dtype=SCALE_DTYPES[form["scale_dtype"]],
                bias=layout.bias_EN(module, projection),
                device=getattr(module, layout.parameters[projection]).device,
            )
        return cls.in_place_of(module, made)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, shaped as hidden_states [n, D] and of their type."""
        return mixed(
            hidden_states, top_k_index, top_k_weights, gate_up=self.gate_up, activate=self.activate, down=self.down
        )


def mixed(
    hidden_nD: Tensor,
    index_nk: Tensor,
    weights_nk: Tensor,
    *,
    gate_up: nn.Module,
    activate: Callable[[Tensor], Tensor],
    down: nn.Module,
) -> Tensor:
    """Return the weighted sum of each token's experts; the projections are called with (x_SK, routing)."""
    n, k = index_nk.shape
    routing = route(index_nk, experts=len(gate_up.codes))  # type: ignore[arg-type]
    # Through [n, k, D], which costs no memory: gradients of a token are then summed in order as well.
    x_SD = as_computed(hidden_nD)[:, None].expand(n, k, -1)[routing.tokens_S, routing.slots_S]
    y_SD = down(activate(gate_up(x_SD, routing)), routing)
    y_SD = y_SD * weights_nk[routing.tokens_S, routing.slots_S, None]
    out_nkD = y_SD.new_zeros(n, k, y_SD.shape[1]).index_put((routing.tokens_S, routing.slots_S), y_SD)
    return out_nkD.sum(1).to(hidden_nD.dtype)
