"""Differentiable collectives over the ranks of a group: all-to-all, all-gather, reduce-scatter and ring send.

Sizes may differ between ranks; nothing is padded. The functions call PyTorch's functional collectives, which
torch.compile can trace. PyTorch does not promise publicly that these are differentiable, so each adjoint is written
here.
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
    """Scatter axis ``scatter_dim`` over the ranks and gather axis ``gather_dim`` from them.

    The adjoint is the same exchange in the other direction.

    Args:
        x: this rank's shard: all of axis ``scatter_dim``, and its share of axis ``gather_dim``.
        scatter_sizes: length of axis ``scatter_dim`` that each rank receives.
        gather_sizes: length of axis ``gather_dim`` that each rank holds before.

    Returns:
        This rank's share of axis ``scatter_dim``, and all of axis ``gather_dim``.
    """
    if group.size == 1:
        return x
    result: Tensor = _AllToAll.apply(x, group, scatter_dim, scatter_sizes, gather_dim, gather_sizes)  # type: ignore[no-untyped-call]
    return result


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, *axes: Any) -> Tensor:
        ctx.group, ctx.axes = group, axes
        return _start_all_to_all(x, group, *axes).wait_cat(axes[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scatter_dim, scatter_sizes, gather_dim, gather_sizes = ctx.axes
        exchange = _start_all_to_all(grad, ctx.group, gather_dim, gather_sizes, scatter_dim, scatter_sizes)
        return exchange.wait_cat(scatter_dim), None, None, None, None, None


def all_to_all_pipelined(
    chunks: Iterable[Tensor],
    group: Group,
    scatter_dim: int,
    scatter_sizes: list[int],
    gather_dim: int,
    gather_sizes: list[list[int]],
) -> Tensor:
    """Do `all_to_all` in chunks along axis ``gather_dim``: one is in transit while the next is computed.

    Backward sends the gradients of all chunks at once; the backward of a chunk starts when its gradient has arrived.

    Args:
        chunks: computed one after the other, as they are asked for; the same number on all ranks.
        gather_sizes: for each rank, the length of axis ``gather_dim`` of each of its chunks.
    """
    exchange = _PipelinedAllToAll(group, scatter_dim, scatter_sizes, gather_dim, gather_sizes)
    send = _SendChunk.apply
    tokens = [send(chunk, exchange, index) for index, chunk in enumerate(chunks)]  # type: ignore[no-untyped-call]
    result: Tensor = _JoinChunks.apply(exchange, *tokens)  # type: ignore[no-untyped-call]
    return result


class _PipelinedAllToAll:
    """The chunks in transit. Autograd sees only an empty token for each chunk; the data are exchanged here."""

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
        self.chunks: dict[int, AsyncAllToAll] = {}
        self.gradients: dict[int, AsyncAllToAll] = {}

    def send_chunk(self, index: int, chunk: Tensor) -> None:
        """Start to send one chunk of this rank, and to receive those of the other ranks."""
        sizes = [of_rank[index] for of_rank in self.gather_sizes]
        self.chunks[index] = _start_all_to_all(
            chunk, self.group, self.scatter_dim, self.scatter_sizes, self.gather_dim, sizes
        )

    def join_chunks(self) -> Tensor:
        """Wait for all chunks of all ranks, and concatenate them by rank and then by chunk."""
        received = [self.chunks.pop(index).wait() for index in sorted(self.chunks)]
        return torch.cat(
            [part for of_rank in zip(*received, strict=True) for part in of_rank], self.gather_dim
        )

    def send_gradients(self, grad: Tensor) -> None:
        """Start to return the gradients of all chunks; the last first, since autograd needs it first."""
        sizes = [size for of_rank in self.gather_sizes for size in of_rank]
        parts = grad.split(sizes, self.gather_dim)
        count = len(self.gather_sizes[0])
        for index in reversed(range(count)):
            sent = parts[index::count]  # each rank gets the gradient of what it sent
            shapes = _shapes(sent[self.group.rank], self.scatter_dim, self.scatter_sizes)
            self.gradients[index] = AsyncAllToAll.start(sent, shapes, self.group)

    def wait_gradient(self, index: int) -> Tensor:
        """Return the gradient of one chunk once it has arrived."""
        return self.gradients.pop(index).wait_cat(self.scatter_dim)


class _SendChunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunk: Tensor, exchange: _PipelinedAllToAll, index: int) -> Tensor:
        ctx.exchange, ctx.index = exchange, index
        exchange.send_chunk(index, chunk)
        return chunk.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.exchange.wait_gradient(ctx.index), None, None


class _JoinChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: _PipelinedAllToAll, *tokens: Tensor) -> Tensor:
        ctx.exchange, ctx.tokens = exchange, len(tokens)
        return exchange.join_chunks()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.send_gradients(grad)
        return None, *(grad.new_zeros(()) for _ in range(ctx.tokens))


def all_gather(x: Tensor, group: Group, dim: int, sizes: list[int]) -> Tensor:
    """Return axis ``dim`` whole on every rank; rank r holds ``sizes[r]`` of it. The adjoint is `reduce_scatter`."""
    if group.size == 1:
        return x
    result: Tensor = _WithAdjoint.apply(x, _all_gather, _reduce_scatter, group, dim, sizes)  # type: ignore[no-untyped-call]
    return result


def reduce_scatter(x: Tensor, group: Group, dim: int, sizes: list[int]) -> Tensor:
    """Sum ``x`` over the ranks and scatter axis ``dim``; rank r gets ``sizes[r]``. The adjoint is `all_gather`."""
    if group.size == 1:
        return x
    result: Tensor = _WithAdjoint.apply(x, _reduce_scatter, _all_gather, group, dim, sizes)  # type: ignore[no-untyped-call]
    return result


class _WithAdjoint(torch.autograd.Function):
    """A collective whose backward is another collective with the same arguments."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, collective: Callable[..., Tensor], adjoint: Callable[..., Tensor], *args: Any
    ) -> Tensor:
        ctx.adjoint, ctx.args = adjoint, args
        return collective(x, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.adjoint(grad, *ctx.args), None, None, *(None for _ in ctx.args)


def _all_gather(x: Tensor, group: Group, dim: int, sizes: list[int]) -> Tensor:
    exchange = AsyncAllToAll.start([x] * group.size, _shapes(x, dim, sizes), group, "all_gather")
    return exchange.wait_cat(dim)


def _reduce_scatter(x: Tensor, group: Group, dim: int, sizes: list[int]) -> Tensor:
    parts = x.split(sizes, dim)
    shapes = [list(parts[group.rank].shape)] * group.size
    return torch.stack(AsyncAllToAll.start(parts, shapes, group, "reduce_scatter").wait()).sum(0)


def ring_send(x: Tensor, group: Group, dim: int, size: int) -> Callable[[], Tensor]:
    """Start to send ``x`` to the next rank of the ring; not differentiable.

    Returns:
        A function that waits for the tensor of the previous rank, with ``size`` along axis ``dim``, and returns it.
    """
    following, previous = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    sent = [x if rank == following else x.narrow(dim, 0, 0) for rank in range(group.size)]
    sizes = [size if rank == previous else 0 for rank in range(group.size)]
    exchange = AsyncAllToAll.start(sent, _shapes(x, dim, sizes), group, "ring")
    return lambda: exchange.wait()[previous]


def _start_all_to_all(
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
    """Return the shape of ``x`` with each of ``sizes`` along axis ``dim``."""
    return [[*x.shape[:dim], size, *x.shape[dim + 1 :]] for size in sizes]


class AsyncAllToAll(NamedTuple):
    """An all-to-all that has been started."""

    flat: Tensor
    """All that this rank receives; valid after `wait`."""
    shapes: list[list[int]]
    """Shape of the tensor that each rank sends here."""

    @classmethod
    def start(
        cls, sent: Sequence[Tensor], shapes: list[list[int]], group: Group, collective: str = "all_to_all"
    ) -> "AsyncAllToAll":
        """Send ``sent[r]`` to each rank r and receive a tensor of ``shapes[r]``; counted as ``collective``."""
        flat = torch.cat([part.flatten() for part in sent])
        in_sizes, out_sizes = [part.numel() for part in sent], [prod(shape) for shape in shapes]
        if not torch.compiler.is_compiling():
            group.traffic.add(collective, flat.nbytes - sent[group.rank].nbytes)
        return cls(all_to_all_single(flat, out_sizes, in_sizes, group.name), shapes)  # type: ignore[arg-type]

    def wait(self) -> list[Tensor]:
        """Wait, and return the tensor of each rank."""
        received = wait_tensor(self.flat).split([prod(shape) for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(received, self.shapes, strict=True)]

    def wait_cat(self, dim: int) -> Tensor:
        """Wait, and concatenate the tensors of all ranks along axis ``dim``."""
        return torch.cat(self.wait(), dim)
