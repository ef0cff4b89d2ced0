"""Settings of parallelism (``parallel.*``): the ranks that share a video, memory, timeouts. Imports no torch."""

from dataclasses import dataclass
from math import inf
from typing import Literal

from stdit.errors import UserError


@dataclass
class ParallelConfig:
    """How the processes that torchrun or accelerate launch started share the work."""

    sp: int | Literal["auto"] = 1
    """Ranks that share each video (sequence-parallel); the rest of the processes split the batch in training. auto:
    the smallest that fits in memory."""
    memory_gib: float | None = None
    """GiB of memory that a process may use, for estimates. None: all of its GPU, or its share of the machine's."""
    overlap_chunks: int = 1
    """Chunks in which a block's output is computed, so that one is sent while the next is computed; 1: no overlap."""
    timeout: float = 1800.0
    """Seconds that a rank waits for the other ranks before it fails."""

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
    """How the processes share the work in training: processes beyond sp split the batch."""

    shard_parameters: bool = False
    """Shard weights, gradients, optimizer state and EMA over all ranks (FSDP): less memory, more traffic."""
    heartbeat_timeout: float = 300.0
    """Seconds without a heartbeat after which a rank counts as lost, and the run ends."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 5 <= self.heartbeat_timeout < inf:
            raise UserError(
                f"parallel.heartbeat_timeout = {self.heartbeat_timeout}: must be at least 5 seconds"
            )


@dataclass
class SamplingParallelConfig(ParallelConfig):
    """How the processes share the work in sampling: processes beyond sp x cfg split the prompts."""

    cfg: int = 1
    """2: compute the two halves of classifier-free guidance on different ranks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cfg not in (1, 2):
            raise UserError(f"parallel.cfg = {self.cfg}: must be 1 or 2, the halves of guidance")
