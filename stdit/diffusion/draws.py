"""All randomness of a training step, as a pure function of (seed, step, index in the global batch).

A resumed run therefore needs no saved random state, and every split of the batch over ranks draws the same numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self
from zlib import crc32

import numpy as np
import torch
from torch import Generator, Tensor

from stdit.diffusion.conditioning import MASK_STRATEGIES
from stdit.diffusion.config import FlowConfig
from stdit.diffusion.flow import FlowObjective
from stdit.errors import UserError
from stdit.lora.dropout import ChannelDropout


def sample_generator(seed: int, step: int, index: int, *more: int) -> Generator:
    """Return the generator of sample ``index`` of the global batch of ``step``; ``more`` numbers: another one."""
    state = np.random.SeedSequence([seed, step, index, *more]).generate_state(1, np.uint64)[0]
    return Generator().manual_seed(int(state))


@dataclass(frozen=True)
class TrainingDraws:
    """The random numbers of B samples; F is 1 without conditioning frames, else T."""

    t: Tensor
    """Noise levels ``[B F]``; 0 for conditioning frames."""
    noise: Tensor
    """``[B C T H W]``, standard normal."""
    condition_mask: Tensor
    """True for conditioning frames, ``[B T]``."""
    drop_caption: Tensor
    """True where the null caption is trained, ``[B]``."""
    guidance: Tensor
    """In [0, 1), ``[B]``: place of the guidance scale in its range, for distillation."""

    def to(self, device: torch.device) -> Self:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved)


def draw_batch(
    flow: FlowObjective,
    seed: int,
    step: int,
    indices: Sequence[int],
    latent_shape: tuple[int, int, int, int],
    height: int,
    width: int,
) -> TrainingDraws:
    """Draw the random numbers of the samples ``indices`` of the global batch of ``step``.

    Args:
        latent_shape: (C, T, H, W) of one sample.
        height: pixels, for the shift by size; likewise ``width``.
    """
    t, noise, masks, drop, guidance = [], [], [], [], []
    for index in indices:
        generator = sample_generator(seed, step, index)
        sample_t = flow.sample_t(generator, latent_shape[1], height, width)
        drop.append(torch.rand((), generator=generator) < flow.config.caption_dropout)
        masks.append(_draw_condition_mask(flow.config, latent_shape[1], generator))
        t.append(sample_t * ~masks[-1] if flow.config.conditioning else sample_t[None])
        noise.append(torch.randn(latent_shape, generator=generator))
        guidance.append(torch.rand((), generator=generator))
    return TrainingDraws(*map(torch.stack, (t, noise, masks, drop, guidance)))


@contextmanager
def dropped_channels(
    dropouts: Mapping[str, ChannelDropout], seed: int, step: int, indices: Sequence[int], device: torch.device
) -> Iterator[None]:
    """Let adapters drop channels of the samples ``indices`` of the global batch of ``step``, in a block.

    It must hold the backward pass, too, which may compute activations again.

    Args:
        dropouts: of the model's adapters, by name.
    """
    for name, dropout in dropouts.items():
        rows = [
            torch.rand(dropout.channels, generator=sample_generator(seed, step, index, crc32(name.encode())))
            for index in indices
        ]
        dropout.factors = (torch.stack(rows) >= dropout.share).float().to(device) / (1 - dropout.share)
    try:
        yield
    finally:
        for dropout in dropouts.values():
            dropout.factors = None


def _draw_condition_mask(config: FlowConfig, frames: int, generator: Generator) -> Tensor:
    """Choose a mask strategy by its share and apply it -> ``[T]``."""
    remaining = float(torch.rand((), generator=generator))
    for name, share in config.conditioning.items():
        remaining -= share
        if remaining < 0:
            mask = MASK_STRATEGIES.get(name)(frames, generator)
            if mask.shape != (frames,) or mask.dtype != torch.bool or mask.all():
                raise UserError(
                    f"flow.conditioning.{name} gave {mask} for {frames} latent frames: a mask strategy must return a "
                    f"bool tensor [{frames}] with at least one frame that is false"
                )
            return mask
    return torch.zeros(frames, dtype=torch.bool)
