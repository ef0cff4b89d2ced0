"""Embeddings of positions, timesteps and captions.

Letters: B batch, C channels, T frames, H height, W width, S = H*W patches, D width, L text tokens, E text width.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from stdit.parallel.sequence.layouts import Span


def inverse_frequencies(dim: int, base: float, device: torch.device) -> Tensor:
    """Return ``base^(-2i / dim)`` for i < dim / 2, in float32.

    At a timestep near 1000 the last bit of a frequency changes the angle by 1e-4, so this rounds as the code that the
    released models were trained with: a float32 exponent, then its exponential.
    """
    exponent = -math.log(base) * torch.arange(dim // 2, device=device, dtype=torch.float32) / (dim // 2)
    return exponent.exp()


def sincos(position: Tensor, dim: int, base: float = 10000.0) -> Tensor:
    """Return all sines, then all cosines, of ``position [...]`` at ``dim / 2`` frequencies -> ``[..., dim]``.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.5, with the two halves not interleaved.
    """
    angle = position[..., None].float() * inverse_frequencies(dim, base, position.device)  # [... dim/2]
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def spatial_positions(rows: int, columns: int, dim: int, area: Tensor, input_sq_size: int) -> Tensor:
    """Return 2-D sine-cosine positions of a grid of patches -> ``[B S dim]``; the column in the first half.

    The grid is stretched to the square with as many patches and divided by the picture's edge, so that positions of
    one trained size transfer to others (Open-Sora v1.2).

    Args:
        area: height * width of the video in pixels, ``[B]``.
        input_sq_size: edge in pixels of the picture whose positions are not scaled.
    """
    edge = round((rows * columns) ** 0.5)
    scale = area.float().sqrt() / input_sq_size  # [B]
    column = torch.arange(columns, device=area.device) * (edge / columns) / scale[:, None]  # [B W]
    row = torch.arange(rows, device=area.device) * (edge / rows) / scale[:, None]  # [B H]
    column = sincos(column, dim // 2)[:, None].expand(-1, rows, -1, -1)
    row = sincos(row, dim // 2)[:, :, None].expand(-1, -1, columns, -1)
    return rearrange(torch.cat([column, row], dim=-1), "B H W D -> B (H W) D")


def rotary_angles(frames: int, dim: int, device: torch.device, base: float = 10000.0) -> Tensor:
    """Return the angles of rotary positions -> ``[T dim/2]`` (Su et al. 2021, arXiv:2104.09864, equation 15)."""
    return torch.arange(frames, device=device)[:, None] * inverse_frequencies(dim, base, device)


def joint_angles(frames: Span, patches: Span, columns: int, dim: int, device: torch.device) -> Tensor:
    """Return the angles of rotary positions in three axes, for some frames and patches -> ``[T S dim/2]``.

    A third of the pairs of channels is for rows, a third for columns, and the rest for frames.
    """
    pairs = dim // 6
    patch = torch.arange(patches.begin, patches.end, device=device)
    frame = torch.arange(frames.begin, frames.end, device=device)
    axes = (
        frame[:, None, None] * inverse_frequencies(dim - 4 * pairs, 10000.0, device),
        (patch // columns)[None, :, None] * inverse_frequencies(2 * pairs, 10000.0, device),
        (patch % columns)[None, :, None] * inverse_frequencies(2 * pairs, 10000.0, device),
    )
    return torch.cat([angles.expand(len(frame), len(patch), -1) for angles in axes], -1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate each adjacent pair of channels of ``x [... T dim]`` by ``angles [T dim/2]``."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class PatchProjection(nn.Conv3d):
    """A convolution over patches that do not overlap, as one matrix product: ``[B C T H W] -> [B D T' H' W']``."""

    def forward(self, x: Tensor) -> Tensor:
        pt, ph, pw = self.stride
        patches = rearrange(x, "B C (T pt) (H ph) (W pw) -> B T H W (C pt ph pw)", pt=pt, ph=ph, pw=pw)
        out: Tensor = nn.functional.linear(patches, self.weight.flatten(1), self.bias)
        return out.permute(0, 4, 1, 2, 3)


class PatchEmbed3D(nn.Module):
    """Embed patches of latent frames, rows and columns linearly: ``[B C T H W] -> [B T' S D]``."""

    def __init__(self, patch_size: tuple[int, int, int], in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = PatchProjection(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = rearrange(self.proj(x), "B D T H W -> B T (H W) D")
        return out


class ScalarEmbedder(nn.Module):
    """Embed a scalar (timestep, frames per second): cosines and sines, then an MLP; ``[...] -> [... D]``."""

    def __init__(self, dim: int, frequency_dim: int = 256) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, scalar: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Embed in the precision that the model computes in, which may not be that of its stored weights."""
        waves = sincos(scalar, self.frequency_dim)
        waves = waves.roll(self.frequency_dim // 2, dims=-1)  # cosines first, as in DiT
        embedded: Tensor = self.mlp(waves.to(dtype))
        return embedded


class Mlp(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim_in, dim_hidden)
        self.fc2 = nn.Linear(dim_hidden, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))
        return out


class CaptionEmbedder(nn.Module):
    """Project text states ``[B L E]`` to the model's width; has the learned null caption of classifier-free
    guidance."""

    def __init__(self, caption_channels: int, dim: int, max_length: int) -> None:
        super().__init__()
        self.y_proj = Mlp(caption_channels, dim, dim)
        self.y_embedding = nn.Parameter(torch.empty(max_length, caption_channels))

    def forward(self, states: Tensor, drop: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Project ``[B L E] -> [B L D]``; where ``drop [B]`` is true, the null caption instead.

        Returns:
            that; and with ``drop`` the null caption's states ``[L E]``: an offloaded weight has no values outside
            ``forward``.
        """
        y: Tensor = self.y_proj(states)
        if drop is None:
            return y, None
        null = self.y_embedding[: states.shape[1]].to(states.dtype)
        return torch.where(drop[:, None, None], self.y_proj(null), y), null
