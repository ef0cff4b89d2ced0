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
    grid: Literal["auto"] | tuple[int, int] = "auto"
    """How these ranks divide each video: the number of parts in time, and in space, such as [4, 2]. It sets sp.
    auto: as is fastest for the frames and patches of each bucket or video."""
    link_gbit: float | None = None
    """Gbit/s that a rank can send to others, for the choice of the grid; none: 3,200, as by NVLink (CPUs: 8)."""
    latency_us: float | None = None
    """Microseconds that an exchange takes besides, likewise; none: 20 (CPUs: 500)."""
    tflops: float | None = None
    """TFLOP/s that a rank reaches, likewise; none: 400 (CPUs: 0.1)."""
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
        if self.grid != "auto":
            self.grid = (self.grid[0], self.grid[1])
            shown = list(self.grid)
            if min(self.grid) < 1:
                raise UserError(f"parallel.grid = {shown}: must be two numbers of parts, each at least 1")
            ranks = self.grid[0] * self.grid[1]
            if self.sp not in (1, "auto", ranks):
                raise UserError(
                    f"parallel.grid = {shown}: has {ranks} ranks, but parallel.sp = {self.sp}: leave sp out, or "
                    f"let the two numbers multiply to {self.sp}"
                )
            self.sp = ranks
        for name in ("link_gbit", "latency_us", "tflops", "memory_gib"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise UserError(f"parallel.{name} = {value}: must be positive; leave it out for the default")
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
