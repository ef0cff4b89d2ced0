"""The group of ranks that share a video, and a count of the bytes that they exchange."""

from collections import Counter
from dataclasses import dataclass, field, replace

from torch.distributed import ProcessGroup, get_rank, get_world_size

from stdit.parallel.sequence.layouts import Grid
from stdit.parallel.sequence.stages import Speeds


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
    grid: Grid | None = None
    """How the ranks divide time and space; None: as is fastest for the size of a video."""
    speeds: Speeds = Speeds()
    """What a rank computes and sends, for the choice of grid and layouts."""
    traffic: Traffic = field(default_factory=Traffic, compare=False)
    members: tuple[int, ...] = ()
    """Ranks of the process group that are in this group, if not all are: see `part`."""
    world: int = 0
    """Number of ranks of the process group, if not all are members."""

    @classmethod
    def of(cls, process_group: ProcessGroup) -> "Group":
        """Return the group with the ranks of a `torch.distributed` process group."""
        return cls(get_rank(process_group), get_world_size(process_group), process_group.group_name)

    def part(self, ranks: tuple[int, ...]) -> "Group":
        """Return the group of some of the ranks, this one among them, which needs no process group of its own.

        Every rank of the whole group must call the collectives of its part at the same time: they are exchanges of
        all, in which those of other parts send nothing to each other.
        """
        if len(ranks) == self.size:
            return self
        members = tuple(self.members[rank] for rank in ranks) if self.members else ranks
        return replace(
            self,
            rank=ranks.index(self.rank),
            size=len(ranks),
            grid=None,
            members=members,
            world=self.world or self.size,
        )

    def of_all(self, sizes: list[int]) -> list[int]:
        """Return sizes for each rank of the process group, which are 0 for those that are not in this group."""
        if not self.members:
            return sizes
        found = [0] * self.world
        for member, size in zip(self.members, sizes, strict=True):
            found[member] = size
        return found


ONE_RANK = Group()
"""The group of one rank: made once, since a compiled model cannot make it."""
