"""Mask strategies: which latent frames of a training clip are conditioning frames.

A conditioning frame has timestep 0 and is not generated, so image-to-video, extension and interpolation take the same
code path as text-to-video. A strategy is a pure function ``(frames, generator) -> condition_mask [T]``, true for
conditioning frames, that leaves at least one frame to generate. The built-in ones are those of Open-Sora v1.2
(arXiv:2412.20404, section on masking), defined for any T >= 1.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from stdit.registry import Registry

MaskStrategy = Callable[[int, Generator], Tensor]


def _uniform(low: int, high: int, generator: Generator) -> int:
    """Draw an integer from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _quarter_length(frames: int, generator: Generator) -> int:
    """Draw a number of frames from 1 to a quarter of the clip; 0 where no frame would be left to generate."""
    return min(_uniform(1, max(1, frames // 4), generator), frames - 1)


def _span(frames: int, start: int, length: int) -> Tensor:
    index = torch.arange(frames)
    return (index >= start) & (index < start + length)


def none(frames: int, generator: Generator) -> Tensor:
    """No conditioning frame: text-to-video."""
    return torch.zeros(frames, dtype=torch.bool)


def random(frames: int, generator: Generator) -> Tensor:
    """Each frame with a probability that is itself drawn; one frame is left to generate."""
    mask = torch.rand(frames, generator=generator) < torch.rand((), generator=generator)
    mask[_uniform(0, frames - 1, generator)] = False
    return mask


def interpolate(frames: int, generator: Generator) -> Tensor:
    """Every second frame, beginning with the first or the second."""
    mask = torch.arange(frames) % 2 == _uniform(0, 1, generator)
    return mask & ~mask.all()


def head(frames: int, generator: Generator) -> Tensor:
    """The first frames, up to a quarter."""
    return _span(frames, 0, _quarter_length(frames, generator))


def tail(frames: int, generator: Generator) -> Tensor:
    """The last frames, up to a quarter."""
    return head(frames, generator).flip(0)


def head_tail(frames: int, generator: Generator) -> Tensor:
    """First and last frames, up to a quarter each."""
    mask = head(frames, generator) | tail(frames, generator)
    return mask & ~mask.all()


def quarter(frames: int, generator: Generator) -> Tensor:
    """Consecutive frames anywhere, up to a quarter."""
    length = _quarter_length(frames, generator)
    return _span(frames, _uniform(0, frames - length, generator), length)


def image(frames: int, generator: Generator) -> Tensor:
    """One frame anywhere."""
    return _span(frames, _uniform(0, frames - 1, generator), min(1, frames - 1))


def first(frames: int, generator: Generator) -> Tensor:
    """The first frame: image-to-video."""
    return _span(frames, 0, min(1, frames - 1))


def last(frames: int, generator: Generator) -> Tensor:
    """The last frame."""
    return first(frames, generator).flip(0)


def first_last(frames: int, generator: Generator) -> Tensor:
    """First and last frame."""
    mask = first(frames, generator) | last(frames, generator)
    return mask & ~mask.all()


MASK_STRATEGIES: Registry[MaskStrategy] = Registry(
    "flow.conditioning",
    {
        f.__name__: f
        for f in (none, random, interpolate, head, tail, head_tail, quarter, image, first, last, first_last)
    },
)
"""Name to mask strategy."""


def register_mask_strategy(name: str, strategy: MaskStrategy) -> None:
    """Make ``flow.conditioning.NAME`` the share of samples that a mask strategy is applied to.

    Args:
        strategy: ``(frames, generator) -> condition_mask``, bool [T] on the CPU. It draws from ``generator`` only,
            and leaves at least one frame to generate at any length.

    Raises:
        UserError: if another strategy has the name.
    """
    MASK_STRATEGIES.register(name, strategy)
