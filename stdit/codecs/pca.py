"""Linear space-time codec: principal components of patches, fitted to a data set in seconds.

Letters: B batch, C components, T H W frames and pixels, T' H' W' and N patches, P = 3 st sh sw values of a patch.
"""

import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (diffusers looks for it here)
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stdit.codecs.base import WEIGHTS_FILE, VideoCodec
from stdit.codecs.config import CodecConfig
from stdit.errors import UserError

PATCHES_PER_CLIP = 256
"""Largest number of patches drawn from a clip: those of 1,024 clips determine 768 components well enough."""

ROWS_PER_PRODUCT = 4096
MIN_VARIANCE = 1e-6
"""Floor of `latent_variance`, whose mean is 1, so that nothing is divided by zero."""


class PCACodec(VideoCodec):
    """Project patches of `stride` pixels on principal components: z = (x - mean) basis^T / scale.

    One scale for all components keeps their relative variances; it makes the mean of `latent_variance` 1.
    Principal component analysis: Pearson 1901; Jolliffe, Principal Component Analysis, 2002, section 1.1.
    """

    name = "pca"
    independent_frames = True
    saved_with_runs = True
    mean: Tensor  # [P]
    basis: Tensor  # [C P], orthonormal rows, largest variance first
    scale: Tensor  # [], standard deviation of the projections, mean over components

    def __init__(
        self, stride: tuple[int, int, int] = (4, 8, 8), channels: int = 160, fit_clips: int = 1024
    ) -> None:
        """Make a codec; `fit` must be called before it can encode.

        Args:
            stride: pixels of a patch along time, height and width.
            channels: number of components.
            fit_clips: largest number of clips that `fit` reads.

        Raises:
            UserError: if the stride is below 1, or a patch has fewer values than ``channels``.
        """
        super().__init__()
        if len(stride) != 3 or min(stride) < 1:
            raise UserError(f"codec.stride is {list(stride)}, but it must be three numbers of at least 1")
        values = 3 * math.prod(stride)
        if not 1 <= channels <= values:
            raise UserError(
                f"codec.channels is {channels}, but a patch of {list(stride)} pixels has 3 x "
                f"{' x '.join(map(str, stride))} = {values} values: choose 1 to {values}"
            )
        self.stride, self.channels, self.fit_clips = (stride[0], stride[1], stride[2]), channels, fit_clips
        self.explained_variance: float | None = None
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("basis", torch.zeros(channels, values))
        self.register_buffer("scale", torch.ones(()))

    @classmethod
    def from_config(cls, config: CodecConfig) -> Self:
        """Make a new codec, or load the one saved at ``config.path``, with its own stride and channels."""
        if config.path is None:
            return cls(config.stride, config.channels, config.fit_clips)
        directory = Path(config.path).expanduser() / (config.subfolder or "")
        codec = cls.from_pretrained(directory)
        assert isinstance(codec, cls)
        return codec

    @property
    def fitted(self) -> bool:
        """Whether `fit` has run, or a fitted codec was loaded."""
        return self.latent_variance is not None

    @torch.no_grad()
    def fit(self, videos: Iterable[Tensor]) -> float:
        """Compute mean and components from at most `fit_clips` videos.

        Sums are in float64, and the sign of each component makes its largest value positive, so the same videos give
        the same codec.

        Args:
            videos: float [3 T H W] each, in [-1, 1], of any sizes.

        Returns:
            The share of the patches' variance that the kept components explain, in [0, 1].

        Raises:
            UserError: if there is no video, all pixels have one colour, or a value is not finite.
        """
        values = self.mean.numel()
        count = 0
        total = torch.zeros(values, dtype=torch.float64)
        products = torch.zeros(values, values, dtype=torch.float64)
        for rows in _join_blocks(self._sampled_patches(islice(videos, self.fit_clips))):
            count += len(rows)
            total += rows.sum(0)
            products += rows.T @ rows
        if count == 0:
            raise UserError("the pca codec got no video to fit to: check the data set")
        mean = total / count
        covariance = products / count - torch.outer(mean, mean)
        if not covariance.isfinite().all():
            raise UserError("the pca codec got pixels that are not finite: check the data set")
        if covariance.trace() < 1e-9 * values:
            raise UserError("the pca codec cannot be fitted to videos of a single colour: check the data set")

        variances, vectors = torch.linalg.eigh(covariance)  # ascending; columns are the components
        kept = variances.flip(0)[: self.channels].clamp(min=0)
        basis = vectors.T.flip(0)[: self.channels]
        largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
        scale = kept.mean().sqrt()
        self.mean.copy_(mean)
        self.basis.copy_(basis * largest.sign())
        self.scale.copy_(scale)
        self.latent_variance = (kept / scale**2).clamp(min=MIN_VARIANCE).to(self.mean)
        self.explained_variance = float(kept.sum() / covariance.trace())
        return self.explained_variance

    def _sampled_patches(self, videos: Iterable[Tensor]) -> Iterable[Tensor]:
        """Yield float64 [N P] for each video, N at most PATCHES_PER_CLIP."""
        for index, video in enumerate(videos):
            rows = self._patches(self.pad_video(video[None].detach().cpu().float())).flatten(0, 3)
            if len(rows) > PATCHES_PER_CLIP:
                generator = torch.Generator().manual_seed(index)
                rows = rows[torch.randperm(len(rows), generator=generator)[:PATCHES_PER_CLIP]]
            yield rows.double()

    def _patches(self, video: Tensor) -> Tensor:
        """Split a video [B 3 T H W] into patches [B T' H' W' P]."""
        st, sh, sw = self.stride
        return rearrange(video, "b c (t st) (h sh) (w sw) -> b t h w (c st sh sw)", st=st, sh=sh, sw=sw)

    def _encode(self, video: Tensor) -> Tensor:
        self._check_fitted()
        z = (self._patches(video).to(self.mean) - self.mean) @ (self.basis / self.scale).T
        return rearrange(z, "b t h w c -> b c t h w")

    def _decode(self, latents: Tensor) -> Tensor:
        self._check_fitted()
        st, sh, sw = self.stride
        x = rearrange(latents, "b c t h w -> b t h w c").to(self.mean) @ (self.basis * self.scale) + self.mean
        return rearrange(x, "b t h w (c st sh sw) -> b c (t st) (h sh) (w sw)", st=st, sh=sh, sw=sw)

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise UserError("the pca codec is not fitted: call fit(videos), or set codec.path to a saved one")

    def saved_settings(self) -> dict[str, Any]:
        explained = self.explained_variance
        return {"stride": list(self.stride), "channels": self.channels, "explained_variance": explained}

    def save(self, directory: Path) -> None:
        self._check_fitted()
        super().save(directory)

    @classmethod
    def load(cls, directory: Path, settings: dict[str, Any], dtype: torch.dtype | None) -> "PCACodec":
        """Load what `save` wrote; the weights stay in float32, ``dtype`` is ignored."""
        try:
            codec = cls(tuple(settings["stride"]), settings["channels"])
            codec.explained_variance = settings["explained_variance"]
            codec.latent_variance = torch.ones(codec.channels)
            codec.load_state_dict(load_file(directory / WEIGHTS_FILE))
        except (OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"the pca codec in {str(directory)!r} is damaged ({str(error).splitlines()[0]}): fit it "
                "again, or set another codec.path"
            ) from error
        return codec


def _join_blocks(blocks: Iterable[Tensor]) -> Iterable[Tensor]:
    """Join blocks of rows into blocks of at least ROWS_PER_PRODUCT rows, since large products are faster."""
    waiting: list[Tensor] = []
    for block in blocks:
        waiting.append(block)
        if sum(map(len, waiting)) >= ROWS_PER_PRODUCT:
            yield torch.cat(waiting)
            waiting = []
    if waiting:
        yield torch.cat(waiting)
