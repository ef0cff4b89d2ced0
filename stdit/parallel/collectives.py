"""The exchanges between the ranks of a group, with their adjoints.

It calls the functional collectives, which torch.compile traces. Whether they may be differentiated is not settled
in PyTorch's public interface, so the derivative is written here.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor

from stdit.parallel.group import Group


def reshard(
    x: Tensor, group: Group, whole: int, whole_sizes: list[int], shard: int, shard_sizes: list[int]
) -> Tensor:
    """Exchange parts so that axis ``whole`` becomes sharded, and axis ``shard`` whole.

    Args:
        x: this rank's part; all of axis ``whole`` and a part of axis ``shard``.
        whole_sizes: how much of axis ``whole`` each rank gets.
        shard_sizes: how much of axis ``shard`` each rank has.
    """
    if group.size == 1:
        return x
    return _Reshard.apply(x, group, whole, whole_sizes, shard, shard_sizes)


class _Reshard(torch.autograd.Function):
    """Its adjoint is the same exchange the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, *axes: Any) -> Tensor:
        ctx.group, ctx.axes = group, axes
        return _exchange(x, group, *axes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        whole, whole_sizes, shard, shard_sizes = ctx.axes
        back = _exchange(grad, ctx.group, shard, shard_sizes, whole, whole_sizes)
        return back, None, None, None, None, None


def gather(x: Tensor, group: Group, dim: int, sizes: list[int]) -> Tensor:
    """Give every rank the whole of an axis of which rank r has ``sizes[r]``."""
    if group.size == 1:
        return x
    return _Gather.apply(x, group, dim, sizes)


class _Gather(torch.autograd.Function):
    """Its adjoint adds up what all ranks say of this rank's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, sizes: list[int]) -> Tensor:
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes
        shapes = [[*x.shape[:dim], size, *x.shape[dim + 1 :]] for size in sizes]
        return torch.cat(_swap([x] * group.size, shapes, group), dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        parts = grad.split(ctx.sizes, ctx.dim)
        mine = list(parts[ctx.group.rank].shape)
        return sum(_swap(parts, [mine] * ctx.group.size, ctx.group)), None, None, None  # type: ignore[return-value]


def _exchange(
    x: Tensor, group: Group, whole: int, whole_sizes: list[int], shard: int, shard_sizes: list[int]
) -> Tensor:
    sent = x.split(whole_sizes, dim=whole)
    shapes = [list(sent[group.rank].shape) for _ in shard_sizes]
    for shape, size in zip(shapes, shard_sizes, strict=True):
        shape[shard] = size
    return torch.cat(_swap(sent, shapes, group), dim=shard)


def _swap(sent: Sequence[Tensor], shapes: list[list[int]], group: Group) -> list[Tensor]:
    """Send each rank its tensor, and receive one of the given shape from each."""
    flat = torch.cat([part.flatten() for part in sent])
    in_sizes, out_sizes = [part.numel() for part in sent], [prod(shape) for shape in shapes]
    if not torch.compiler.is_compiling():
        group.traffic.add("all_to_all", flat.nbytes - sent[group.rank].nbytes)
    received = wait_tensor(all_to_all_single(flat, out_sizes, in_sizes, group.name))  # type: ignore[arg-type]
    return [part.view(shape) for part, shape in zip(received.split(out_sizes), shapes, strict=True)]
