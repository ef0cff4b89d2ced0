"""All randomness of a training step, as a pure function of (seed, step, index in the global batch).

So a resumed run needs no saved random state, and any split of the batch over processes draws the same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from stdit.diffusion.conditioning import MASK_STRATEGIES
from stdit.diffusion.config import FlowConfig
from stdit.diffusion.flow import RectifiedFlow


def sample_generator(seed: int, step: int, index: int) -> Generator:
    """The generator of one sample: ``index`` counts through the global batch of ``step``."""
    state = np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)[0]
    return Generator().manual_seed(int(state))


@dataclass(frozen=True)
class TrainingDraws:
    """The random numbers of B samples; F is 1 where no frame can be given, else T."""

    t: Tensor
    """Noise levels ``[B F]``; 0 for given frames."""
    noise: Tensor
    """``[B C T H W]``, standard normal."""
    condition_mask: Tensor
    """True for given frames, ``[B T]``."""
    drop_caption: Tensor
    """True where the null caption is trained, ``[B]``."""

    def to(self, device: torch.device) -> "TrainingDraws":
        return TrainingDraws(
            *(value.to(device) for value in (self.t, self.noise, self.condition_mask, self.drop_caption))
        )


def draw_batch(
    flow: RectifiedFlow,
    seed: int,
    step: int,
    indices: Sequence[int],
    latent_shape: tuple[int, int, int, int],
    height: int,
    width: int,
) -> TrainingDraws:
    """Draw for those samples of the global batch of ``step`` whose ``indices`` are given.

    Args:
        latent_shape: (C, T, H, W) of one sample.
        height: pixels, for the shift by size; likewise ``width``.
    """
    t, noise, given, drop = [], [], [], []
    for index in indices:
        generator = sample_generator(seed, step, index)
        level = flow.sample_level(generator, latent_shape[1], height, width)
        drop.append(torch.rand((), generator=generator) < flow.config.caption_dropout)
        given.append(_draw_given(flow.config, latent_shape[1], generator))
        t.append(level * ~given[-1] if flow.config.conditioning else level[None])
        noise.append(torch.randn(latent_shape, generator=generator))
    return TrainingDraws(torch.stack(t), torch.stack(noise), torch.stack(given), torch.stack(drop))


def _draw_given(config: FlowConfig, frames: int, generator: Generator) -> Tensor:
    """Choose a mask strategy by its share and apply it -> ``[T]``."""
    chance = float(torch.rand((), generator=generator))
    for name, share in config.conditioning.items():
        chance -= share
        if chance < 0:
            return MASK_STRATEGIES[name](frames, generator)
    return torch.zeros(frames, dtype=torch.bool)
