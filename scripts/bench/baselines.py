"""Baselines for dynamic sequence parallelism: other ways to share a video, installed in a plain STDiT.

In each of them time stays sharded, ``[B T_n S D]``, from the first block to the last, and attention exchanges what it
needs. Bytes that a rank sends in the forward pass of a pair of blocks, with M the bytes of ``[B T S D]``:

- ulysses: 4 M/N (N-1)/N: temporal attention exchanges frames for heads (arXiv:2309.14509, section 3.2).
- ulysses-all: 8 M/N (N-1)/N: spatial attention as well, as if the tokens were one sequence.
- ring: 2 M (N-1)/N: keys and values of temporal attention go round a ring (arXiv:2310.01889, section 3).
- megatron: 8 M (N-1)/N: every rank gathers all tokens, for its share of heads and of the MLP's hidden columns
  (arXiv:2205.05198, section 4.2.2). Cross-attention is not split: that would add 4 M (N-1)/N.

Backward sends the same, for ring twice that. Activation checkpointing repeats the exchanges of forward, which are all
inside the blocks. Every rank holds all weights; the mean of their gradients over ranks is the gradient.

Letters: B batch, T frames, S patches of a frame, D width, N ranks; R rows of independent attention, h heads,
n tokens of a row, d channels of a head.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from stdit.errors import UserError
from stdit.parallel.sequence.collectives import all_gather, all_to_all, reduce_scatter, ring_send
from stdit.parallel.sequence.group import Group
from stdit.parallel.sequence.sharding import ShardAxis, TokenSharding, even_sizes


class FrameSharding(TokenSharding):
    """Tokens that stay sharded along time from the first block to the last."""

    def switch(self, x: Tensor, source: ShardAxis, target: ShardAxis) -> Tensor:
        return x

    def per_frame(self, values: Tensor, shard: ShardAxis) -> Tensor:
        return super().per_frame(values, "time")

    def sizes(self, length: int, frames: int) -> list[int]:
        """Return each rank's share of an axis of ``length`` that has ``frames`` frames."""
        return [length // frames * share for share in self.frames_per_rank]

    @property
    def own(self) -> int:
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
    if method != "ring" and heads < ranks:
        raise UserError(
            f"{method} on {ranks} ranks, but the model has {heads} heads, and each rank needs one: use at most "
            f"{heads} ranks, or more model.num_heads"
        )
    if model.config.mlp_conv:
        raise UserError(
            f"{method} with model.mlp_conv: its temporal convolution needs frames of other ranks, which only DSP "
            "exchanges; leave mlp_conv out"
        )
    group = replace(
        sharding.group, chunks=1
    )  # nothing is exchanged between stages, so there is nothing to overlap
    staying = FrameSharding(group, sharding.frames, sharding.patches, sharding.patch_frames)
    BASELINES[method](model, staying)
    return staying


def blocks_sharded_along(axis: ShardAxis, model: Any) -> list[Any]:
    """Return the model's spatial blocks (time) or its temporal blocks (space)."""
    return [block for block in model.blocks if block.shard == axis]


def ulysses(model: Any, sharding: FrameSharding) -> None:
    """Let temporal attention see all frames, with a share of the heads; spatial attention is unchanged."""
    for block in blocks_sharded_along("space", model):
        block.attn.register_forward_pre_hook(partial(_own_angles, sharding))
        block.attn.attend = partial(_attend_with_own_heads, block.attn.attend, sharding, 2)


def ulysses_all(model: Any, sharding: FrameSharding) -> None:
    """Let every attention see all frames, with a share of the heads."""
    ulysses(model, sharding)
    for block in blocks_sharded_along("time", model):
        block.attn.attend = partial(_attend_with_own_heads, block.attn.attend, sharding, 0)


def ring(model: Any, sharding: FrameSharding) -> None:
    """Let keys and values of temporal attention go round the ranks."""
    for block in blocks_sharded_along("space", model):
        block.attn.register_forward_pre_hook(partial(_own_angles, sharding))
        block.attn.attend = partial(_RingAttention.apply, sharding.group, sharding.frames_per_rank)


def megatron(model: Any, sharding: FrameSharding) -> None:
    """Let self-attention and MLP see all tokens, with a share of the heads and of the hidden columns."""
    heads = even_sizes(model.config.num_heads, sharding.group.size)
    for block in model.blocks:
        frames_axis = 0 if block.shard == "time" else 1
        channels = [share * block.attn.qkv.in_features // block.attn.num_heads for share in heads]
        _split_columns(block.attn, block.attn.qkv, block.attn.proj, channels, sharding, frames_axis)
        block.attn.num_heads = heads[sharding.group.rank]
        columns = even_sizes(block.mlp.fc1.out_features, sharding.group.size)
        _split_columns(block.mlp, block.mlp.fc1, block.mlp.fc2, columns, sharding, 1)


BASELINES: dict[str, Callable[[Any, FrameSharding], None]] = {
    "ulysses": ulysses,
    "ulysses-all": ulysses_all,
    "ring": ring,
    "megatron": megatron,
}


def _own_angles(sharding: TokenSharding, _: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
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
    heads, sizes = even_sizes(q.shape[1], sharding.group.size), sharding.sizes(q.shape[axis], sharding.own)
    q, k, v = all_to_all(torch.stack([q, k, v]), sharding.group, 2, heads, axis + 1, sizes)
    return all_to_all(attend(q, k, v), sharding.group, axis, sizes, 1, heads)


class _RingAttention(torch.autograd.Function):
    """Attention ``[R h n d]`` of this rank's queries to the keys and values of all ranks, one rank's at a time.

    Results are combined by their log-sum-exp (arXiv:2310.01889, section 3); gradients are those of FlashAttention-2
    (arXiv:2307.08691, algorithm 2). Scores are computed in float32 or wider.
    """

    @staticmethod
    def forward(ctx: Any, group: Group, sizes: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv = torch.stack([k, v])
        scaled = _wide(q) * q.shape[-1] ** -0.5
        out, lse = torch.zeros_like(scaled), scaled.new_full((*q.shape[:-1], 1), -torch.inf)
        for part in _go_round(kv, group, sizes):
            keys, values = _wide(part)
            scores = scaled @ keys.mT  # [R h n m]
            joined = torch.logaddexp(lse, scores.logsumexp(-1, keepdim=True))
            out = out * (lse - joined).exp() + (scores - joined).exp() @ values
            lse = joined
        ctx.group, ctx.sizes = group, sizes
        ctx.save_for_backward(q, kv, out, lse)
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, kv, out, lse = ctx.saved_tensors
        group, scale = ctx.group, q.shape[-1] ** -0.5
        scaled, grad = _wide(q) * scale, _wide(grad)
        inner = (grad * out).sum(-1, keepdim=True)
        grad_q = torch.zeros_like(scaled)
        arriving: Callable[[], Tensor] | None = None
        for step, part in enumerate(_go_round(kv, group, ctx.sizes)):
            keys, values = _wide(part)
            weights = (scaled @ keys.mT - lse).exp()  # [R h n m]
            grad_scores = weights * (grad @ values.mT - inner)
            grad_q += grad_scores @ keys * scale
            grad_kv = torch.stack([grad_scores.mT @ scaled, weights.mT @ grad]).to(kv.dtype)
            if step == 0:
                own = grad_kv  # stays here until the others' sum has gone round
                continue
            if arriving is not None:
                grad_kv += arriving()
            arriving = ring_send(grad_kv, group, 3, ctx.sizes[(group.rank - step - 1) % group.size])
        if arriving is not None:
            own += arriving()
        return None, None, grad_q.to(q.dtype), own[0], own[1]


def _go_round(x: Tensor, group: Group, sizes: list[int]) -> Iterator[Tensor]:
    """Yield this rank's ``x [2 R h n d]``, then those of the previous ranks; the next is in transit meanwhile."""
    for step in range(1, group.size):
        arriving = ring_send(x, group, 3, sizes[(group.rank - step) % group.size])
        yield x
        x = arriving()
    yield x


def _wide(x: Tensor) -> Tensor:
    """Convert to float32, unless it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _split_columns(
    module: nn.Module, first: Any, last: Any, columns: list[int], sharding: FrameSharding, frames_axis: int
) -> None:
    """Let a module of two linear layers see all frames, with this rank's share of the hidden columns."""
    group = sharding.group
    first.forward = partial(_own_outputs, first, columns, group)
    last.forward = partial(_own_inputs, last, columns, group)

    def gather_frames(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = args
        return all_gather(x, group, frames_axis, sharding.sizes(x.shape[frames_axis], sharding.own)), *rest

    def scatter_sum(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return reduce_scatter(
            output, group, frames_axis, sharding.sizes(output.shape[frames_axis], sharding.frames)
        )

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
