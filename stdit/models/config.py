"""Settings of an STDiT. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from stdit.errors import UserError

SettingValue = bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str] | None
"""Of a field of `STDiTConfig`."""

Activations = Literal["keep", "recompute", "offload"]
"""What a block keeps for its backward pass: all activations, its input alone, or all of them in CPU memory."""

BLOCK_KINDS = {"S": "spatial", "T": "temporal", "J": "joint", "L": "linear"}
"""Letters of a pattern of blocks."""
_MAX_SIZE = 10_000_000
"""Larger sizes are typing errors."""


@dataclass
class STDiTConfig:
    """The defaults are Open-Sora v1.2's STDiT3-XL/2; presets lie in ``configs/models``."""

    depth: int = 28
    """Half the number of blocks: with the pattern S T, that of spatial blocks, and of temporal blocks."""
    hidden_size: int = 1152
    """Width D of the tokens."""
    num_heads: int = 16
    """Attention heads; the width must be a multiple of twice their number (rotary positions rotate pairs of
    channels)."""
    mlp_ratio: float = 4.0
    """Width of the MLP's hidden layer, as a multiple of D."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns of one token."""
    in_channels: int = 4
    """Channels of the latents; training takes them from the codec."""
    pred_sigma: bool = True
    """Twice as many output channels, of which the second half is unused, as in Open-Sora's last layer."""
    caption_channels: int = 4096
    """Width E of the text states; training takes it from the text encoder."""
    model_max_length: int = 300
    """Length L of the null caption in tokens; training takes it from the text encoder."""
    qk_norm: bool = True
    """RMS-normalise queries and keys per head."""
    input_sq_size: int = 512
    """Edge in pixels of the square picture whose spatial positions are not scaled."""
    blocks: str = "S T"
    """Pattern of the blocks, repeated up to their number: S attends among the patches of each frame, T among the
    frames of each patch, J among all tokens, L among all tokens by linear attention, whose time grows with their
    number alone. S T is Open-Sora's; S T T S needs half of the all-to-alls of DSP."""
    linear_causal: bool = False
    """L blocks see no later frames, as a sampler needs that makes one frame after another."""
    cross_attention: Literal["all", "spatial"] = "all"
    """Blocks that attend to the caption; spatial: all but the temporal ones."""
    pooled_text: bool = False
    """Add the mean of the caption's states to the timestep embedding."""
    frame_positions: bool = False
    """Add sine-cosine positions of the frames: with rotary ones alone, frames of equal content look the same."""
    mlp_conv: bool = False
    """Before each MLP, a depthwise convolution over neighbours along the axes that the block attends over."""
    gate_init: float = 0.0
    """Mean of the initial gates of the residual branches."""
    guidance_range: tuple[float, float] | None = None
    """Guidance scales that the model takes as an input, so that a guided step is one call; training takes it from
    distill.guidance_scale. None: it takes none."""

    @classmethod
    def read(cls, recorded: Mapping[str, Any]) -> Self:
        """Read the settings among the entries of a config, such as that of a saved model."""
        recorded = with_current_names(recorded)
        return cls(**{f.name: recorded[f.name] for f in fields(cls) if f.name in recorded})

    def __post_init__(self) -> None:
        written, letters = self.blocks, "".join(self.blocks.split())
        repeats = (letters[:length] for length in range(1, len(letters)) if len(letters) % length == 0)
        self.blocks = " ".join(
            next((part for part in repeats if part * (len(letters) // len(part)) == letters), letters)
        )
        if not letters or (unknown := sorted(set(letters) - set(BLOCK_KINDS))):
            kinds = ", ".join(f"{letter} ({kind})" for letter, kind in BLOCK_KINDS.items())
            what = f"{unknown[0]!r} is no kind of block" if letters else "it names no block"
            raise UserError(
                f"model.blocks = {written!r}: {what}: write a pattern of {kinds}, in capitals, such as S T"
            )
        for name in (
            "depth",
            "hidden_size",
            "num_heads",
            "in_channels",
            "caption_channels",
            "model_max_length",
        ):
            if not 1 <= getattr(self, name) <= _MAX_SIZE:
                raise UserError(f"model.{name} = {getattr(self, name)}: must be from 1 to {_MAX_SIZE:,}")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise UserError(
                f"model.patch_size = {self.patch_size}: must be three sizes (frames, rows, columns), each at least 1"
            )
        self.patch_size = (self.patch_size[0], self.patch_size[1], self.patch_size[2])
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            fitting = [n for n in range(1, self.hidden_size + 1) if self.hidden_size % (2 * n) == 0]
            nearest = min(fitting, key=lambda n: abs(n - self.num_heads), default=None)
            raise UserError(
                f"model.num_heads = {self.num_heads}: must divide model.hidden_size = {self.hidden_size} into heads "
                f"of an even size; " + (f"use {nearest}" if nearest else "use an even hidden_size")
            )
        if self.hidden_size % 4:
            raise UserError(
                f"model.hidden_size = {self.hidden_size}: must be a multiple of 4 (sines and cosines of rows and "
                f"columns); use {self.hidden_size + 4 - self.hidden_size % 4}"
            )
        if self.guidance_range is not None:
            low, high = self.guidance_range
            self.guidance_range = (low, high)
        if not 0 < self.mlp_ratio < math.inf:
            raise UserError(f"model.mlp_ratio = {self.mlp_ratio}: must be positive")

    @property
    def kinds(self) -> str:
        """Letters of all blocks, in the order in which they run."""
        pattern = self.blocks.replace(" ", "")
        return (pattern * (2 * self.depth))[: 2 * self.depth]

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.in_channels * (2 if self.pred_sigma else 1)


def with_current_names(recorded: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return recorded settings with ``blocks`` instead of ``block_order``, which it was before.

    Args:
        prefix: of the names.

    Raises:
        UserError: if it is none of the orders that there were.
    """
    found = dict(recorded)
    if (order := found.pop(f"{prefix}block_order", None)) is not None:
        patterns = {"alternate": "S T", "paired": "S T T S"}
        if order not in patterns:
            raise UserError(f"{prefix}block_order = {order!r}: must be one of {', '.join(patterns)}")
        found[f"{prefix}blocks"] = patterns[order]
    return found


def token_grid(latent_shape: Sequence[int], patch_size: Sequence[int]) -> tuple[int, int]:
    """Return frames of tokens, and tokens per frame, of latents of (T, H, W) padded to whole patches."""
    frames, rows, columns = (
        math.ceil(size / patch) for size, patch in zip(latent_shape, patch_size, strict=True)
    )
    return frames, rows * columns
