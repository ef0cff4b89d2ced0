"""The ranks that share one video, and a count of what they send each other."""

from collections import Counter
from dataclasses import dataclass, field

from torch.distributed import ProcessGroup, get_rank, get_world_size


@dataclass
class Traffic:
    """What this rank sent to others, by collective."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, collective: str, size: int) -> None:
        """Count one call that sent ``size`` bytes."""
        self.calls[collective] += 1
        self.bytes[collective] += size

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()


@dataclass(frozen=True)
class Group:
    """N ranks among which the tokens of a video are sharded; with the defaults, one rank alone."""

    rank: int = 0
    """This rank's place in the group."""
    size: int = 1
    """N."""
    name: str = ""
    """By which collectives know the group."""
    chunks: int = 1
    """Pieces in which the result of a block is computed and sent: each travels while the next is computed."""
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    @classmethod
    def of(cls, process_group: ProcessGroup, chunks: int = 1) -> "Group":
        """The group whose ranks are those of a process group."""
        return cls(get_rank(process_group), get_world_size(process_group), process_group.group_name, chunks)
