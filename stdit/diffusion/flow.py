"""The objective of rectified flow: the straight path between noise and data, its noise levels, and its loss.

Symbols: x data, eps noise, t noise level (0 data, 1 noise), x_t = (1 - t) x + t eps, v = x - eps the velocity from
noise to data (Liu et al. 2022, arXiv:2209.03003, equation 1; Open-Sora's sign). timestep = 1000 t.

Letters: B batch, C channels, T latent frames, H, W latent rows and columns, F = T or 1 (one noise level for all
frames).
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from stdit.diffusion.config import PREDICTIONS, FlowConfig
from stdit.errors import UserError

MIN_T = 0.02
"""A sample prediction is divided by t; below this noise level the division only amplifies rounding errors."""


def per_frame(t: Tensor) -> Tensor:
    """``[B F] -> [B 1 F 1 1]``, which broadcasts with latents ``[B C T H W]``."""
    return t[:, None, :, None, None]


def shift_t(t: Tensor, r: float) -> Tensor:
    """``t -> r t / (1 + (r - 1) t)`` (Esser et al. 2024, arXiv:2403.03206, equation 23)."""
    return r * t / (1 + (r - 1) * t)


def frame_loss(found: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return the mean squared error of ``[B C T H W]``, weighted over frames by ``weight [B T]``, per sample ``[B]``.

    All arguments may hold the same part of the frames: the losses of the parts add up to that of the whole.
    """
    return ((found - target).square().mean(dim=(1, 3, 4)) * weight).sum(1)


def frame_weights(condition_mask: Tensor) -> Tensor:
    """Return the weights of frames in the loss: equal for all outside ``condition_mask [B T]``, with sum 1."""
    generated = (~condition_mask).float()
    return generated / generated.sum(1, keepdim=True)


class FlowObjective:
    """What the model learns, and the meaning of its output; no weights.

    Args:
        config: see :class:`stdit.diffusion.config.FlowConfig`.
        latent_variance: variance of each latent channel ``[C]``, needed by the "residual" prediction.
    """

    def __init__(self, config: FlowConfig, latent_variance: Tensor | None = None) -> None:
        if config.prediction == "residual" and latent_variance is None:
            raise UserError(
                "flow.prediction = residual needs a codec that knows the variance of its latents: use codec.name = "
                "pca or tiny, or flow.prediction = velocity"
            )
        self.config = config
        self.latent_variance = latent_variance
        self._to_velocity: Prediction = PREDICTIONS.get(config.prediction)

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t = (1 - t) x + t eps`` for ``x, noise [B C T H W]`` and ``t [B F]``."""
        return torch.lerp(x, noise, per_frame(t).to(x.dtype))

    def scale_model_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the input of the model: ``x_t``, or for "residual" each channel scaled to variance 1."""
        if self.config.prediction != "residual":
            return x_t
        return x_t * self.variance(t).rsqrt().to(x_t.dtype)

    def velocity(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Convert the model's output to the velocity ``[B C T H W]``, at ``x_t`` and ``t [B F]``.

        Surplus output channels (Open-Sora's unused sigma) are cut off.
        """
        return self._to_velocity(self, model_output[:, : x_t.shape[1]], x_t, t)

    def data_variance(self, t: Tensor) -> Tensor:
        """Return the variance lambda of the latents, ``[1 C 1 1 1]``, in the dtype and on the device of ``t``."""
        assert self.latent_variance is not None
        return self.latent_variance.to(t.device, t.dtype)[None, :, None, None, None]

    def variance(self, t: Tensor) -> Tensor:
        """Return the variance D of ``x_t``, ``[B C F 1 1]``."""
        return (1 - per_frame(t)) ** 2 * self.data_variance(t) + per_frame(t) ** 2

    def loss(self, model_output: Tensor, target: Tensor, x_t: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        """Return the `frame_loss` of the velocity for each sample -> ``[B]``.

        Args:
            target: the velocity ``[B C T H W]``: that of the data, ``x - eps``, or that of a teacher.
            t: noise levels ``[B F]``.
            weight: of each frame, ``[B T]``: see :func:`frame_weights`.
        """
        return frame_loss(self.velocity(model_output, x_t, t), target, weight)

    def size_shift(self, latent_frames: int, height: int, width: int) -> float:
        """Return the shift r for a video of this length (latent frames) and size (pixels)."""
        if not self.config.shift_by_size:
            return self.config.shift
        shift: float = self.config.shift * (height * width / 512**2) ** 0.5 * latent_frames**0.5
        return shift

    def sample_t(self, generator: Generator, latent_frames: int, height: int, width: int) -> Tensor:
        """Draw one noise level t in (0, 1), shifted by size and length."""
        if self.config.timestep_sampling == "uniform":
            t = torch.rand((), generator=generator)
        else:
            normal = torch.randn((), generator=generator)
            t = torch.sigmoid(self.config.logit_mean + self.config.logit_std * normal)
        return shift_t(t, self.size_shift(latent_frames, height, width))

    def t_at_quantile(self, quantile: float, latent_frames: int, height: int, width: int) -> Tensor:
        """Return the noise level t below which `sample_t` draws a share ``quantile`` of its values."""
        t = torch.tensor(quantile)
        if self.config.timestep_sampling == "logit_normal":
            t = torch.sigmoid(self.config.logit_mean + self.config.logit_std * torch.special.ndtri(t))
        return shift_t(t, self.size_shift(latent_frames, height, width))


def velocity_from_velocity(flow: FlowObjective, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Prediction "velocity": the output itself."""
    return output


def velocity_from_sample(flow: FlowObjective, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Prediction "sample": ``v = (x - x_t) / t``, the output being x."""
    return (output - x_t) / per_frame(t.clamp(min=MIN_T)).to(x_t.dtype)


def velocity_from_residual(flow: FlowObjective, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Prediction "residual": the linear estimate of v from x_t, plus the output in units of its remaining error.

    With independent channels of variance lambda and D = (1 - t)^2 lambda + t^2, the linear minimum-mean-square
    estimate E[v | x_t] is ((1 - t) lambda - t) / D x_t, and its error has the standard deviation sqrt(lambda / D)
    (Wiener; the scaling follows Karras et al. 2022, arXiv:2206.00364, table 1).
    """
    frame_t, variance = per_frame(t), flow.variance(t)
    linear = ((1 - frame_t) * flow.data_variance(t) - frame_t) / variance
    error = (flow.data_variance(t) / variance).sqrt()
    return linear.to(x_t.dtype) * x_t + error.to(x_t.dtype) * output


Prediction = Callable[[FlowObjective, Tensor, Tensor, Tensor], Tensor]


def register_prediction(name: str, prediction: Prediction) -> None:
    """Make ``flow.prediction = name`` stand for a meaning of the model's output.

    Args:
        prediction: ``(flow, output, x_t, t) -> velocity``, with ``output, x_t [B C T H W]`` and ``t [B F]``.

    Raises:
        UserError: if another prediction has the name.
    """
    PREDICTIONS.register(name, prediction)
