"""Attention within chunks of consecutive frames: time and memory grow with the length, not with its square.

A frame of chunk n sees the frames of chunks n - left .. n. With left = 0 nothing ever crosses an edge, however many
layers there are; a window that slides with the frame reaches further in every layer, and so hears at five minutes what
it never heard in training (USM, https://arxiv.org/abs/2303.01037, lost words to that, and chunks of 8 s mended it).

The chunks become a batch, so that no T x T mask or score is ever made. Shape letters: B utterances, T frames, H heads,
K head width, C frames in a chunk, N chunks, S = (left + 1) C frames that a chunk sees.
"""

from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


def chunked_attention(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, valid_BT: Tensor, *, chunk: int, left: int
) -> Tensor:
    """Return context_BTHK. Only valid frames are seen; what a chunk of padding alone gives is finite and no more."""
    T = valid_BT.shape[1]
    before, after = left * chunk, -T % chunk
    seen_BNS = pad(valid_BT, (before, after)).unfold(1, before + chunk, chunk)
    # A chunk without a valid frame sees all of it: the softmax of nothing would be NaN.
    seen_BNS = seen_BNS | ~seen_BNS.any(-1, keepdim=True)
    context_NHCK = scaled_dot_product_attention(
        _chunks(q_BTHK, size=chunk, step=chunk, before=0, after=after),
        _chunks(k_BTHK, size=before + chunk, step=chunk, before=before, after=after),
        _chunks(v_BTHK, size=before + chunk, step=chunk, before=before, after=after),
        attn_mask=seen_BNS.flatten(0, 1)[:, None, None],
    )
    context_BTHK = context_NHCK.transpose(1, 2).reshape(len(valid_BT), T + after, *q_BTHK.shape[2:])
    return context_BTHK[:, :T]


def _chunks(x_BTHK: Tensor, *, size: int, step: int, before: int, after: int) -> Tensor:
    """Return [B * N, H, size, K]: every chunk's frames, with zeros before the first frame and after the last."""
    x_BNHKS = pad(x_BTHK, (0, 0, 0, 0, before, after)).unfold(1, size, step)
    return x_BNHKS.transpose(-1, -2).flatten(0, 1)
