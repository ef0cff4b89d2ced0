"""One collective per training step, for the loss and for everything that the ranks must decide together.

After each step, all ranks must know of signals, requests to save, failures of a checkpoint that is being written, and
clips that could not be read, on any rank. Each of these is a small number, summed in the all-reduce of the loss.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from stdit.parallel.processes.mesh import Mesh

Poll = Callable[[], Sequence[int]]
"""This rank's numbers now: as many on every rank, at every call; exact in float32, so below 2^24 in sum."""


class StepExchange:
    """Sum the loss and the numbers of registered sources over all ranks, in one all-reduce.

    Numbers are polled when the loss is known: after the backward pass, before the update. What happens later counts
    in the next step. On one process nothing is exchanged, and numbers are polled when they are taken.

    Every rank must register the same sources in the same order, and call `reduce` and `take` as the others do.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._sources: dict[str, Poll] = {}
        self._lengths: list[int] = []
        self._sums: dict[str, list[int]] = {}

    def register(self, name: str, poll: Poll) -> None:
        """Add a source of numbers, or replace it."""
        self._sources[name] = poll

    def reduce(self, loss: Tensor) -> Tensor:
        """Sum the loss, and all numbers, over the ranks, without waiting for the device.

        Args:
            loss: float32 [N], of which this rank has a part: the loss, and whatever else of the step must be summed.

        Returns:
            float32 [N + number of numbers] on the device; `receive` takes all but the first N once they are read.
        """
        if self.mesh.world_size == 1:
            return loss
        polled = [list(poll()) for poll in self._sources.values()]
        self._lengths = [len(numbers) for numbers in polled]
        own = torch.tensor([float(number) for numbers in polled for number in numbers])
        vector = torch.cat([loss, own.to(loss.device, non_blocking=True)])
        dist.all_reduce(vector, group=self.mesh.control_group)
        return vector

    def receive(self, sums: Sequence[float]) -> None:
        """Keep the sums of all numbers, as read from the device."""
        start = 0
        self._sums = {}
        for name, length in zip(self._sources, self._lengths, strict=False):
            self._sums[name] = [int(value) for value in sums[start : start + length]]
            start += length

    def take(self, name: str) -> list[int]:
        """Return the sums of a source's numbers over all ranks, as of the last exchange.

        Each exchange can be taken once: if nothing was exchanged since, this exchanges now.
        """
        if self.mesh.world_size == 1:
            return list(self._sources[name]())
        if name not in self._sums:
            self.receive(self.reduce(torch.zeros(0, device=self.mesh.device)).tolist())
        return self._sums.pop(name)

    def discard(self, name: str) -> None:
        """Forget the last exchange of a source, because its numbers no longer hold."""
        self._sums.pop(name, None)
