"""Norms of weights, gradients and updates, by block: they show where training diverges, or changes nothing."""

import re
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.processes.parameters import local_tensor, trained_parameters

BLOCK = re.compile(r"blocks\.\d+|\w+")


class BlockNorms:
    """Norms of one step. Make it between the backward pass and the update; it keeps a copy of the weights."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        self.model, self.mesh = model, mesh
        parameters = trained_parameters(model)
        self.before = {name: local_tensor(p.detach()).clone() for name, p in parameters.items()}
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        self.gradients = norms_by_block(gradients, mesh)

    def after_update(self) -> dict[str, dict[str, float]]:
        """Return by block: ``weight``, ``gradient`` (before it is clipped), ``update`` (weight after less before)."""
        weights = {name: p.detach() for name, p in trained_parameters(self.model).items()}
        moved = {name: local_tensor(p) - self.before[name] for name, p in weights.items()}
        sharded = any(local_tensor(p) is not p for p in weights.values())
        found = {
            "weight": norms_by_block(weights, self.mesh),
            "gradient": self.gradients,
            "update": norms_by_block(moved, self.mesh, sharded),
        }
        return {
            block: {name: norms[block] for name, norms in found.items() if block in norms}
            for block in found["weight"]
        }


def norms_by_block(
    tensors: Mapping[str, Tensor], mesh: Mesh, sharded: bool | None = None
) -> dict[str, float]:
    """Return the Euclidean norm of all tensors of each block, over all shards; every rank must call this.

    Args:
        tensors: by the name of the parameter.
        sharded: whether each rank has a shard of each; None: if any is a DTensor.
    """
    squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=mesh.device))
    for name, tensor in tensors.items():
        block = BLOCK.match(name)
        squares[block[0] if block else name] += local_tensor(tensor).float().square().sum()
    total = torch.stack(list(squares.values()))
    if any(local_tensor(tensor) is not tensor for tensor in tensors.values()) if sharded is None else sharded:
        total = mesh.all_reduce_mean(total) * mesh.world_size
    return {block: float(norm) for block, norm in zip(squares, total.sqrt().tolist(), strict=True)}
