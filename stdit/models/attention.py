"""Self-attention within rows of tokens, and cross-attention to the caption.

Letters: R rows that attend independently, N queries and L keys of a row, h heads, d channels of a head, D = h d, B
batch.
"""

from functools import partial
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from stdit.models.embeddings import rotate
from stdit.parallel.sequence.sharding import TokenShard
from stdit.parallel.sequence.usp import in_full_precision

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
        visible, v = see_nothing_safely(visible, v)
    # A graph for all numbers of tokens has no branch on them.
    few = not torch.compiler.is_compiling() and q.shape[-2] * k.shape[-2] <= FEW_SCORES
    if q.device.type != "cpu" or q.dtype != torch.float32 or not few:
        return scaled_dot_product_attention(q, k, v, visible)
    scores: Tensor = q * q.shape[-1] ** -0.5 @ k.mT  # [R h N L]
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


def see_nothing_safely(visible: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return mask and values with which a row that sees no key gets zeros, not a mean over padding or NaN."""
    empty = ~visible.any(-1, keepdim=True)  # [R 1 1 1]
    return visible | empty, v.masked_fill(empty, 0)


class HeadNorm(nn.RMSNorm):
    """RMS norm over the channels of each head, in the precision of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class _Processor:
    """What computes a layer's attention, as diffusers wants it: `set_attention_backend` sets the backend of it.

    Without a backend the layer's own ``attend`` computes it.
    """

    def __init__(self) -> None:
        self._attention_backend: AttentionBackendName | None = None
        self._parallel_config = None  # diffusers looks for it

    def attend(self, attn: Any, q: Tensor, k: Tensor, v: Tensor, *visible: Tensor | None) -> Tensor:
        """As `attention`, by the backend that is set for this layer, or by `diffusers.attention_backend` for all.

        Captions have masks, which some backends refuse: the layer computes that itself.
        """
        backend = self._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        mask = visible[0] if visible else None
        is_unset = self._attention_backend is None and backend == AttentionBackendName.NATIVE
        if is_unset or (mask is not None and not _takes_masks(backend)):
            own: Tensor = attn.attend(q, k, v, *visible)
            return own
        if mask is not None:
            mask, v = see_nothing_safely(mask, v)
        rows = (tensor.transpose(1, 2) for tensor in (q, k, v))  # [R N h d]
        out: Tensor = dispatch_attention_fn(*rows, attn_mask=mask, backend=backend)
        return out.transpose(1, 2)


def _takes_masks(backend: str) -> bool:
    """Return whether a backend of diffusers takes masks: of these families, only the kernels for varying lengths."""
    name = str(AttentionBackendName(backend).value)
    return "varlen" in name or not any(family in name for family in ("flash", "sage", "aiter", "xla"))


class SelfAttentionProcessor(_Processor):
    """Attention among the tokens of each row."""

    def __call__(
        self, attn: "SelfAttention", x: Tensor, angles: Tensor | None = None, shard: TokenShard | None = None
    ) -> Tensor:
        q, k, v = rearrange(attn.qkv(x), "R N (three h d) -> three R h N d", three=3, h=attn.num_heads)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        attend = partial(self.attend, attn)
        attended = attend(q, k, v) if shard is None else shard.attend(attend, q, k, v)
        out: Tensor = attn.proj(rearrange(attended, "R h N d -> R N (h d)"))
        return out


class CrossAttentionProcessor(_Processor):
    """Attention of tokens to the caption."""

    def __call__(self, attn: "CrossAttention", x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        q = rearrange(attn.q_linear(x), "B N (h d) -> B h N d", h=attn.num_heads)
        k, v = rearrange(attn.kv_linear(y), "B L (two h d) -> two B h L d", two=2, h=attn.num_heads)
        visible = None if mask is None else mask[:, None, None, :]  # [B 1 1 L]
        out: Tensor = attn.proj(rearrange(self.attend(attn, q, k, v, visible), "B h N d -> B N (h d)"))
        return out


class SelfAttention(nn.Module, AttentionModuleMixin):  # type: ignore[misc]  # diffusers has no types
    """Attention among the N tokens of each row of ``x [R N D]``, with optional QK norm and rotary positions.

    With ``shard``, other ranks have the rest of each row.
    """

    is_cross_attention = False
    _supports_qkv_fusion = False  # they are one matrix anyway
    _default_processor_cls = SelfAttentionProcessor
    _available_processors = [SelfAttentionProcessor]

    def __init__(self, dim: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = HeadNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.attend = attention  # scripts/bench/baselines.py replaces it
        self.processor = SelfAttentionProcessor()

    def forward(self, x: Tensor, angles: Tensor | None = None, shard: TokenShard | None = None) -> Tensor:
        out: Tensor = self.processor(self, x, angles, shard)
        return out


class LinearAttention(nn.Module):
    """Attention whose weights are products of features, in a time that grows with the number of tokens.

    The features are the positive parts of queries and keys, which rotary positions turn in the numerator alone
    (SANA-Video, Chen et al. 2025, arXiv:2509.24695, section 3.2). Of keys and values only a state of
    ``d (d + 1)`` numbers a head is needed, so that of tokens on several ranks only these travel (LASP-2, Sun et al.
    2025, arXiv:2502.07563). The denominator is the sum of weights plus 1, so that a token without any feature gets
    zeros.

    Args:
        causal: a token sees no later frames. A sampler that makes frame after frame has to keep only the sum of the
            states of those before.
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = HeadNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, angles: Tensor, shard: TokenShard | None = None) -> Tensor:
        """Attend among the tokens ``[B T S D]``, and those of other ranks.

        Args:
            angles: of rotary positions, ``[T S d/2]``.
        """
        heads = rearrange(self.qkv(x), "B T S (three h d) -> three B h T S d", three=3, h=self.num_heads)
        q, k, v = heads
        q, k = self.q_norm(q).relu(), self.k_norm(k).relu()
        with in_full_precision(x.device):
            q, k, v = (each.to(torch.promote_types(x.dtype, torch.float32)) for each in (q, k, v))
            out = self._attend(q, k, v, angles, shard)
        projected: Tensor = self.proj(rearrange(out.to(x.dtype), "B h T S d -> B T S (h d)"))
        return projected

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, angles: Tensor, shard: TokenShard | None) -> Tensor:
        products = torch.einsum("bhtsd,bhtse->tbhde", rotate(k, angles), v)
        states = torch.cat([products, rearrange(k.sum(3), "b h t d -> t b h d 1")], -1)  # of each frame
        if shard is not None:
            states = shard.sum_states(states, self.causal)
        else:
            states = states.cumsum(0) if self.causal else states.sum(0, keepdim=True)
        products, keys = states.split([v.shape[-1], 1], -1)  # [T or 1, B h d d], [T or 1, B h d 1]
        attended = rotate(q, angles) @ rearrange(products, "t b h d e -> b h t d e")
        result: Tensor = attended / (q @ rearrange(keys, "t b h d one -> b h t d one") + 1)
        return result


class CrossAttention(nn.Module, AttentionModuleMixin):  # type: ignore[misc]  # diffusers has no types
    """Tokens ``x [B N D]`` attend to the caption ``y [B L D]``; ``mask [B L]`` is true for text tokens."""

    is_cross_attention = True
    _supports_qkv_fusion = False
    _default_processor_cls = CrossAttentionProcessor
    _available_processors = [CrossAttentionProcessor]

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attend = attention
        self.processor = CrossAttentionProcessor()

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = self.processor(self, x, y, mask)
        return out
