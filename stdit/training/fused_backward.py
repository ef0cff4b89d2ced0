"""Gradients that are used and dropped while the backward pass goes on, so that they are never all in memory.

Lv et al. 2023 (arXiv:2306.09782), with any optimizer.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class FusedBackward:
    """Drops each gradient of some parameters after `handling` has had it."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._handle: Callable[[nn.Parameter], None] = lambda parameter: None
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[arg-type]

    def _arrived(self, parameter: nn.Parameter) -> None:
        self._handle(parameter)
        parameter.grad = None

    @contextmanager
    def handling(self, handle: Callable[[nn.Parameter], None]) -> Iterator[None]:
        """In this context, call ``handle`` with each parameter when its gradient is whole."""
        before, self._handle = self._handle, handle
        try:
            yield
        finally:
            self._handle = before


class GradientNorm:
    """Norm of gradients that arrive one by one; the value of `clip_grad_norm_`, bit for bit."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._norms: dict[nn.Parameter, Tensor] = {}

    def add(self, parameter: nn.Parameter) -> Tensor:
        """Count the gradient of a parameter, and return its norm."""
        assert parameter.grad is not None
        (self._norms[parameter],) = torch._foreach_norm([parameter.grad], 2.0)
        return self._norms[parameter]

    def total(self) -> Tensor:
        """Return the norm of all, a scalar."""
        return torch.linalg.vector_norm(
            torch.stack([self._norms[p] for p in self._parameters if p in self._norms])
        )
