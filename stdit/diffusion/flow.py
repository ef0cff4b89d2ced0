"""Rectified flow: the straight path between noise and data, its timesteps, its loss, its sampling schedule.

Symbols: x data, eps noise, t noise level (0 data, 1 noise), x_t = (1 - t) x + t eps, v = x - eps the velocity from
noise to data (Liu et al. 2022, arXiv:2209.03003, equation 1; Open-Sora's sign). timestep = 1000 t.

Letters: B batch, C channels, T latent frames, H, W latent rows and columns, F = T or 1 (one level for all frames).
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from stdit.diffusion.config import FlowConfig
from stdit.errors import UserError

SMALLEST_T = (
    0.02  # a sample prediction is divided by t; below this level the division only amplifies rounding
)


def per_frame(t: Tensor) -> Tensor:
    """``[B F] -> [B 1 F 1 1]``, to stand beside latents ``[B C T H W]``."""
    return t[:, None, :, None, None]


def shift_levels(t: Tensor, r: float) -> Tensor:
    """``t -> r t / (1 + (r - 1) t)`` (Esser et al. 2024, arXiv:2403.03206, equation 23)."""
    return r * t / (1 + (r - 1) * t)


def frame_weights(condition_mask: Tensor) -> Tensor:
    """Weights of the frames in the loss: alike for those that are not in ``condition_mask [B T]``, with sum 1."""
    free = (~condition_mask).float()
    return free / free.sum(1, keepdim=True)


class RectifiedFlow:
    """The objective and the sampling schedule; no weights.

    Args:
        config: see :class:`stdit.diffusion.config.FlowConfig`.
        latent_variance: variance of each latent channel ``[C]``, needed by the "residual" prediction.
    """

    def __init__(self, config: FlowConfig, latent_variance: Tensor | None = None) -> None:
        if config.prediction == "residual" and latent_variance is None:
            raise UserError(
                "flow.prediction = residual needs a codec that states the variance of its latents: use codec.name = "
                "pca, or flow.prediction = velocity"
            )
        self.config = config
        self.latent_variance = latent_variance
        self._read: Callable[[Tensor, Tensor, Tensor], Tensor] = {
            "velocity": self._from_velocity,
            "sample": self._from_sample,
            "residual": self._from_residual,
        }[config.prediction]

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t = (1 - t) x + t eps`` for ``x, noise [B C T H W]`` and ``t [B F]``."""
        return torch.lerp(x, noise, per_frame(t).to(x.dtype))

    def scale_model_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """What the model sees: ``x_t`` itself, or for "residual" each channel scaled to variance 1."""
        if self.config.prediction != "residual":
            return x_t
        return x_t * self._variance(t).rsqrt().to(x_t.dtype)

    def velocity(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Velocity ``[B C T H W]`` that the output of the model stands for, at ``x_t`` and ``t [B F]``.

        Surplus output channels (Open-Sora's unused sigma) are cut off.
        """
        return self._read(model_output[:, : x_t.shape[1]], x_t, t)

    def _from_velocity(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return output

    def _from_sample(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return (output - x_t) / per_frame(t.clamp(min=SMALLEST_T)).to(x_t.dtype)

    def _from_residual(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Linear minimum-mean-square estimate of v from x_t, plus the output in units of its remaining error.

        With independent channels of variance lambda and D = (1 - t)^2 lambda + t^2, E[v | x_t] is
        ((1 - t) lambda - t) / D x_t, and the error left is sqrt(lambda / D) (Wiener; the scaling in the manner of
        Karras et al. 2022, arXiv:2206.00364, table 1).
        """
        level, variance = per_frame(t), self._variance(t)
        linear = ((1 - level) * self._lambda(t) - level) / variance
        spread = (self._lambda(t) / variance).sqrt()
        return linear.to(x_t.dtype) * x_t + spread.to(x_t.dtype) * output

    def _lambda(self, t: Tensor) -> Tensor:
        assert self.latent_variance is not None
        return self.latent_variance.to(t.device, t.dtype)[None, :, None, None, None]

    def _variance(self, t: Tensor) -> Tensor:
        """Variance D of ``x_t``, ``[B C F 1 1]``."""
        return (1 - per_frame(t)) ** 2 * self._lambda(t) + per_frame(t) ** 2

    def loss(
        self, model_output: Tensor, x: Tensor, noise: Tensor, x_t: Tensor, t: Tensor, weight: Tensor
    ) -> Tensor:
        """Mean squared error of the velocity, averaged over frames by ``weight``, for each sample -> ``[B]``.

        Frames may be left out on all arguments alike: the losses of the parts add up to that of the whole.

        Args:
            t: noise levels ``[B F]``.
            weight: of each frame, ``[B T]``: see :func:`frame_weights`.
        """
        error = self.velocity(model_output, x_t, t) - (x - noise)
        return (error.square().mean(dim=(1, 3, 4)) * weight).sum(1)

    def size_shift(self, latent_frames: int, height: int, width: int) -> float:
        """The shift r for a video of this length (latent frames) and size (pixels)."""
        if not self.config.shift_by_size:
            return self.config.shift
        return self.config.shift * (height * width / 512**2) ** 0.5 * latent_frames**0.5

    def sample_level(self, generator: Generator, latent_frames: int, height: int, width: int) -> Tensor:
        """Draw one noise level t in (0, 1), shifted by size and length."""
        if self.config.timestep_sampling == "uniform":
            t = torch.rand((), generator=generator)
        else:
            normal = torch.randn((), generator=generator)
            t = torch.sigmoid(self.config.logit_mean + self.config.logit_std * normal)
        return shift_levels(t, self.size_shift(latent_frames, height, width))

    def level_at(self, quantile: float, latent_frames: int, height: int, width: int) -> Tensor:
        """The noise level below which `sample_level` draws so large a share."""
        t = torch.tensor(quantile)
        if self.config.timestep_sampling == "logit_normal":
            t = torch.sigmoid(self.config.logit_mean + self.config.logit_std * torch.special.ndtri(t))
        return shift_levels(t, self.size_shift(latent_frames, height, width))

    def sigmas(
        self,
        num_inference_steps: int,
        latent_frames: int,
        height: int,
        width: int,
        shift: float | None = None,
    ) -> Tensor:
        """Noise levels of a sampling run, ``[steps + 1]``, from 1 (noise) to 0 (data).

        ``shift`` replaces the shift that follows from size and length.
        """
        r = self.size_shift(latent_frames, height, width) if shift is None else shift
        levels = shift_levels(torch.linspace(1, 0, num_inference_steps + 1), r)
        levels[0] = 1  # which rounding may miss
        return levels

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write ``scheduler_config.json``; takes and needs none of the options that diffusers gives components."""
        variance = None if self.latent_variance is None else self.latent_variance.tolist()
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            {"_class_name": "RectifiedFlow", **asdict(self.config), "latent_variance": variance}
        )
        (Path(folder) / "scheduler_config.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: Any) -> "RectifiedFlow":
        """Read what :meth:`save_pretrained` wrote."""
        settings = json.loads((Path(folder) / "scheduler_config.json").read_text(encoding="utf-8"))
        settings.pop("_class_name")
        variance = settings.pop("latent_variance")
        return cls(FlowConfig(**settings), None if variance is None else torch.tensor(variance))
