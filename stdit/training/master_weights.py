"""The optimizer's own copy of the weights: in more bits than the model has, or in the memory of the CPU."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stdit.parallel.processes.parameters import trained_parameters
from stdit.training.memory_config import MemoryConfig


class MasterWeights(nn.Module):
    """Copies of the trained parameters of a model, under their names; an optimizer updates them instead.

    Micikevicius et al. 2018 (arXiv:1710.03740, section 3.1); on the CPU: Ren et al. 2021 (arXiv:2101.06840).
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._trained = trained_parameters(model)
        self._copies = {
            name: nn.Parameter(parameter.detach().to(device, dtype, copy=True))
            for name, parameter in self._trained.items()
        }
        self.of = {parameter: self._copies[name] for name, parameter in self._trained.items()}
        """Copy of each parameter of the model."""

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the copies by the names that their parameters have in the model."""
        yield from self._copies.items()

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # type: ignore[override]
        return {name: copy.detach() for name, copy in self._copies.items()}

    @contextmanager
    def updating(self, parameters: Iterable[nn.Parameter] | None = None) -> Iterator[None]:
        """Move gradients of the model's parameters to their copies, and in the end copy the new weights back.

        Args:
            parameters: of the model; None: all.
        """
        pairs = [(p, self.of[p]) for p in parameters or self.of if p.grad is not None]
        for parameter, copy in pairs:
            assert parameter.grad is not None
            copy.grad, parameter.grad = parameter.grad.to(copy.device, copy.dtype), None
        yield
        for parameter, copy in pairs:
            parameter.detach().copy_(copy.detach())
            copy.grad = None

    def write_back(self) -> None:
        """Copy all weights into the model."""
        for parameter, copy in self.of.items():
            parameter.detach().copy_(copy.detach())


def build_master_weights(model: nn.Module, memory: MemoryConfig) -> MasterWeights | None:
    """Build the copy of a model's trained weights that ``memory`` asks for; None: the optimizer has no other ones."""
    parameter = next(iter(trained_parameters(model).values()))
    dtype = torch.float32 if memory.weights == "bf16_master" else parameter.dtype
    device = torch.device("cpu") if memory.offload_optimizer else parameter.device
    if (dtype, device) == (parameter.dtype, parameter.device):
        return None
    return MasterWeights(model, dtype, device)
