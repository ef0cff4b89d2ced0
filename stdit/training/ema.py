"""Exponential moving average of the weights; samples are made with it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor, nn

from stdit.parallel.processes.parameters import trained_state
from stdit.training.config import EMAConfig


class EMA:
    """Averages of the weights in float32 (Song & Ermon 2020, arXiv:2006.09011, technique 5), by name.

    With ``decay = 0`` there are none, and the latest weights take their place.
    """

    def __init__(self, model: nn.Module, config: EMAConfig) -> None:
        self.config, self.model = config, model
        self.average: dict[str, Tensor] = {}
        self.begin()

    def begin(self) -> None:
        """Begin with the weights as they are."""
        averaged = trained_state(self.model) if self.config.decay else {}
        self.average = {name: tensor.float().clone() for name, tensor in averaged.items()}

    def decay(self, step: int) -> float:
        """Return the share of the average that is kept in ``step``, counted from 0."""
        return min(self.config.decay, (1 + step) / (10 + step)) if self.config.warmup else self.config.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights after ``step``."""
        if not self.average:
            return
        latest, share = trained_state(self.model), 1 - self.decay(step)
        weights = [latest[name] for name in self.average]
        if all(weight.dtype == torch.float32 for weight in weights):
            torch._foreach_lerp_(list(self.average.values()), weights, share)
            return
        for average, weight in zip(self.average.values(), weights, strict=True):
            average.lerp_(weight.float(), share)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Swap a model's weights and the averages in a block."""
        rounded = self._swap(model)
        try:
            yield
        finally:
            self._swap(model, rounded)

    @torch.no_grad()
    def _swap(
        self, model: nn.Module, rounded: Mapping[str, Tensor] = MappingProxyType({})
    ) -> dict[str, Tensor]:
        """Swap weights and averages; return weights that could not be swapped, since the averages were rounded."""
        found, weights = {}, trained_state(model)
        for name, average in self.average.items():
            weight, before = weights[name], weights[name].clone()
            weight.copy_(rounded.get(name, average))
            if weight.dtype == average.dtype:
                average.copy_(before)
            else:
                found[name] = before
        return found

    def weights(self) -> dict[str, Tensor]:
        """Return what to sample with: the averages, or the latest weights if there are none."""
        return self.average or trained_state(self.model)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average
