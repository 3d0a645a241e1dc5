"""How far a layer's output is from that of its full-precision weight, on the inputs that it is calibrated on.

Shape letters: N output channels, K input channels; H = X^T X / n.
"""

import torch
from torch import Tensor


def error_terms(quantised_NK: Tensor, weight_NK: Tensor, H_KK: Tensor) -> tuple[float, float]:
    """Return |(w~ - w) X|^2 / n and |w X|^2 / n."""
    weight_NK, H_KK = weight_NK.detach().float(), H_KK.float()
    difference_NK = quantised_NK.float().to(weight_NK.device) - weight_NK
    lost, whole = ((rows_NK @ H_KK * rows_NK).sum(dtype=torch.float64) for rows_NK in (difference_NK, weight_NK))
    return float(lost), float(whole)


def relative_error(quantised_NK: Tensor, weight_NK: Tensor, H_KK: Tensor) -> float:
    """Return |(w~ - w) X|^2 / |w X|^2; 0 where the layer gives nothing at all."""
    lost, whole = error_terms(quantised_NK, weight_NK, H_KK)
    return lost / whole if whole > 0 else 0.0
