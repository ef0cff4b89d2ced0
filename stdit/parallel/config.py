"""How many ranks share a video. Imports nothing heavy."""

from dataclasses import dataclass
from math import inf
from typing import Literal

from stdit.errors import UserError


@dataclass
class ParallelConfig:
    """Use of the processes that torchrun or accelerate launch starts."""

    sp: int | Literal["auto"] = 1
    """Ranks that share each video (sequence-parallel); in training, what is left of them splits the batch. auto: as
    few as memory allows."""
    memory_gib: float | None = None
    """Memory that a process may use, for what is estimated; none: all of its GPU, or its part of the machine's."""
    overlap_chunks: int = 1
    """Pieces in which a block's result is computed, so that one travels while the next is computed; 1: whole."""
    timeout: float = 1800.0
    """Seconds that a rank waits for the others before it gives up."""

    def __post_init__(self) -> None:
        for name in ("sp", "overlap_chunks"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise UserError(f"parallel.{name} = {value}: must be at least 1")
        if self.memory_gib is not None and not 0 < self.memory_gib < inf:
            raise UserError(f"parallel.memory_gib = {self.memory_gib}: must be positive")
        if not self.timeout > 0:
            raise UserError(f"parallel.timeout = {self.timeout}: must be positive")


@dataclass
class TrainingParallelConfig(ParallelConfig):
    """The same for training, where what is left of the processes splits the batch."""

    shard_parameters: bool = False
    """Each rank keeps its share of weights, gradients, optimizer state and averages: less memory, more traffic."""
    heartbeat_timeout: float = 300.0
    """Seconds without a sign of life after which a rank counts as lost, and the run ends."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 5 <= self.heartbeat_timeout < inf:
            raise UserError(
                f"parallel.heartbeat_timeout = {self.heartbeat_timeout}: must be at least 5 seconds"
            )


@dataclass
class SamplingParallelConfig(ParallelConfig):
    """The same for sampling, where what is left of the processes shares out the prompts."""

    cfg: int = 1
    """2: the two halves of classifier-free guidance run on different ranks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cfg not in (1, 2):
            raise UserError(f"parallel.cfg = {self.cfg}: must be 1 or 2, the halves of guidance")
