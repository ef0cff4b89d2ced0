"""How many ranks share a video. Imports nothing heavy."""

from dataclasses import dataclass

from stdit.errors import UserError


@dataclass
class ParallelConfig:
    """Use of the processes that torchrun or accelerate launch starts."""

    sp: int = 1
    """Ranks that share each video (sequence-parallel); what is left of the processes splits the batch."""
    timeout: float = 1800.0
    """Seconds that a rank waits for the others before it gives up."""

    def __post_init__(self) -> None:
        if self.sp < 1:
            raise UserError(f"parallel.sp = {self.sp}: must be at least 1")
        if not self.timeout > 0:
            raise UserError(f"parallel.timeout = {self.timeout}: must be positive")
