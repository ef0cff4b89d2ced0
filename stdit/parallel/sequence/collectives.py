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
from stdit.parallel.sequence.layouts import Tokens


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


def redistribute(x: Tensor, group: Group, sources: Sequence[Tokens], targets: Sequence[Tokens]) -> Tensor:
    """Give each rank the tokens of its target, from the ranks that have them.

    The adjoint is the exchange in the other direction; the gradients of a token that several ranks got add up.

    Args:
        x: the tokens that this rank has, ``[B T_n S_n ...]``.
        sources: tokens that each rank has; no two have the same.
        targets: tokens that each rank gets, of all that there are.
    """
    if group.size == 1 or sources == targets:
        return x
    result: Tensor = _Redistribute.apply(x, group, sources, targets)  # type: ignore[no-untyped-call]
    return result


class _Redistribute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group, sources: Sequence[Tokens], targets: Sequence[Tokens]
    ) -> Tensor:
        ctx.args = group, targets, sources
        return _place([_send_tokens(x, group, sources, targets)], targets[group.rank])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group, sources, targets = ctx.args
        return _place([_send_tokens(grad, group, sources, targets)], targets[group.rank]), None, None, None


def redistribute_pipelined(
    chunks: Iterable[Tensor], group: Group, sources: Sequence[Sequence[Tokens]], targets: Sequence[Tokens]
) -> Tensor:
    """Do `redistribute` in chunks: one is in transit while the next is computed.

    Backward sends the gradients of all chunks at once; the backward of a chunk starts when its gradient has arrived.

    Args:
        chunks: computed one after the other, as they are asked for; the same number on all ranks.
        sources: for each rank, the tokens of each of its chunks.
        targets: tokens that each rank gets; no two get the same.
    """
    exchange = _PipelinedExchange(group, sources, targets)
    send = _SendChunk.apply
    tokens = [send(chunk, exchange, index) for index, chunk in enumerate(chunks)]  # type: ignore[no-untyped-call]
    result: Tensor = _JoinChunks.apply(exchange, *tokens)  # type: ignore[no-untyped-call]
    return result


class _PipelinedExchange:
    """The chunks in transit. Autograd sees only an empty token for each chunk; the data are exchanged here."""

    def __init__(self, group: Group, sources: Sequence[Sequence[Tokens]], targets: Sequence[Tokens]) -> None:
        self.group, self.targets = group, targets
        self.sources = [list(of_chunk) for of_chunk in zip(*sources, strict=True)]
        self.chunks: dict[int, _TokenExchange] = {}
        self.gradients: dict[int, _TokenExchange] = {}

    def send_chunk(self, index: int, chunk: Tensor) -> None:
        """Start to send one chunk of this rank, and to receive those of the other ranks."""
        self.chunks[index] = _send_tokens(chunk, self.group, self.sources[index], self.targets)

    def join_chunks(self) -> Tensor:
        """Wait for all chunks of all ranks, and put them together."""
        chunks = [self.chunks.pop(index) for index in sorted(self.chunks)]
        return _place(chunks, self.targets[self.group.rank])

    def send_gradients(self, grad: Tensor) -> None:
        """Start to return the gradients of all chunks; the last first, since autograd needs it first."""
        for index in reversed(range(len(self.sources))):
            self.gradients[index] = _send_tokens(grad, self.group, self.targets, self.sources[index])

    def wait_gradient(self, index: int) -> Tensor:
        """Return the gradient of one chunk once it has arrived."""
        return _place([self.gradients.pop(index)], self.sources[index][self.group.rank])


class _SendChunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunk: Tensor, exchange: _PipelinedExchange, index: int) -> Tensor:
        ctx.exchange, ctx.index = exchange, index
        exchange.send_chunk(index, chunk)
        return chunk.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.exchange.wait_gradient(ctx.index), None, None


class _JoinChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: _PipelinedExchange, *tokens: Tensor) -> Tensor:
        ctx.exchange, ctx.tokens = exchange, len(tokens)
        return exchange.join_chunks()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.send_gradients(grad)
        return None, *(grad.new_zeros(()) for _ in range(ctx.tokens))


def sum_over(x: Tensor, group: Group, sources: Sequence[Sequence[int]]) -> Tensor:
    """Return the sum of the ``x`` of some ranks, in their order; rank r gets that of the ranks ``sources[r]``.

    The adjoint sends each gradient to the ranks whose ``x`` it is of. Every rank must call this.
    """
    if group.size == 1:
        return x if sources[0] else torch.zeros_like(x)
    result: Tensor = _SumOver.apply(x, group, sources)  # type: ignore[no-untyped-call]
    return result


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sources: Sequence[Sequence[int]]) -> Tensor:
        takers = [taker for taker in range(group.size) if group.rank in sources[taker]]
        ctx.args = group, takers, sources[group.rank]
        return _sum_over(x, group, sources[group.rank], takers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _sum_over(grad, *ctx.args), None, None


def _sum_over(x: Tensor, group: Group, sources: Sequence[int], takers: Sequence[int]) -> Tensor:
    """Send ``x`` to some ranks, and return the sum of those of others."""
    sent = [x if rank in takers else x[:0] for rank in range(group.size)]
    shapes = [[*x.shape] if rank in sources else [0, *x.shape[1:]] for rank in range(group.size)]
    received = AsyncAllToAll.start(sent, shapes, group, "sum_over").wait()
    return sum((received[rank] for rank in sources), torch.zeros_like(x))


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


class _TokenExchange(NamedTuple):
    """Tokens that are on their way to this rank."""

    exchange: "AsyncAllToAll"
    sources: Sequence[Tokens]


def _send_tokens(
    x: Tensor, group: Group, sources: Sequence[Tokens], targets: Sequence[Tokens]
) -> _TokenExchange:
    """Start to send the tokens of this rank that are in the targets of others, and to receive its own."""
    own, wanted = sources[group.rank], targets[group.rank]
    sent = [x[own.common(target).within(own)] for target in targets]
    parts = (source.common(wanted) for source in sources)
    shapes = [[x.shape[0], part.frames.size, part.patches.size, *x.shape[3:]] for part in parts]
    return _TokenExchange(AsyncAllToAll.start(sent, shapes, group), sources)


def _place(exchanges: Sequence[_TokenExchange], target: Tokens) -> Tensor:
    """Wait for tokens, and return those of ``target``; tokens that come from several ranks are added up."""
    places = [source.common(target) for exchange in exchanges for source in exchange.sources]
    parts = [part for exchange in exchanges for part in exchange.exchange.wait()]
    shape = (parts[0].shape[0], target.frames.size, target.patches.size, *parts[0].shape[3:])
    if sum(place.size for place in places) == target.size:
        out = parts[0].new_empty(shape)
        for part, place in zip(parts, places, strict=True):
            out[place.within(target)] = part
        return out
    out = parts[0].new_zeros(shape)
    for part, place in zip(parts, places, strict=True):
        out[place.within(target)] += part
    return out


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
        received = all_to_all_single(flat, group.of_all(out_sizes), group.of_all(in_sizes), group.name)  # type: ignore[arg-type]
        return cls(received, shapes)

    def wait(self) -> list[Tensor]:
        """Wait, and return the tensor of each rank."""
        received = wait_tensor(self.flat).split([prod(shape) for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(received, self.shapes, strict=True)]

    def wait_cat(self, dim: int) -> Tensor:
        """Wait, and concatenate the tensors of all ranks along axis ``dim``."""
        return torch.cat(self.wait(), dim)
