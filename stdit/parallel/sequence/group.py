"""The group of ranks that share a video, and a count of the bytes that they exchange."""

from collections import Counter
from dataclasses import dataclass, field

from torch.distributed import ProcessGroup, get_rank, get_world_size


@dataclass
class Traffic:
    """Calls and bytes that this rank sent to other ranks, by collective."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, collective: str, size: int) -> None:
        """Count one call that sent ``size`` bytes."""
        self.calls[collective] += 1
        self.bytes[collective] += size

    def clear(self) -> None:
        """Set all counts to zero."""
        self.calls.clear()
        self.bytes.clear()


@dataclass(frozen=True)
class Group:
    """The N ranks over which the tokens of a video are sharded; the default is a group of one rank."""

    rank: int = 0
    """Rank of this process in the group."""
    size: int = 1
    """Number of ranks, N."""
    name: str = ""
    """Name of the process group, as functional collectives expect it."""
    chunks: int = 1
    """Chunks in which a block's output is computed and sent: one is in transit while the next is computed."""
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    @classmethod
    def of(cls, process_group: ProcessGroup, chunks: int = 1) -> "Group":
        """Return the group with the ranks of a `torch.distributed` process group."""
        return cls(get_rank(process_group), get_world_size(process_group), process_group.group_name, chunks)


ONE_RANK = Group()
"""The group of one rank: made once, since a compiled model cannot make it."""
