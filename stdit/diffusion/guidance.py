"""Classifier-free guidance: its scale in each step of sampling, and its rescaling.

Symbols: g guidance scale (1: none), sigma noise level of a step (1 noise, 0 data).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def _constant(scale: float, sigma: float, step: int, interval: tuple[float, float]) -> float:
    """Return g in every step (Ho & Salimans 2022, arXiv:2207.12598)."""
    return scale


def _linear(scale: float, sigma: float, step: int, interval: tuple[float, float]) -> float:
    """Rise from no guidance at noise to twice as much at data: g on average (Wang et al. 2024, arXiv:2404.13040)."""
    return 1 + 2 * (scale - 1) * (1 - sigma)


def _interval(scale: float, sigma: float, step: int, interval: tuple[float, float]) -> float:
    """Return g at noise levels inside an interval, 1 outside (Kynkaanniemi et al. 2024, arXiv:2404.07724)."""
    low, high = interval
    return scale if low <= sigma <= high else 1.0


def _oscillating(scale: float, sigma: float, step: int, interval: tuple[float, float]) -> float:
    """Return g in every second step, beginning with the first, and 1 in the others."""
    return scale if step % 2 == 0 else 1.0


GUIDANCE_SCHEDULES: dict[str, Callable[[float, float, int, tuple[float, float]], float]] = {
    "constant": _constant,
    "linear": _linear,
    "interval": _interval,
    "oscillating": _oscillating,
}


def sample_moments(values: Tensor) -> Tensor:
    """Return count, sum and sum of squares of each sample of ``[B ...]``, ``[3 B]``; those of parts of a video add
    up."""
    rows = values.flatten(1).double()
    return torch.stack([torch.full_like(rows[:, 0], rows.shape[1]), rows.sum(1), rows.square().sum(1)])


def standard_deviation(moments: Tensor) -> Tensor:
    """Return the standard deviation ``[B]`` of samples with these `sample_moments`."""
    count, total, squares = moments
    variance: Tensor = squares / count - (total / count).square()
    return variance.sqrt()


def rescale_guidance(guided: Tensor, target: Tensor, found: Tensor, strength: float) -> Tensor:
    """Scale a guided velocity ``[B ...]`` towards the standard deviation of the conditional one.

    Lin et al. 2024, arXiv:2305.08891, equations 15 and 16; large guidance scales otherwise oversaturate colours.

    Args:
        target: standard deviation of the conditional velocity, ``[B]``.
        found: standard deviation of the guided velocity, ``[B]``.
        strength: 0 (no change) to 1 (all the way): phi of equation 16.
    """
    factor = strength * target / found + (1 - strength)
    return guided * factor.to(guided.dtype).view(-1, *[1] * (guided.ndim - 1))
