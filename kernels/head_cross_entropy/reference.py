"""Cross-entropy of a vocabulary head as an equation: nll_n = logsumexp_v(z_nv) - z_nt, z_nv = h_n . w_v + b_v, t = t_n.

Shape letters: N tokens, L width of a hidden state, V vocabulary.
"""

import torch
from torch import Tensor, nn


def reference(
    hidden_NL: Tensor, weight_VL: Tensor, targets_N: Tensor, *, bias_V: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Return nll_N, at least float32, and correct_N: whether the target has the highest logit."""
    logits_NV = nn.functional.linear(hidden_NL, weight_VL, bias_V)
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    nll_N = nn.functional.cross_entropy(logits_NV.to(wide), targets_N, ignore_index=ignore_index, reduction="none")
    return nll_N, logits_NV.detach().argmax(-1) == targets_N
