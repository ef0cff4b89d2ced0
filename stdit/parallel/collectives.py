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


def reshard_pieces(
    pieces: Iterable[Tensor],
    group: Group,
    whole: int,
    whole_sizes: list[int],
    shard: int,
    shard_sizes: list[list[int]],
) -> Tensor:
    """As `reshard`, for a part that comes in pieces along axis ``shard``: each travels while the next is made.

    Backward sends all pieces of the gradient at once, and the work on each begins when it is there.

    Args:
        pieces: made one after the other; the same number on all ranks.
        shard_sizes: how much of axis ``shard`` each rank has in each of its pieces.
    """
    travel = _Travel(group, whole, whole_sizes, shard, shard_sizes)
    tokens = [_Send.apply(piece, travel, index) for index, piece in enumerate(pieces)]
    return _Join.apply(travel, *tokens)


class _Travel:
    """Pieces on their way. Autograd sees a token for each piece, and the data pass through here."""

    def __init__(
        self, group: Group, whole: int, whole_sizes: list[int], shard: int, shard_sizes: list[list[int]]
    ) -> None:
        self.group, self.whole, self.whole_sizes = group, whole, whole_sizes
        self.shard, self.shard_sizes = shard, shard_sizes
        self.arriving: dict[int, _Arriving] = {}
        self.returning: dict[int, _Arriving] = {}

    def send(self, index: int, piece: Tensor) -> None:
        """Start to send a piece of this rank's shard, and to receive those of the others."""
        sizes = [of_rank[index] for of_rank in self.shard_sizes]
        self.arriving[index] = _start_exchange(
            piece, self.group, self.whole, self.whole_sizes, self.shard, sizes
        )

    def join(self) -> Tensor:
        """Wait for all pieces of all ranks, and put them in order: by rank, then by piece."""
        received = [self.arriving.pop(index).wait() for index in sorted(self.arriving)]
        return torch.cat([part for of_rank in zip(*received, strict=True) for part in of_rank], self.shard)

    def send_back(self, grad: Tensor) -> None:
        """Start to return the gradients of all pieces; the last first, since autograd goes back from there."""
        sizes = [size for of_rank in self.shard_sizes for size in of_rank]
        parts = grad.split(sizes, self.shard)
        count = len(self.shard_sizes[0])
        for index in reversed(range(count)):
            sent = parts[index::count]  # to each rank what it sent
            shapes = _shapes(sent[self.group.rank], self.whole, self.whole_sizes)
            self.returning[index] = _Arriving.start(sent, shapes, self.group)

    def returned(self, index: int) -> Tensor:
        """Wait for the gradient of a piece."""
        return torch.cat(self.returning.pop(index).wait(), self.whole)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, piece: Tensor, travel: _Travel, index: int) -> Tensor:
        ctx.travel, ctx.index = travel, index
        travel.send(index, piece)
        return piece.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.travel.returned(ctx.index), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, travel: _Travel, *tokens: Tensor) -> Tensor:
        ctx.travel, ctx.tokens = travel, len(tokens)
        return travel.join()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.travel.send_back(grad)
        return None, *(grad.new_zeros(()) for _ in range(ctx.tokens))


def gather(x: Tensor, group: Group, dim: int, sizes: list[int]) -> Tensor:
    """Give every rank the whole of an axis of which rank r has ``sizes[r]``."""
    if group.size == 1:
        return x
    return _WithAdjoint.apply(x, _all_gather, _reduce_scatter, group, dim, sizes)


def add_up(x: Tensor, group: Group, dim: int, sizes: list[int]) -> Tensor:
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
    arriving = _Arriving.start([x] * group.size, _shapes(x, dim, sizes), group, "all_gather")
    return torch.cat(arriving.wait(), dim)


def _reduce_scatter(x: Tensor, group: Group, dim: int, sizes: list[int]) -> Tensor:
    parts = x.split(sizes, dim)
    shapes = [list(parts[group.rank].shape)] * group.size
    return torch.stack(_Arriving.start(parts, shapes, group, "reduce_scatter").wait()).sum(0)


def pass_on(x: Tensor, group: Group, dim: int, size: int) -> Callable[[], Tensor]:
    """Start to send ``x`` to the next rank of a ring; not differentiable.

    Returns:
        What waits for the tensor that the rank before has sent, with ``size`` along axis ``dim``.
    """
    following, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    sent = [x if rank == following else x.narrow(dim, 0, 0) for rank in range(group.size)]
    sizes = [size if rank == before else 0 for rank in range(group.size)]
    arriving = _Arriving.start(sent, _shapes(x, dim, sizes), group, "ring")
    return lambda: arriving.wait()[before]


def _exchange(
    x: Tensor, group: Group, whole: int, whole_sizes: list[int], shard: int, shard_sizes: list[int]
) -> Tensor:
    return torch.cat(_start_exchange(x, group, whole, whole_sizes, shard, shard_sizes).wait(), dim=shard)


def _start_exchange(
    x: Tensor, group: Group, whole: int, whole_sizes: list[int], shard: int, shard_sizes: list[int]
) -> "_Arriving":
    sent = x.split(whole_sizes, dim=whole)
    return _Arriving.start(sent, _shapes(sent[group.rank], shard, shard_sizes), group)


def _shapes(x: Tensor, dim: int, sizes: list[int]) -> list[list[int]]:
    """The shape of ``x``, with each of the sizes along an axis."""
    return [[*x.shape[:dim], size, *x.shape[dim + 1 :]] for size in sizes]


class _Arriving(NamedTuple):
    """An all-to-all that has begun."""

    flat: Tensor
    shapes: list[list[int]]

    @classmethod
    def start(
        cls, sent: Sequence[Tensor], shapes: list[list[int]], group: Group, kind: str = "all_to_all"
    ) -> "_Arriving":
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
