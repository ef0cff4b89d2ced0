"""Attention over rows of tokens that several ranks share: Ulysses within parts of the ranks, a ring across them.

USP (Fang & Zhao 2024, arXiv:2405.07719): of P ranks, each U exchange tokens for heads (Jacobs et al. 2023,
arXiv:2309.14509), and the keys and values of the P / U parts go round a ring (Liu et al. 2023, arXiv:2310.01889).

Letters: R rows that attend independently, n tokens of a row on this rank, m on another one, h heads, d channels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from stdit.parallel.sequence.collectives import all_to_all, ring_send
from stdit.parallel.sequence.group import Group
from stdit.parallel.sequence.layouts import even_sizes
from stdit.parallel.sequence.stages import ulysses_size

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of queries ``[R h n d]`` to keys and values ``[R h m d]``."""


def attend_over(
    group: Group, lengths: Sequence[int], attend: Attend, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Attend over rows ``[R h n d]`` of which each rank of a group has some tokens; every rank must call this.

    Args:
        lengths: tokens n of each rank.
        attend: computes attention where one rank has all tokens of its heads.
    """
    if group.size == 1:
        return attend(q, k, v)
    heads = even_sizes(q.shape[1], size := ulysses_size(group.size, q.shape[1]))
    part, place = group.rank // size, group.rank % size
    others = group.part(tuple(range(part * size, (part + 1) * size)))
    ring = group.part(tuple(range(place, group.size, size)))
    parts = [list(lengths[begin : begin + size]) for begin in range(0, group.size, size)]
    q, k, v = all_to_all(torch.stack([q, k, v]), others, 2, heads, 3, parts[part])
    if ring.size > 1:
        out = ring_attention(ring, [sum(each) for each in parts], q, k, v)
    else:
        out = attend(q, k, v)
    return all_to_all(out, others, 2, parts[part], 1, heads)


def ring_attention(group: Group, lengths: Sequence[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend over rows ``[R h n d]`` of which each rank has some tokens, by a ring; every rank must call this."""
    out: Tensor = _RingAttention.apply(group, lengths, q, k, v)  # type: ignore[no-untyped-call]
    return out


class _RingAttention(torch.autograd.Function):
    """Attention of this rank's queries to the keys and values of all ranks, one rank's at a time.

    Results are combined by their log-sum-exp in float32 or wider (arXiv:2310.01889, section 3); gradients are those
    of FlashAttention-2 (arXiv:2307.08691, algorithm 2), whose sums for the keys travel with them.
    """

    @staticmethod
    def forward(ctx: Any, group: Group, lengths: Sequence[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv = torch.stack([k, v])
        out, lse = wide(torch.zeros_like(q)), wide(q).new_full(q.shape[:-1], -torch.inf)
        for keys, values in _go_round(kv, group, lengths):
            if keys.shape[2] == 0 or q.shape[2] == 0:
                continue
            part, part_lse = attention_and_lse(q, keys, values)
            joined = torch.logaddexp(lse, part_lse)
            out = out * (lse - joined).exp()[..., None] + wide(part) * (part_lse - joined).exp()[..., None]
            lse = joined
        ctx.group, ctx.lengths = group, lengths
        out = out.to(q.dtype)
        ctx.save_for_backward(q, kv, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, kv, out, lse = ctx.saved_tensors
        group = ctx.group
        grad_q = torch.zeros_like(wide(q))
        arriving: Callable[[], Tensor] | None = None
        for step, part in enumerate(_go_round(kv, group, ctx.lengths)):
            grad_kv = torch.zeros_like(wide(part))
            if part.shape[3] and q.shape[2]:
                grads = attention_backward(grad, q, part[0], part[1], out, lse)
                grad_q += grads[0]
                grad_kv += torch.stack(grads[1:])
            if step == 0:
                own = grad_kv  # stays here until the others' sum has gone round
                continue
            if arriving is not None:
                grad_kv += arriving()
            arriving = ring_send(grad_kv, group, 3, ctx.lengths[(group.rank - step - 1) % group.size])
        if arriving is not None:
            own += arriving()
        return None, None, grad_q.to(q.dtype), *own.to(kv.dtype)


def _go_round(x: Tensor, group: Group, lengths: Sequence[int]) -> Iterator[Tensor]:
    """Yield this rank's ``x [2 R h n d]``, then those of the previous ranks; the next is in transit meanwhile."""
    for step in range(1, group.size):
        arriving = ring_send(x, group, 3, lengths[(group.rank - step) % group.size])
        yield x
        x = arriving()
    yield x


def attention_and_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention ``[R h n d]``, and the log-sum-exp of its scores ``[R h n]`` in float32 or wider."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, lse
    return plain_attention(q, k, v)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As `attention_and_lse`, by matrix products on any device, with a matrix of all scores."""
    with in_full_precision(q.device):
        scores = wide(q) * q.shape[-1] ** -0.5 @ wide(k).mT  # [R h n m]
        lse = scores.logsumexp(-1)
        return ((scores - lse[..., None]).exp() @ wide(v)).to(q.dtype), lse


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what some keys and values contribute to the gradients of q, k and v.

    Args:
        out: attention to all keys, ``[R h n d]``, and ``lse [R h n]`` that of all scores.
    """
    if q.device.type == "cpu":
        found: tuple[Tensor, Tensor, Tensor] = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, lse, 0.0, False
            )
        )
        return found
    return plain_attention_backward(grad, q, k, v, out, lse)


def plain_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attention_backward`, by matrix products on any device; the gradients are float32 or wider."""
    with in_full_precision(q.device):
        scaled, grad = wide(q) * q.shape[-1] ** -0.5, wide(grad)
        weights = (scaled @ wide(k).mT - lse[..., None]).exp()  # [R h n m]
        inner = (grad * wide(out)).sum(-1, keepdim=True)
        grad_scores = weights * (grad @ wide(v).mT - inner)
        return grad_scores @ wide(k) * q.shape[-1] ** -0.5, grad_scores.mT @ scaled, weights.mT @ grad


def in_full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Return a context without autocast, which would round sums over many tokens."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def wide(x: Tensor) -> Tensor:
    """Convert to float32, unless it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
