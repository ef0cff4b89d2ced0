"""The blocks of an STDiT, by which of a video's tokens attend to each other.

Letters: B batch, T frames of tokens, S tokens of a frame, D width, L text tokens, F frames of the modulation (T, or 1
where all frames share one timestep), H rows and W columns of patches; T_n and S_n are one rank's share.
"""

from functools import partial
from typing import ClassVar, NamedTuple

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad

from stdit.models.attention import CrossAttention, LinearAttention, SelfAttention
from stdit.models.broadcast import Output, compute
from stdit.models.config import Activations, STDiTConfig
from stdit.models.embeddings import Mlp
from stdit.parallel.sequence.layouts import Span, Tokens
from stdit.parallel.sequence.sharding import TokenShard


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters, then ``x * (1 + scale) + shift`` (Peebles & Xie 2023, arXiv:2212.09748)."""
    return torch.addcmul(shift, layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class TokenGrid(NamedTuple):
    """Positions of the tokens that a block gets, and what it has from other ranks and from earlier steps."""

    columns: int
    """Patches in a row of a frame."""
    angles: Tensor
    """Rotary angles: of frames, ``[T dim/2]``, or of frames, rows and columns, ``[T_n S_n dim/2]``, for blocks that
    attend over both."""
    shard: TokenShard | None = None
    """The other ranks, if some of the tokens that the block sees are there."""
    output: Output = compute
    """Calls the parts of the block, or returns what they gave in an earlier step."""


class STDiTBlock(nn.Module):
    """Self-attention, cross-attention and MLP on ``[B T S D]``.

    A subclass defines which tokens attend to each other; everything else acts on each token by itself, so a block
    also runs on a part of the tensor. Each has a ``forward`` of its own, since torch.compile counts how often the
    same code is compiled again.
    """

    kind: ClassVar[str]
    """Letter in ``model.blocks``."""
    activations: Activations = "keep"

    def __init__(
        self, config: STDiTConfig, cross_attention: bool, conv: type[nn.Conv1d | nn.Conv2d | nn.Conv3d]
    ) -> None:
        super().__init__()
        dim = config.hidden_size
        self.attn: nn.Module = SelfAttention(dim, config.num_heads, config.qk_norm)
        self.cross_attn = CrossAttention(dim, config.num_heads) if cross_attention else None
        self.mlp_conv = conv(dim, dim, 3, padding=1, groups=dim, bias=False) if config.mlp_conv else None
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), dim)
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim))

    def self_attention(self, x: Tensor, grid: TokenGrid) -> Tensor:
        raise NotImplementedError

    def convolve_neighbours(self, x: Tensor, grid: TokenGrid) -> Tensor:
        """Add a depthwise convolution over the neighbours of each token, if the model has one."""
        raise NotImplementedError

    def forward(
        self, hidden_states: Tensor, y: Tensor, y_mask: Tensor | None, modulation: Tensor, grid: TokenGrid
    ) -> Tensor:
        """One block (PixArt-alpha, figure 4) on tokens ``[B T S D]``.

        Args:
            y: caption ``[B L D]``.
            modulation: ``[B F 6 D]``.
        """
        x, cross = hidden_states, self.cross_attn
        table = (self.scale_shift_table + modulation).to(x.dtype)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = table[:, :, :, None].unbind(2)  # each [B F 1 D]

        def attention() -> Tensor:
            return self.self_attention(modulate(x, shift_a, scale_a), grid)

        def cross_attention(cross: nn.Module) -> Tensor:
            out: Tensor = cross(x.flatten(1, 2), y, y_mask)
            return out.view_as(x)

        def mlp() -> Tensor:
            out: Tensor = self.mlp(self.convolve_neighbours(modulate(x, shift_m, scale_m), grid))
            return out

        x = torch.addcmul(x, gate_a, grid.output("attention", attention))
        if cross is not None:
            x = x + grid.output("cross", partial(cross_attention, cross))
        return torch.addcmul(x, gate_m, grid.output("mlp", mlp))


class SpatialBlock(STDiTBlock):
    """Attention among the patches of each frame."""

    kind = "S"

    def __init__(self, config: STDiTConfig, cross_attention: bool = True) -> None:
        super().__init__(config, cross_attention, nn.Conv2d)

    def forward(
        self, hidden_states: Tensor, y: Tensor, y_mask: Tensor | None, modulation: Tensor, grid: TokenGrid
    ) -> Tensor:
        return super().forward(hidden_states, y, y_mask, modulation, grid)

    def self_attention(self, x: Tensor, grid: TokenGrid) -> Tensor:
        rows = rearrange(x, "B T S D -> (B T) S D")
        attended: Tensor = self.attn(rows, shard=grid.shard)
        return rearrange(attended, "(B T) S D -> B T S D", B=x.shape[0])

    def convolve_neighbours(self, x: Tensor, grid: TokenGrid) -> Tensor:
        if self.mlp_conv is None:
            return x
        wide, place = with_neighbours(x, grid, frames=0)
        frames = rearrange(wide, "B T (H W) D -> (B T) D H W", W=grid.columns)
        mixed: Tensor = self.mlp_conv(frames)
        return x + rearrange(mixed, "(B T) D H W -> B T (H W) D", B=x.shape[0])[place]


class TemporalBlock(STDiTBlock):
    """Attention among the frames of each patch, with rotary positions."""

    kind = "T"

    def __init__(self, config: STDiTConfig, cross_attention: bool = True) -> None:
        super().__init__(config, cross_attention, nn.Conv1d)

    def forward(
        self, hidden_states: Tensor, y: Tensor, y_mask: Tensor | None, modulation: Tensor, grid: TokenGrid
    ) -> Tensor:
        return super().forward(hidden_states, y, y_mask, modulation, grid)

    def self_attention(self, x: Tensor, grid: TokenGrid) -> Tensor:
        x = x if grid.shard is None else grid.shard.gather_frames(x)
        # Contiguous: else PyTorch multiplies by a copy of each weight for every row, if the weight is frozen.
        rows = rearrange(x, "B T S D -> (B S) T D").contiguous()
        attended: Tensor = self.attn(rows, grid.angles)
        attended = rearrange(attended, "(B S) T D -> B T S D", B=x.shape[0])
        return attended if grid.shard is None else grid.shard.return_frames(attended)

    def convolve_neighbours(self, x: Tensor, grid: TokenGrid) -> Tensor:
        if self.mlp_conv is None:
            return x
        lines = rearrange(x, "B T S D -> (B S) D T")
        mixed: Tensor = self.mlp_conv(lines)
        return x + rearrange(mixed, "(B S) D T -> B T S D", B=x.shape[0])


class JointBlock(STDiTBlock):
    """Attention among all tokens, with rotary positions of frames, rows and columns."""

    kind = "J"

    def __init__(self, config: STDiTConfig, cross_attention: bool = True) -> None:
        super().__init__(config, cross_attention, nn.Conv3d)

    def forward(
        self, hidden_states: Tensor, y: Tensor, y_mask: Tensor | None, modulation: Tensor, grid: TokenGrid
    ) -> Tensor:
        return super().forward(hidden_states, y, y_mask, modulation, grid)

    def self_attention(self, x: Tensor, grid: TokenGrid) -> Tensor:
        attended: Tensor = self.attn(x.flatten(1, 2), grid.angles.flatten(0, 1), grid.shard)
        return attended.view_as(x)

    def convolve_neighbours(self, x: Tensor, grid: TokenGrid) -> Tensor:
        if self.mlp_conv is None:
            return x
        wide, place = with_neighbours(x, grid, frames=1)
        mixed: Tensor = self.mlp_conv(rearrange(wide, "B T (H W) D -> B D T H W", W=grid.columns))
        return x + rearrange(mixed, "B D T H W -> B T (H W) D")[place]


class LinearBlock(JointBlock):
    """Linear attention among all tokens, or with ``linear_causal`` among those of no later frame."""

    kind = "L"

    def __init__(self, config: STDiTConfig, cross_attention: bool = True) -> None:
        super().__init__(config, cross_attention)
        self.attn = LinearAttention(
            config.hidden_size, config.num_heads, config.qk_norm, config.linear_causal
        )

    def forward(
        self, hidden_states: Tensor, y: Tensor, y_mask: Tensor | None, modulation: Tensor, grid: TokenGrid
    ) -> Tensor:
        return super().forward(hidden_states, y, y_mask, modulation, grid)

    def self_attention(self, x: Tensor, grid: TokenGrid) -> Tensor:
        attended: Tensor = self.attn(x, grid.angles, grid.shard)
        return attended


def with_neighbours(x: Tensor, grid: TokenGrid, frames: int) -> tuple[Tensor, tuple[slice, ...]]:
    """Return the tokens ``[B T S D]`` among their neighbours on other ranks, and the index of the former in it.

    The patches are made up to whole rows of a frame by zeros, which no convolution over neighbours sees.

    Args:
        frames: how many earlier and later frames count.
    """
    if grid.shard is None:
        return x, ()
    if torch.is_autocast_enabled(x.device.type):  # to which the convolution would cast it
        x = x.to(torch.get_autocast_dtype(x.device.type))
    wide, tokens = grid.shard.with_neighbours(x, frames, grid.columns + 1)
    begin, end = tokens.patches
    before = begin % grid.columns
    # A convolution needs a row and a frame, even where it returns nothing of them.
    after = -end % grid.columns if end - begin + before else grid.columns
    later = 0 if tokens.frames.size else 1
    whole = Tokens(tokens.frames, Span(begin - before, end + after))
    return pad(wide, (0, 0, before, after, 0, later)), grid.shard.tokens.within(whole)


BLOCK_CLASSES: dict[str, type[STDiTBlock]] = {
    block_class.kind: block_class for block_class in (SpatialBlock, TemporalBlock, JointBlock, LinearBlock)
}
for block_class in BLOCK_CLASSES.values():  # not by register(), which imports all models of diffusers
    TransformerBlockRegistry._registry[block_class] = TransformerBlockMetadata(
        return_hidden_states_index=0, _cls=block_class
    )


class FinalLayer(nn.Module):
    """Modulated norm and a linear map from tokens to the values of their patch; ``t [B F D]``."""

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_features)
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + t[:, :, None]).to(x.dtype)[:, :, :, None].unbind(2)
        out: Tensor = self.linear(modulate(x, shift, scale))
        return out
