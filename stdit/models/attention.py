"""Self-attention within rows of tokens, and cross-attention to the caption.

Letters: R rows that attend independently, N queries and L keys of a row, h heads, d channels of a head, D = h d, B
batch.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from stdit.models.embeddings import rotate

FEW_SCORES = 128 * 128
"""Up to this many pairs of a query and a key, PyTorch's flash kernel for CPUs is slower than batched matrix products
(``scripts/bench/step.py --sizes quickstart shapes64``)."""


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, equation 1).

    Args:
        q: queries ``[R h N d]``.
        k: keys ``[R h L d]``; likewise the values ``v``.
        visible: true for the keys that a row attends to, ``[R 1 1 L]``; None: all. A row with none of them gets
        zeros.

    Returns:
        ``[R h N d]``.
    """
    if visible is not None:
        empty = ~visible.any(-1, keepdim=True)  # [R 1 1 1]
        visible, v = visible | empty, v.masked_fill(empty, 0)  # without this, a mean over padding or NaN
    few = q.shape[-2] * k.shape[-2] <= FEW_SCORES
    if q.device.type != "cpu" or q.dtype != torch.float32 or not few:
        return scaled_dot_product_attention(q, k, v, visible)
    scores: Tensor = q * q.shape[-1] ** -0.5 @ k.mT  # [R h N L]
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


class HeadNorm(nn.RMSNorm):
    """RMS norm over the channels of each head, in the precision of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SelfAttention(nn.Module):
    """Attention among the N tokens of each row of ``x [R N D]``, with optional QK norm and rotary positions."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = HeadNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.attend = attention  # scripts/bench/baselines.py replaces it

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "R N (three h d) -> three R h N d", three=3, h=self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        out: Tensor = self.proj(rearrange(self.attend(q, k, v), "R h N d -> R N (h d)"))
        return out


class CrossAttention(nn.Module):
    """Tokens ``x [B N D]`` attend to the caption ``y [B L D]``; ``mask [B L]`` is true for text tokens."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        q = rearrange(self.q_linear(x), "B N (h d) -> B h N d", h=self.num_heads)
        k, v = rearrange(self.kv_linear(y), "B L (two h d) -> two B h L d", two=2, h=self.num_heads)
        visible = None if mask is None else mask[:, None, None, :]  # [B 1 1 L]
        out: Tensor = self.proj(rearrange(attention(q, k, v, visible), "B h N d -> B N (h d)"))
        return out
