"""Model, gradients and optimizer state on several ranks: replicated (DDP) or sharded (FSDP2, ZeRO stage 3).

Replicated, every rank holds all of them. Sharded, a rank holds its share of each tensor, split along the first axis,
as a DTensor, and gathers a block's weights only while the block computes (Rajbhandari et al. 2020, arXiv:1910.02054;
PyTorch's ``fully_shard``). In both cases gradients are averaged over all ranks.

DTensor and FSDP are imported where they are used: importing them is slow, and many commands need neither.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from stdit.parallel.processes.mesh import Mesh


@dataclass(frozen=True)
class DistributedModel:
    """A model that is replicated on all ranks or sharded over them."""

    module: nn.Module
    """The module to call."""
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext
    """Context for all micro-batches of a step but the last: gradients need not be averaged in it."""


def replicate_model(model: nn.Module, mesh: Mesh) -> DistributedModel:
    """Keep all weights on every rank; gradients are averaged by DistributedDataParallel."""
    model.to(mesh.device)
    if mesh.world_size == 1:
        return DistributedModel(model)
    # All ranks have built the same weights; frozen ones that are rounded could not be sent at the start.
    module = DistributedDataParallel(
        _WithUnusedParameter(model), find_unused_parameters=True, init_sync=False
    )
    return DistributedModel(module, module.no_sync)


class _WithUnusedParameter(nn.Module):
    """A model and one parameter that it does not use, so that DDP has a reason to search for unused parameters.

    Without the search, DDP rearranges its gradient buckets after the first pass of a process. Sums over ranks are
    then rounded in another order, and a resumed run is not bit for bit the same as one that was never stopped. If the
    search finds nothing, DDP prints a warning on every rank.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.unused = nn.Parameter(torch.zeros((), device=next(model.parameters()).device))

    def forward(self, **inputs: object) -> object:
        return self.model(**inputs)


def shard_model(model: nn.Module, mesh: Mesh) -> DistributedModel:
    """Shard the weights over all ranks, in place, by ``fully_shard``; all ranks must call the model equally often.

    Gradients are averaged in every pass: until then they are unsharded, in memory that sharding should save.
    """
    if mesh.world_size == 1:
        return replicate_model(model, mesh)
    from torch.distributed.fsdp import fully_shard

    ranks = init_device_mesh(mesh.device.type, (mesh.world_size,))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=ranks)
    fully_shard(model, mesh=ranks)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing writes to it
    return DistributedModel(model)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name: without those of the base of an adapter."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what of a model's state training changes, by name, without a copy."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor if it is sharded (DTensor); every rank must call this."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor; any other tensor is returned as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_full_tensors(tensors: Mapping[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """Return the full tensors on the main rank, and none on other ranks; every rank must call this.

    Sharded tensors are gathered one after the other, and kept in CPU memory.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor)
        if mesh.is_main:
            gathered[name] = full if full is tensor else full.cpu()
    return gathered


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Move a full tensor to the device of ``like``; if that is sharded and of the same shape, return the shard."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    tensor = tensor.to(like.device)
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor
