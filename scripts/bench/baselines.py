"""Baselines for dynamic sequence parallelism: other ways to share a video, installed in a plain STDiT.

In each of them time stays sharded, ``[B T_n S D]``, from the first block to the last, and attention exchanges what it
needs. Bytes that a rank sends in the forward pass of a pair of blocks, with M the bytes of ``[B T S D]``:

- ulysses: 4 M/N (N-1)/N: temporal attention exchanges frames for heads (arXiv:2309.14509, section 3.2).
- ulysses-all: 8 M/N (N-1)/N: spatial attention as well, as if the tokens were one sequence.
- usp: as ulysses-all, but where ranks outnumber heads, in parts of U ranks, and keys and values of temporal attention
  go round a ring of these parts: 8 M/N (U-1)/U + 2 M/N (N/U-1) (arXiv:2405.07719).
- ring: 2 M (N-1)/N: keys and values of temporal attention go round a ring (arXiv:2310.01889, section 3).
- megatron: 8 M (N-1)/N: every rank gathers all tokens, for its share of heads and of the MLP's hidden columns
  (arXiv:2205.05198, section 4.2.2). Cross-attention is not split: that would add 4 M (N-1)/N.
- lasp-ring: N - 1 states for a linear block, one after the other round a ring (LASP, arXiv:2404.02882), which the
  model's own blocks send at once, as LASP-2 does.

Backward sends the same, a ring of keys and values twice that. Activation checkpointing repeats the exchanges of
forward, which are all inside the blocks. Every rank holds all weights; the mean of their gradients over ranks is the
gradient.

Letters: B batch, T frames, S patches of a frame, D width, N ranks; R rows of independent attention, h heads,
n tokens of a row, d channels of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from stdit.errors import UserError
from stdit.parallel.sequence.collectives import all_gather, all_to_all, reduce_scatter, ring_send
from stdit.parallel.sequence.group import Group
from stdit.parallel.sequence.layouts import even_sizes
from stdit.parallel.sequence.sharding import TokenShard, TokenSharding
from stdit.parallel.sequence.stages import Stage, ulysses_size
from stdit.parallel.sequence.usp import attend_over, ring_attention


class FrameSharding(TokenSharding):
    """Tokens that stay sharded along time from the first block to the last."""

    def stages(self, kinds: str, keeps_attention: bool = False) -> list[Stage]:
        return [Stage(kind, "time", kind == "L") for kind in kinds]

    def shard(self, stage: Stage) -> TokenShard | None:
        return RingShard(self, stage) if stage.reaches_others else None

    def part(self, size: int) -> "FrameSharding":
        """Return the sharding over the ``size`` neighbouring ranks that this one is among, of their frames alone."""
        begin = self.group.rank // size * size
        ranks = range(begin, begin + size)
        frames = sum(self.frames_per_rank[rank] for rank in ranks)
        return FrameSharding(self.group.part(tuple(ranks)), frames, self.patches, self.patch_frames)

    @property
    def frames_per_rank(self) -> list[int]:
        """Frames of each rank."""
        return even_sizes(self.frames, self.group.size)

    def sizes(self, length: int, frames: int) -> list[int]:
        """Return each rank's share of an axis of ``length`` that has ``frames`` frames."""
        return [length // frames * share for share in self.frames_per_rank]

    @property
    def own_frames(self) -> int:
        """Number of frames of this rank."""
        return self.frames_per_rank[self.group.rank]


def apply_baseline(model: Any, method: str, sharding: TokenSharding) -> TokenSharding:
    """Install a baseline in an STDiT, which then takes and returns a rank's frames, as with DSP.

    Args:
        model: changed in place, permanently; its weights stay the same.
        method: one of `BASELINES`.
        sharding: of the model's input, from ``STDiT.token_sharding``.

    Returns:
        The ``sharding`` to pass to the model.

    Raises:
        UserError: for an unknown method, or for a model or size that it does not support.
    """
    if method not in BASELINES:
        raise UserError(f"method {method!r}: must be one of {', '.join(BASELINES)}")
    ranks, heads = sharding.group.size, model.config.num_heads
    if sharding.frames < ranks:
        raise UserError(
            f"{method} on {ranks} ranks, but there are {sharding.frames} frames of tokens, and each rank needs one: "
            f"use at most {sharding.frames} ranks"
        )
    known = "SL" if method == "lasp-ring" else "ST"
    if odd := sorted(set(model.kinds) - set(known)):
        raise UserError(
            f"{method} with model.blocks = {model.config.blocks!r}: it has no way to share blocks of kind "
            f"{', '.join(odd)}, only {' and '.join(known)}: leave them out"
        )
    if method not in ("ring", "usp", "lasp-ring") and heads < ranks:
        raise UserError(
            f"{method} on {ranks} ranks, but the model has {heads} heads, and each rank needs one: use at most "
            f"{heads} ranks, or more model.num_heads"
        )
    if model.config.mlp_conv:
        raise UserError(
            f"{method} with model.mlp_conv: its temporal convolution needs frames of other ranks, which only DSP "
            "exchanges; leave mlp_conv out"
        )
    group = replace(sharding.group, chunks=1)  # nothing is exchanged between blocks that could overlap
    staying = FrameSharding(group, sharding.frames, sharding.patches, sharding.patch_frames)
    BASELINES[method](model, staying)
    return staying


def blocks_of_kind(kind: str, model: Any) -> list[Any]:
    """Return the model's spatial (S) or temporal blocks (T)."""
    return [block for block in model.blocks if block.kind == kind]


def ulysses(model: Any, sharding: FrameSharding) -> None:
    """Let temporal attention see all frames, with a share of the heads; spatial attention is unchanged."""
    for block in blocks_of_kind("T", model):
        block.attn.register_forward_pre_hook(partial(_own_angles, sharding))
        block.attn.attend = partial(_attend_with_own_heads, block.attn.attend, sharding, 2)


def ulysses_all(model: Any, sharding: FrameSharding) -> None:
    """Let every attention see all frames, with a share of the heads."""
    ulysses(model, sharding)
    for block in blocks_of_kind("S", model):
        block.attn.attend = partial(_attend_with_own_heads, block.attn.attend, sharding, 0)


def ring(model: Any, sharding: FrameSharding) -> None:
    """Let keys and values of temporal attention go round the ranks."""
    for block in blocks_of_kind("T", model):
        block.attn.register_forward_pre_hook(partial(_own_angles, sharding))
        block.attn.attend = partial(ring_attention, sharding.group, sharding.frames_per_rank)


def usp(model: Any, sharding: FrameSharding) -> None:
    """Let every attention see all frames, by Ulysses in as many ranks as there are heads, and a ring of these parts.

    Spatial attention has all tokens of a frame in a part, so it needs no ring.
    """
    part = sharding.part(ulysses_size(sharding.group.size, model.config.num_heads))
    for block in blocks_of_kind("S", model):
        block.attn.attend = partial(_attend_with_own_heads, block.attn.attend, part, 0)
    for block in blocks_of_kind("T", model):
        block.attn.register_forward_pre_hook(partial(_own_angles, sharding))
        over = partial(attend_over, sharding.group, sharding.frames_per_rank, block.attn.attend)
        block.attn.attend = over


def megatron(model: Any, sharding: FrameSharding) -> None:
    """Let self-attention and MLP see all tokens, with a share of the heads and of the hidden columns."""
    heads = even_sizes(model.config.num_heads, sharding.group.size)
    for block in model.blocks:
        frames_axis = 0 if block.kind == "S" else 1
        channels = [share * block.attn.qkv.in_features // block.attn.num_heads for share in heads]
        _split_columns(block.attn, block.attn.qkv, block.attn.proj, channels, sharding, frames_axis)
        block.attn.num_heads = heads[sharding.group.rank]
        columns = even_sizes(block.mlp.fc1.out_features, sharding.group.size)
        _split_columns(block.mlp, block.mlp.fc1, block.mlp.fc2, columns, sharding, 1)


def lasp_ring(model: Any, sharding: FrameSharding) -> None:
    """Let states of linear attention go round the ranks: `RingShard` sends them."""


class RingShard(TokenShard):
    """Whole frames of a linear block, whose states go from rank to rank."""

    def sum_states(self, states: Tensor, causal: bool) -> Tensor:
        ranks, group = range(self.sharding.group.size), self.sharding.group
        if not causal:
            return ring_sum(states.sum(0, keepdim=True), group, [ranks] * len(ranks))
        states = states.cumsum(0)
        return states + ring_sum(states[-1:], group, [range(rank) for rank in ranks])


def ring_sum(x: Tensor, group: Group, sources: Sequence[Sequence[int]]) -> Tensor:
    """As `stdit.parallel.sequence.collectives.sum_over`, by N - 1 sends, each of what arrived in the one before."""
    result: Tensor = _RingSum.apply(x, group, sources)  # type: ignore[no-untyped-call]
    return result


class _RingSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sources: Sequence[Sequence[int]]) -> Tensor:
        ranks = range(group.size)
        ctx.group, ctx.takers = (
            group,
            [[taker for taker in ranks if rank in sources[taker]] for rank in ranks],
        )
        return _ring_sum(x, group, sources)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ring_sum(grad, ctx.group, ctx.takers), None, None


def _ring_sum(x: Tensor, group: Group, sources: Sequence[Sequence[int]]) -> Tensor:
    total = torch.zeros_like(x)
    for step in range(group.size):
        if (group.rank - step) % group.size in sources[group.rank]:
            total += x
        if step + 1 < group.size:
            x = ring_send(x, group, 0, len(x))()
    return total


BASELINES: dict[str, Callable[[Any, FrameSharding], None]] = {
    "ulysses": ulysses,
    "ulysses-all": ulysses_all,
    "usp": usp,
    "ring": ring,
    "megatron": megatron,
    "lasp-ring": lasp_ring,
}


def _own_angles(sharding: FrameSharding, _: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Pass the rotary angles of this rank's frames instead of all."""
    x, angles = args
    return x, angles.split(sharding.frames_per_rank)[sharding.group.rank]


def _attend_with_own_heads(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    sharding: FrameSharding,
    axis: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> Tensor:
    """Attend over ``[R h n d]`` sharded along axis 0 or 2, each rank for its share of the heads.

    Two all-to-alls: one of q, k and v, one of the result (arXiv:2309.14509, section 3.2).
    """
    heads = even_sizes(q.shape[1], sharding.group.size)
    sizes = sharding.sizes(q.shape[axis], sharding.own_frames)
    q, k, v = all_to_all(torch.stack([q, k, v]), sharding.group, 2, heads, axis + 1, sizes)
    return all_to_all(attend(q, k, v), sharding.group, axis, sizes, 1, heads)


def _split_columns(
    module: nn.Module, first: Any, last: Any, columns: list[int], sharding: FrameSharding, frames_axis: int
) -> None:
    """Let a module of two linear layers see all frames, with this rank's share of the hidden columns."""
    group = sharding.group
    first.forward = partial(_own_outputs, first, columns, group)
    last.forward = partial(_own_inputs, last, columns, group)

    def gather_frames(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = args
        sizes = sharding.sizes(x.shape[frames_axis], sharding.own_frames)
        return all_gather(x, group, frames_axis, sizes), *rest

    def scatter_sum(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        sizes = sharding.sizes(output.shape[frames_axis], sharding.frames)
        return reduce_scatter(output, group, frames_axis, sizes)

    module.register_forward_pre_hook(gather_frames)
    module.register_forward_hook(scatter_sum)


def _own_outputs(layer: nn.Linear, columns: list[int], group: Group, x: Tensor) -> Tensor:
    """Compute this rank's columns of the output; if that is several parts side by side (q, k, v), of each part."""
    parts = layer.out_features // sum(columns)
    own = [
        p.unflatten(0, (parts, -1)).split(columns, 1)[group.rank].flatten(0, 1)
        for p in (layer.weight, layer.bias)
    ]
    return linear(x, *own)


def _own_inputs(layer: nn.Linear, columns: list[int], group: Group, x: Tensor) -> Tensor:
    """Compute this rank's term of a sum over ranks, with its share of the bias."""
    return linear(x, layer.weight.split(columns, 1)[group.rank], layer.bias / group.size)
