"""Which latent frames of a training clip are given, and which are to be generated.

A given frame has timestep 0, so image-to-video, extension and interpolation are one code path with text-to-video.
Every strategy is a pure function ``(frames, generator) -> given [T]`` and leaves at least one frame free.
The strategies are those of Open-Sora v1.2 (arXiv:2412.20404, section on masking), defined for any T >= 1.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor


def _uniform(low: int, high: int, generator: Generator) -> int:
    """An integer from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _quarter(frames: int, generator: Generator) -> int:
    """A number of frames from 1 to a quarter of the clip; 0 where that would leave none free."""
    return min(_uniform(1, max(1, frames // 4), generator), frames - 1)


def _span(frames: int, start: int, length: int) -> Tensor:
    index = torch.arange(frames)
    return (index >= start) & (index < start + length)


def none(frames: int, generator: Generator) -> Tensor:
    """Nothing is given: text-to-video."""
    return torch.zeros(frames, dtype=torch.bool)


def random(frames: int, generator: Generator) -> Tensor:
    """Each frame is given with a probability that is itself drawn; one frame stays free."""
    given = torch.rand(frames, generator=generator) < torch.rand((), generator=generator)
    given[_uniform(0, frames - 1, generator)] = False
    return given


def interpolate(frames: int, generator: Generator) -> Tensor:
    """Every second frame is given, beginning with the first or the second."""
    given = torch.arange(frames) % 2 == _uniform(0, 1, generator)
    return given & ~given.all()


def head(frames: int, generator: Generator) -> Tensor:
    """The first frames are given, up to a quarter."""
    return _span(frames, 0, _quarter(frames, generator))


def tail(frames: int, generator: Generator) -> Tensor:
    """The last frames are given, up to a quarter."""
    return head(frames, generator).flip(0)


def head_tail(frames: int, generator: Generator) -> Tensor:
    """First and last frames are given, up to a quarter each."""
    given = head(frames, generator) | tail(frames, generator)
    return given & ~given.all()


def quarter(frames: int, generator: Generator) -> Tensor:
    """A run of frames anywhere is given, up to a quarter."""
    length = _quarter(frames, generator)
    return _span(frames, _uniform(0, frames - length, generator), length)


def image(frames: int, generator: Generator) -> Tensor:
    """One frame anywhere is given."""
    return _span(frames, _uniform(0, frames - 1, generator), min(1, frames - 1))


def first(frames: int, generator: Generator) -> Tensor:
    """The first frame is given: image-to-video."""
    return _span(frames, 0, min(1, frames - 1))


def last(frames: int, generator: Generator) -> Tensor:
    """The last frame is given."""
    return first(frames, generator).flip(0)


def first_last(frames: int, generator: Generator) -> Tensor:
    """First and last frame are given."""
    given = first(frames, generator) | last(frames, generator)
    return given & ~given.all()


MASK_STRATEGIES: dict[str, Callable[[int, Generator], Tensor]] = {
    f.__name__: f
    for f in (none, random, interpolate, head, tail, head_tail, quarter, image, first, last, first_last)
}
