"""The trainable form of packed experts: what quant/tuned.py is for a linear layer, with E in front of every tensor.

Parameters are cut along E once per forward pass, so that their gradients come back as one tensor each, in which an
expert that no token went to has zeros. A gradient of None would be a hang under ZeRO, where ranks whose batches hit
different experts have to reduce the same tensors.

Shape letters: E experts, N output channels, K input channels, G groups per row; n tokens, S pairs of a token and an
expert that it goes to.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..kernels.w2a16.op import packed_linear
from ..model.float32_buffers import Float32Buffers
from .expert_routing import Routing
from .packed_experts import PackedExperts, PackedMatrices, mixed
from .stored_grid import stored_scale_zero
from .tuned import tuned_scale_zero


class TunedMatrices(Float32Buffers):
    """PackedMatrices whose scales, centres and biases are float32 parameters."""

    codes: Tensor
    initial_scale_zero: Tensor

    def __init__(self, packed: PackedMatrices):
        super().__init__()
        self.layout, self.bias_dtype = packed.layout, None if packed.bias is None else packed.bias.dtype
        self.register_buffer("codes", packed.codes)
        self.register_buffer("initial_scale_zero", packed.scale_zero)
        shape, device = (len(packed.codes), self.layout.N, self.layout.G), packed.codes.device
        self.scale_ratio_ENG = nn.Parameter(torch.ones(shape, device=device))
        self.centre_shift_ENG = nn.Parameter(torch.zeros(shape, device=device))
        self.bias = None if packed.bias is None else nn.Parameter(packed.bias.detach().float().clone())

    def packed(self) -> PackedMatrices:
        """Return the packed matrices: the same codes, scales rounded to 16 bits; ValueError where those do not fit."""
        parts = zip(self.initial_scale_zero, self.scale_ratio_ENG.detach(), self.centre_shift_ENG.detach())
        tuned = [tuned_scale_zero(*part, bits=self.layout.bits) for part in parts]
        return PackedMatrices(
            self.layout,
            codes=self.codes,
            scale_zero=torch.stack([stored_scale_zero(part, self.initial_scale_zero.dtype) for part in tuned]),
            bias=None if self.bias is None else self.bias.detach().to(self.bias_dtype),
        ).train(self.training)

    def forward(self, x_SK: Tensor, routing: Routing) -> Tensor:
        """Return y_SN: each pair's row through the matrix of its expert."""
        bits, starts = self.layout.bits, self.initial_scale_zero
        ratios, shifts = self.scale_ratio_ENG.unbind(), self.centre_shift_ENG.unbind()
        biases = None if self.bias is None else self.bias.to(x_SK.dtype).unbind()
        made = []
        for expert, x_nK in zip(routing.experts, x_SK.split(routing.counts)):
            scale_zero_GN2 = tuned_scale_zero(starts[expert], ratios[expert], shifts[expert], bits=bits)
            bias_N = None if biases is None else biases[expert]
            y_nN = packed_linear(
                x_nK, self.codes[expert], scale_zero_GN2, bias_N, bits=bits, group_size=self.layout.group_size
            )
            made.append(y_nN)
        if not made:  # a rank without any token has to have gradients too
            return x_SK.new_zeros(0, self.layout.N) * sum(value.sum() for value in (x_SK, *self.parameters()))
        return torch.cat(made)

    def extra_repr(self) -> str:
        N, K, bits, group_size = self.layout
        return (
            f"experts={len(self.codes)}, in_features={K}, out_features={N}, bias={self.bias is not None}, "
            f"bits={bits}, group_size={group_size}"
        )


class TunedExperts(nn.Module):
    """Trainable PackedExperts. `of` makes one, which gives bit-identical outputs until it is trained."""

    def __init__(self, gate_up: TunedMatrices, down: TunedMatrices, *, activate: Callable[[Tensor], Tensor]):
        super().__init__()
        self.gate_up, self.down, self.activate = gate_up, down, activate

    @classmethod
    def of(cls, packed: PackedExperts) -> "TunedExperts":
        """Return the trainable form of packed experts."""
        gate_up, down = TunedMatrices(packed.gate_up), TunedMatrices(packed.down)
        return cls(gate_up, down, activate=packed.activate).train(packed.training)

    def packed(self) -> PackedExperts:
        """Return the packed experts: the same codes, scales rounded to 16 bits; ValueError where those do not fit."""
        made = PackedExperts(self.gate_up.packed(), self.down.packed(), activate=self.activate)
        return made.train(self.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, shaped as hidden_states [n, D] and of their type."""
        return mixed(
            hidden_states, top_k_index, top_k_weights, gate_up=self.gate_up, activate=self.activate, down=self.down
        )
