"""All processes of a run as a grid, dp x cfg x sp.

dp parts split the batch, or the prompts; in each, cfg ranks split the halves of guidance (in sampling), and sp ranks
share each video. The last runs fastest: the ranks of a sequence are neighbours, on one machine where that can be.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from math import prod
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stdit.errors import OtherRankError, UserError
from stdit.parallel.config import ParallelConfig, SamplingParallelConfig
from stdit.parallel.group import Group
from stdit.parallel.layout import passes, shares

if TYPE_CHECKING:
    from stdit.parallel.planner import Choice

Result = TypeVar("Result")


@dataclass(frozen=True)
class Mesh:
    """One process's place among all; with the defaults, it is alone."""

    rank: int = 0
    size: int = 1
    sequence: Group = field(default_factory=Group)
    """The ranks that share this rank's videos."""
    guidance: Group = field(default_factory=Group)
    """The ranks that compute the halves of guidance for this rank's videos."""
    device: torch.device = torch.device("cpu")
    talk: dist.ProcessGroup | None = None
    """By which all ranks agree; none: by the one that they compute with."""

    def apart(self, timeout: float) -> "Mesh":
        """The same ranks, talking in a group of their own, on the CPU: for a thread beside the one that trains.

        Every rank must call this.

        Args:
            timeout: seconds that a rank waits for the others.
        """
        if self.size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        assert isinstance(group, dist.ProcessGroup), "every rank is in it"
        return replace(self, talk=group, device=torch.device("cpu"))

    @property
    def dp(self) -> int:
        """Parts of the batch."""
        return self.size // (self.sequence.size * self.guidance.size)

    @property
    def part(self) -> int:
        """Which part of the batch is this rank's."""
        return self.rank // (self.sequence.size * self.guidance.size)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def check_batches(self, batch_sizes: Iterable[int]) -> None:
        """Raise UserError, on every rank, if some rank would have no part of a batch."""
        smallest = min(batch_sizes, default=self.dp)
        if smallest < self.dp:
            self.fail(
                f"batch_size = {smallest}, but {self.size} processes with parallel.sp = {self.sequence.size} "
                f"split each batch into {self.size} / {self.sequence.size} = {self.dp} parts: use a batch_size of at "
                f"least {self.dp} in each of data.buckets (or a larger max_tokens), fewer processes, or a larger "
                "parallel.sp"
            )

    def fail(self, message: str) -> NoReturn:
        """Raise UserError; every rank calls this alike, and the first one speaks."""
        raise (UserError if self.is_first else OtherRankError)(message)

    def rows(self, batch_size: int) -> range:
        """Which samples of the global batch are this rank's."""
        parts = shares(batch_size, self.dp)
        start = sum(parts[: self.part])
        return range(start, start + parts[self.part])

    def passes(self, batch_size: int, most: int | None) -> list[tuple[slice, bool]]:
        """This rank's part of a batch, as `layout.passes` has it."""
        return passes(shares(batch_size, self.dp), self.part, most)

    def average(self, values: Tensor) -> Tensor:
        """Mean over all ranks."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self.talk)
        return total / self.size

    def largest(self, value: int) -> int:
        """Over all ranks."""
        return self.largest_of([value])[0]

    def largest_of(self, values: Sequence[int]) -> list[int]:
        """Each over all ranks, in one message."""
        if self.size == 1:
            return list(values)
        box = torch.tensor(values, device=self.device)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.talk)
        return box.tolist()

    def everywhere(self, action: Callable[[], Result]) -> Result:
        """Do it on every rank; if it fails on one, that one raises its error, and the others `OtherRankError`."""
        return self._together(action, range(self.size))

    def in_turn(self, action: Callable[[], Result]) -> Result:
        """As `everywhere`, first on the first rank, so that the others find what it wrote."""
        first = self._together(action if self.is_first else _nothing, range(1))
        rest = self._together(_nothing if self.is_first else action, range(1, self.size))
        return first if self.is_first else rest  # type: ignore[return-value]

    def on_first(self, action: Callable[[], Result]) -> Result:
        """Do it on the first rank alone; every rank gets its result, or raises when it fails."""
        if self.size == 1:
            return action()
        box = [self._together(action if self.is_first else _nothing, range(1))]
        dist.broadcast_object_list(box, src=0, group=self.talk)
        return box[0]  # type: ignore[return-value]

    def heard(self, news: Result | None) -> list[Result]:
        """The news of each part of the batch that has some, on every rank; while none has, one number travels.

        Raises:
            UserError: on every rank, if those that share their part tell different news.
        """
        if self.largest(news is not None) == 0:
            return []
        told, each = self.gather(news), self.size // self.dp
        for rank, one in enumerate(told):
            if one != told[lead := rank // each * each]:
                self.fail(
                    f"rank {rank} shares the videos of rank {lead}, but does not read them alike ({one}, not "
                    f"{told[lead]}): start every process on machines that have the same files"
                )
        return [one for one in told[::each] if one is not None]

    def parts_on_first(self, value: Result) -> list[Result]:
        """The value of each part of the batch, in order, on the first rank; an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        leads = self.sequence.rank == self.guidance.rank == 0
        dist.gather_object(value if leads else None, values, group=self.talk)
        return values[:: self.size // self.dp] if values else []

    def check_same(self, what: str, value: str) -> None:
        """Raise UserError on every rank if ``value`` differs between ranks."""
        values = self.gather(value)
        odd = [rank for rank, other in enumerate(values) if other != values[0]]
        if odd:
            self.fail(
                f"{what} of rank {odd[0]} differs from what rank 0 has: start every process with the same "
                "command, on machines that have the same files"
            )

    def _together(self, action: Callable[[], Any], ranks: range) -> Any:
        if self.size == 1:
            return action()
        error: Exception | None = None
        result = None
        try:
            result = action()
        except Exception as caught:
            error = caught
        messages = self.gather(None if error is None else str(error))
        failed = [rank for rank in ranks if messages[rank] is not None]
        if not failed:
            return result
        if error is not None and self.rank == failed[0]:
            raise error
        raise OtherRankError(f"rank {failed[0]} failed: {messages[failed[0]]}")

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.talk)
        return values


def _nothing() -> None:
    return None


def runs_on_cpu(device: str) -> bool:
    """Whether accelerate must be told to use the CPU: with no accelerator and no word of it, it starts no group."""
    return device == "cpu" or not torch.accelerator.is_available()


def build_mesh(config: ParallelConfig, device: torch.device) -> Mesh:
    """The grid of the processes that were started. Raises UserError if they do not form one.

    With ``sp = auto`` none shares a video yet; what is chosen makes another grid.

    Args:
        device: of this rank; its type decides how the ranks talk.
    """
    sizes = {"sp": 1 if config.sp == "auto" else config.sp}
    if isinstance(config, SamplingParallelConfig):
        sizes = {"cfg": config.cfg, **sizes}
    if not dist.is_initialized():
        check_divides(sizes, 1)
        return Mesh(device=device)
    rank, size = dist.get_rank(), dist.get_world_size()
    everyone = Mesh(rank, size, device=device)
    everyone.check_same("parallel.*", str(config))
    everyone.everywhere(lambda: check_divides(sizes, size))
    shape = (size // prod(sizes.values()), *sizes.values())
    grid = dist.init_device_mesh(device.type, shape, mesh_dim_names=("dp", *sizes))
    chunks = {"sp": config.overlap_chunks, "cfg": 1}
    groups = {
        name: Group.of(grid.get_group(name), chunks[name]) for name, ranks in sizes.items() if ranks > 1
    }
    return Mesh(rank, size, groups.get("sp", Group()), groups.get("cfg", Group()), device)


def settle(mesh: Mesh, config: ParallelConfig, choose: Callable[[], "Choice"]) -> Mesh:
    """The grid that ``sp = auto`` comes to, by the choice of the first rank; other settings have theirs already."""
    if config.sp != "auto":
        return mesh
    choice = mesh.on_first(choose)
    if mesh.is_first:
        print(f"parallel.sp = auto, of {mesh.size} processes: {choice}")
        if not choice.fits:
            print(
                "warning: expect it to run out; take more processes, smaller batches, or shorter or smaller videos"
            )
    return build_mesh(replace(config, sp=choice.sp), mesh.device)


def check_divides(sizes: dict[str, int], started: int) -> None:
    """Raise UserError unless so many processes make whole groups."""
    needed = prod(sizes.values())
    if started % needed:
        flags = " and ".join(f"parallel.{name} = {ranks}" for name, ranks in sizes.items() if ranks > 1)
        raise UserError(
            f"{flags}, but {started} {'process was' if started == 1 else 'processes were'} started: start a multiple "
            f"of {needed} (torchrun --nproc_per_node {needed} ...), or lower the setting"
        )
