"""Exponential moving average of the weights; samples are made with it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stdit.parallel.processes.parameters import trained_state
from stdit.training.config import EMAConfig


class EMA:
    """Averages of the weights in float32 (Song & Ermon 2020, arXiv:2006.09011, technique 5), by name."""

    def __init__(self, model: nn.Module, config: EMAConfig) -> None:
        self.config = config
        self.average = {name: tensor.float().clone() for name, tensor in trained_state(model).items()}

    def decay(self, step: int) -> float:
        """Return the share of the average that is kept in ``step``, counted from 0."""
        return min(self.config.decay, (1 + step) / (10 + step)) if self.config.warmup else self.config.decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the averages towards the weights after ``step``."""
        latest = trained_state(model)
        torch._foreach_lerp_(
            list(self.average.values()),
            [latest[name].float() for name in self.average],
            1 - self.decay(step),
        )

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Swap the model's weights and the averages in a block."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for name, tensor in trained_state(model).items():
            kept = tensor.float().clone()
            tensor.copy_(self.average[name])
            self.average[name].copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average
