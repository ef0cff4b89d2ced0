"""The all-to-all that moves a shard from one axis to another, with its adjoint.

It calls the functional collectives, which torch.compile traces. Whether they may be differentiated is not settled
in PyTorch's public interface, so the derivative is written here.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor

from stdit.parallel.group import Group, nbytes


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


def _exchange(
    x: Tensor, group: Group, whole: int, whole_sizes: list[int], shard: int, shard_sizes: list[int]
) -> Tensor:
    sent = x.split(whole_sizes, dim=whole)
    shapes = [list(sent[group.rank].shape) for _ in shard_sizes]
    for shape, size in zip(shapes, shard_sizes, strict=True):
        shape[shard] = size
    flat = torch.cat([part.flatten() for part in sent])
    in_sizes, out_sizes = [part.numel() for part in sent], [prod(shape) for shape in shapes]
    if not torch.compiler.is_compiling():
        group.traffic.add("all_to_all", nbytes(flat) - nbytes(sent[group.rank]))
    received = wait_tensor(all_to_all_single(flat, out_sizes, in_sizes, group.name))  # type: ignore[arg-type]
    parts = received.split(out_sizes)
    return torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], dim=shard)
