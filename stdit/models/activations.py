"""Activations of a block that wait for the backward pass in CPU memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def offloaded(block: nn.Module) -> Iterator[None]:
    """In this context, move what a block saves for its backward pass to the CPU, but for its weights.

    A tensor that is on the CPU already stays as it is, and so does one of another class, such as a rounded weight.
    Copies are not waited for: those of a GPU go through pinned memory.
    """
    weights = {p.untyped_storage().data_ptr() for p in block.parameters() if _is_plain(p)}

    def pack(tensor: Tensor) -> tuple[torch.device | None, Tensor]:
        stays = tensor.device.type == "cpu" or not _is_plain(tensor)
        if stays or tensor.untyped_storage().data_ptr() in weights:
            return None, tensor
        kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
        kept.copy_(tensor, non_blocking=True)
        return tensor.device, kept

    def unpack(packed: tuple[torch.device | None, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor if device is None else tensor.to(device, non_blocking=True)

    hooks: Callable[..., Any] = saved_tensors_hooks
    with hooks(pack, unpack):
        yield


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)
