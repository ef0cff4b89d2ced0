"""How strongly each step of sampling follows the caption (classifier-free guidance).

Symbols: g guidance scale (1: none), sigma noise level of a step (1 noise, 0 data).
"""

from collections.abc import Callable

import torch
from torch import Tensor


def constant(scale: float, sigma: float, step: int, interval: tuple[float, float]) -> float:
    """g in every step (Ho & Salimans 2022, arXiv:2207.12598)."""
    return scale


def linear(scale: float, sigma: float, step: int, interval: tuple[float, float]) -> float:
    """From no guidance at noise to twice as much at data: g on average (Wang et al. 2024, arXiv:2404.13040)."""
    return 1 + 2 * (scale - 1) * (1 - sigma)


def within(scale: float, sigma: float, step: int, interval: tuple[float, float]) -> float:
    """g at noise levels inside an interval, no guidance outside (Kynkaanniemi et al. 2024, arXiv:2404.07724)."""
    low, high = interval
    return scale if low <= sigma <= high else 1.0


def oscillating(scale: float, sigma: float, step: int, interval: tuple[float, float]) -> float:
    """g in every second step, beginning with the first, and no guidance in the others."""
    return scale if step % 2 == 0 else 1.0


GUIDANCE_SCHEDULES: dict[str, Callable[[float, float, int, tuple[float, float]], float]] = {
    "constant": constant,
    "linear": linear,
    "interval": within,
    "oscillating": oscillating,
}


def moments(values: Tensor) -> Tensor:
    """Count, sum and sum of squares of each sample of ``[B ...]``, ``[3 B]``: those of parts of a video add up."""
    rows = values.flatten(1).double()
    return torch.stack([torch.full_like(rows[:, 0], rows.shape[1]), rows.sum(1), rows.square().sum(1)])


def spread(moments: Tensor) -> Tensor:
    """Standard deviation ``[B]`` of samples with these `moments`."""
    count, total, squares = moments
    return (squares / count - (total / count).square()).sqrt()


def rescale(guided: Tensor, target: Tensor, found: Tensor, share: float) -> Tensor:
    """Bring a guided velocity ``[B ...]`` back to the spread of the unguided one, by a share of the way.

    Lin et al. 2024, arXiv:2305.08891, equations 15 and 16; large scales otherwise give glaring colours.

    Args:
        target: standard deviation of the velocity that follows the caption, ``[B]``.
        found: that of the guided one, ``[B]``.
    """
    factor = share * target / found + (1 - share)
    return guided * factor.to(guided.dtype).view(-1, *[1] * (guided.ndim - 1))
