"""What an STDiT is made of. Kept apart from the model, so that reading a config imports no diffusers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stdit.errors import UserError

LARGEST = 10_000_000
"""More of anything is a slip of the keyboard."""


@dataclass
class STDiTConfig:
    """The defaults are Open-Sora v1.2's STDiT3-XL/2; presets lie in ``configs/models``."""

    depth: int = 28
    """Number of block pairs: so many spatial blocks, and as many temporal ones."""
    hidden_size: int = 1152
    """Width D of the tokens."""
    num_heads: int = 16
    """Attention heads; must divide the width into heads of an even size (rotary positions turn pairs)."""
    mlp_ratio: float = 4.0
    """Width of the MLP's hidden layer, as a multiple of D."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns of one token."""
    in_channels: int = 4
    """Channels of the latents; training sets it to what the codec gives."""
    pred_sigma: bool = True
    """Give twice as many output channels, the second half unused: Open-Sora's layout of the last layer."""
    caption_channels: int = 4096
    """Width E of the text encoder's states; training sets it to what the encoder gives."""
    model_max_length: int = 300
    """Most text tokens L that the null caption covers; training sets it to the encoder's limit."""
    qk_norm: bool = True
    """RMS-normalise queries and keys per head."""
    input_sq_size: int = 512
    """Edge in pixels of the square picture whose spatial positions are left unscaled."""
    block_order: Literal["alternate", "paired"] = "alternate"
    """alternate: S T S T (Open-Sora); paired: S T T S, which needs half the switches under DSP."""
    cross_attention: Literal["all", "spatial"] = "all"
    """Blocks that attend to the caption."""
    pooled_text: bool = False
    """Add the mean of the caption's states to the timestep embedding."""
    frame_positions: bool = False
    """Add sine-cosine positions of the frames: by rotary ones alone, frames of like content cannot be told apart."""
    mlp_conv: bool = False
    """Before each MLP, mix every token with its neighbours along the axes that the block attends over."""
    gate_init: float = 0.0
    """Value around which the gates of the residual branches start."""

    def __post_init__(self) -> None:
        for name in (
            "depth",
            "hidden_size",
            "num_heads",
            "in_channels",
            "caption_channels",
            "model_max_length",
        ):
            if not 1 <= getattr(self, name) <= LARGEST:
                raise UserError(f"model.{name} = {getattr(self, name)}: must be from 1 to {LARGEST:,}")
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
        if not 0 < self.mlp_ratio < math.inf:
            raise UserError(f"model.mlp_ratio = {self.mlp_ratio}: must be positive")

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.in_channels * (2 if self.pred_sigma else 1)


def token_grid(latent_shape: Sequence[int], patch_size: Sequence[int]) -> tuple[int, int]:
    """Frames of tokens, and tokens of a frame, of latents of (T, H, W), which are padded to whole patches."""
    frames, rows, columns = (
        math.ceil(size / patch) for size, patch in zip(latent_shape, patch_size, strict=True)
    )
    return frames, rows * columns
