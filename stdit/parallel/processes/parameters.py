"""How the weights of a model, and what training keeps beside them, lie on the ranks.

Replicated, every rank has all of them. Sharded, a rank keeps its share of each tensor, along the first axis, as a
DTensor, and has a block's weights whole only while the block computes (ZeRO stage 3, Rajbhandari et al. 2020,
arXiv:1910.02054; PyTorch's fully_shard). Either way gradients are averaged over all ranks.

PyTorch's part of it is imported where it is used: it takes time, and settings are read without it.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.sequence.planner import FLOAT32_BYTES

STATES_PER_WEIGHT = 5
"""Numbers for each weight: itself, its gradient, AdamW's two moments, its average."""


@dataclass(frozen=True)
class Network:
    """A model on all ranks."""

    module: nn.Module
    """What a rank calls."""
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext
    """For passes before the last of a step: while it lasts, gradients need not be averaged."""


def replicate_model(model: nn.Module, mesh: Mesh) -> Network:
    """All weights on every rank."""
    model.to(mesh.device)
    if mesh.world_size == 1:
        return Network(model)
    module = DistributedDataParallel(_OneUnused(model), find_unused_parameters=True)
    return Network(module, module.no_sync)


class _OneUnused(nn.Module):
    """A model beside a weight that nothing uses, for which DistributedDataParallel is told to look.

    Where it need not look, it sorts gradients into other buckets after the first pass of a process. Sums over ranks
    are then rounded in another order, and a run that was started again is not bit for bit that which was not. Where
    it looks in vain, it warns on every rank.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.unused = nn.Parameter(torch.zeros((), device=next(model.parameters()).device))

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def shard_model(model: nn.Module, mesh: Mesh) -> Network:
    """A share of the weights on each rank; every rank must call the model equally often.

    Gradients are averaged in every pass: until then they are whole, and take the room that sharding is to save.
    """
    if mesh.world_size == 1:
        return replicate_model(model, mesh)
    from torch.distributed.fsdp import fully_shard

    ranks = init_device_mesh(mesh.device.type, (mesh.world_size,))
    for block in model.blocks():  # type: ignore[operator]
        fully_shard(block, mesh=ranks)
    fully_shard(model, mesh=ranks)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nobody writes to
    return Network(model)


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor of which each rank may keep a share; every rank must call this."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor; all of one that is not sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_full_tensors(tensors: Mapping[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """The tensors whole on the first rank, and none on the others; every rank must call this.

    What was sharded is gathered one by one, and then in the memory of the CPU.
    """
    kept = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor)
        if mesh.is_main:
            kept[name] = full if full is tensor else full.cpu()
    return kept


def distribute_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole ``tensor`` on the device of ``like``; if that is sharded, and as large, this rank's share of it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    tensor = tensor.to(like.device)
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def state_bytes(parameter_count: int, ranks: int, sharded: bool) -> int:
    """Bytes that a rank keeps between steps of a model with so many float32 weights.

    Replicated, a rank keeps all of it; sharded over the ranks, its share (arXiv:1910.02054, figure 1).
    """
    mine = -(-parameter_count // ranks) if sharded else parameter_count
    return STATES_PER_WEIGHT * FLOAT32_BYTES * mine
