"""The exchanges between the ranks of a group, with their adjoints.

It calls the functional collectives, which torch.compile traces. Whether they may be differentiated is not settled
in PyTorch's public interface, so the derivative is written here.
"""

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor

from stdit.parallel.sequence.group import Group


def all_to_all(
    x: Tensor,
    group: Group,
    scatter_dim: int,
    scatter_sizes: list[int],
    gather_dim: int,
    gather_sizes: list[int],
) -> Tensor:
    """Exchange parts so that axis ``scatter_dim`` becomes sharded, and axis ``gather_dim`` whole.

    Args:
        x: this rank's part; all of axis ``scatter_dim`` and a part of axis ``gather_dim``.
        scatter_sizes: how much of axis ``scatter_dim`` each rank gets.
        gather_sizes: how much of axis ``gather_dim`` each rank has.
    """
    if group.size == 1:
        return x
    return _AllToAll.apply(x, group, scatter_dim, scatter_sizes, gather_dim, gather_sizes)


class _AllToAll(torch.autograd.Function):
    """Its adjoint is the same exchange the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, *axes: Any) -> Tensor:
        ctx.group, ctx.axes = group, axes
        return _exchange(x, group, *axes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scatter_dim, scatter_sizes, gather_dim, gather_sizes = ctx.axes
        back = _exchange(grad, ctx.group, gather_dim, gather_sizes, scatter_dim, scatter_sizes)
        return back, None, None, None, None, None


def all_to_all_pipelined(
    pieces: Iterable[Tensor],
    group: Group,
    scatter_dim: int,
    scatter_sizes: list[int],
    gather_dim: int,
    gather_sizes: list[list[int]],
) -> Tensor:
    """As `all_to_all`, for a part in pieces along axis ``gather_dim``: each travels while the next is made.

    Backward sends all pieces of the gradient at once, and the work on each begins when it is there.

    Args:
        pieces: made one after the other; the same number on all ranks.
        gather_sizes: how much of axis ``gather_dim`` each rank has in each of its pieces.
    """
    travel = _PipelinedAllToAll(group, scatter_dim, scatter_sizes, gather_dim, gather_sizes)
    tokens = [_Send.apply(piece, travel, index) for index, piece in enumerate(pieces)]
    return _Join.apply(travel, *tokens)


class _PipelinedAllToAll:
    """Pieces on their way. Autograd sees a token for each piece, and the data pass through here."""

    def __init__(
        self,
        group: Group,
        scatter_dim: int,
        scatter_sizes: list[int],
        gather_dim: int,
        gather_sizes: list[list[int]],
    ) -> None:
        self.group, self.scatter_dim, self.scatter_sizes = group, scatter_dim, scatter_sizes
        self.gather_dim, self.gather_sizes = gather_dim, gather_sizes
        self.arriving: dict[int, AsyncAllToAll] = {}
        self.returning: dict[int, AsyncAllToAll] = {}

    def send(self, index: int, piece: Tensor) -> None:
        """Start to send a piece of this rank's shard, and to receive those of the others."""
        sizes = [of_rank[index] for of_rank in self.gather_sizes]
        self.arriving[index] = _start_exchange(
            piece, self.group, self.scatter_dim, self.scatter_sizes, self.gather_dim, sizes
        )

    def join(self) -> Tensor:
        """Wait for all pieces of all ranks, and put them in order: by rank, then by piece."""
        received = [self.arriving.pop(index).wait() for index in sorted(self.arriving)]
        return torch.cat(
            [part for of_rank in zip(*received, strict=True) for part in of_rank], self.gather_dim
        )

    def send_back(self, grad: Tensor) -> None:
        """Start to return the gradients of all pieces; the last first, since autograd goes back from there."""
        sizes = [size for of_rank in self.gather_sizes for size in of_rank]
        parts = grad.split(sizes, self.gather_dim)
        count = len(self.gather_sizes[0])
        for index in reversed(range(count)):
            sent = parts[index::count]  # to each rank what it sent
            shapes = _shapes(sent[self.group.rank], self.scatter_dim, self.scatter_sizes)
            self.returning[index] = AsyncAllToAll.start(sent, shapes, self.group)

    def returned(self, index: int) -> Tensor:
        """Wait for the gradient of a piece."""
        return torch.cat(self.returning.pop(index).wait(), self.scatter_dim)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, piece: Tensor, travel: _PipelinedAllToAll, index: int) -> Tensor:
        ctx.travel, ctx.index = travel, index
        travel.send(index, piece)
        return piece.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.travel.returned(ctx.index), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, travel: _PipelinedAllToAll, *tokens: Tensor) -> Tensor:
        ctx.travel, ctx.tokens = travel, len(tokens)
        return travel.join()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.travel.send_back(grad)
        return None, *(grad.new_zeros(()) for _ in range(ctx.tokens))


def all_gather(x: Tensor, group: Group, dim: int, sizes: list[int]) -> Tensor:
    """Give every rank the whole of an axis of which rank r has ``sizes[r]``."""
    if group.size == 1:
        return x
    return _WithAdjoint.apply(x, _all_gather, _reduce_scatter, group, dim, sizes)


def reduce_scatter(x: Tensor, group: Group, dim: int, sizes: list[int]) -> Tensor:
    """Add up what all ranks have of the whole; rank r gets ``sizes[r]`` of an axis. The adjoint of `gather`."""
    if group.size == 1:
        return x
    return _WithAdjoint.apply(x, _reduce_scatter, _all_gather, group, dim, sizes)


class _WithAdjoint(torch.autograd.Function):
    """An exchange, and one that is its adjoint and takes the same arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Callable[..., Tensor], adjoint: Any, *args: Any) -> Tensor:
        ctx.adjoint, ctx.args = adjoint, args
        return exchange(x, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.adjoint(grad, *ctx.args), None, None, *(None for _ in ctx.args)


def _all_gather(x: Tensor, group: Group, dim: int, sizes: list[int]) -> Tensor:
    arriving = AsyncAllToAll.start([x] * group.size, _shapes(x, dim, sizes), group, "all_gather")
    return torch.cat(arriving.wait(), dim)


def _reduce_scatter(x: Tensor, group: Group, dim: int, sizes: list[int]) -> Tensor:
    parts = x.split(sizes, dim)
    shapes = [list(parts[group.rank].shape)] * group.size
    return torch.stack(AsyncAllToAll.start(parts, shapes, group, "reduce_scatter").wait()).sum(0)


def ring_send(x: Tensor, group: Group, dim: int, size: int) -> Callable[[], Tensor]:
    """Start to send ``x`` to the next rank of a ring; not differentiable.

    Returns:
        What waits for the tensor that the rank before has sent, with ``size`` along axis ``dim``.
    """
    following, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    sent = [x if rank == following else x.narrow(dim, 0, 0) for rank in range(group.size)]
    sizes = [size if rank == before else 0 for rank in range(group.size)]
    arriving = AsyncAllToAll.start(sent, _shapes(x, dim, sizes), group, "ring")
    return lambda: arriving.wait()[before]


def _exchange(
    x: Tensor,
    group: Group,
    scatter_dim: int,
    scatter_sizes: list[int],
    gather_dim: int,
    gather_sizes: list[int],
) -> Tensor:
    return torch.cat(
        _start_exchange(x, group, scatter_dim, scatter_sizes, gather_dim, gather_sizes).wait(), dim=gather_dim
    )


def _start_exchange(
    x: Tensor,
    group: Group,
    scatter_dim: int,
    scatter_sizes: list[int],
    gather_dim: int,
    gather_sizes: list[int],
) -> "AsyncAllToAll":
    sent = x.split(scatter_sizes, dim=scatter_dim)
    return AsyncAllToAll.start(sent, _shapes(sent[group.rank], gather_dim, gather_sizes), group)


def _shapes(x: Tensor, dim: int, sizes: list[int]) -> list[list[int]]:
    """The shape of ``x``, with each of the sizes along an axis."""
    return [[*x.shape[:dim], size, *x.shape[dim + 1 :]] for size in sizes]


class AsyncAllToAll(NamedTuple):
    """An all-to-all that has begun."""

    flat: Tensor
    shapes: list[list[int]]

    @classmethod
    def start(
        cls, sent: Sequence[Tensor], shapes: list[list[int]], group: Group, kind: str = "all_to_all"
    ) -> "AsyncAllToAll":
        """Send each rank its tensor, to receive one of the given shape from each; counted as ``kind``."""
        flat = torch.cat([part.flatten() for part in sent])
        in_sizes, out_sizes = [part.numel() for part in sent], [prod(shape) for shape in shapes]
        if not torch.compiler.is_compiling():
            group.traffic.add(kind, flat.nbytes - sent[group.rank].nbytes)
        return cls(all_to_all_single(flat, out_sizes, in_sizes, group.name), shapes)  # type: ignore[arg-type]

    def wait(self) -> list[Tensor]:
        """What came from each rank."""
        received = wait_tensor(self.flat).split([prod(shape) for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(received, self.shapes, strict=True)]
