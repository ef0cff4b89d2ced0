"""All processes of a run as a grid, dp x cfg x sp.

dp parts split the batch, or the prompts; in each, cfg ranks split the halves of guidance (in sampling), and sp ranks
share each video. The last runs fastest: the ranks of a sequence are neighbours, on one machine where that can be.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from math import prod
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stdit.errors import OtherRankError, UserError
from stdit.parallel.config import ParallelConfig, SamplingParallelConfig
from stdit.parallel.sequence.group import Group
from stdit.parallel.sequence.planner import SpChoice
from stdit.parallel.sequence.sharding import even_sizes, micro_batches

Result = TypeVar("Result")


@dataclass(frozen=True)
class Mesh:
    """One process's place among all; with the defaults, it is alone."""

    rank: int = 0
    world_size: int = 1
    sp: Group = field(default_factory=Group)
    """The ranks that share this rank's videos."""
    cfg: Group = field(default_factory=Group)
    """The ranks that compute the halves of guidance for this rank's videos."""
    device: torch.device = torch.device("cpu")
    control_group: dist.ProcessGroup | None = None
    """By which all ranks agree; none: by the one that they compute with."""

    def with_control_group(self, timeout: float) -> "Mesh":
        """The same ranks, talking in a group of their own, on the CPU: for a thread beside the one that trains.

        Every rank must call this.

        Args:
            timeout: seconds that a rank waits for the others.
        """
        if self.world_size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        assert isinstance(group, dist.ProcessGroup), "every rank is in it"
        return replace(self, control_group=group, device=torch.device("cpu"))

    @property
    def dp(self) -> int:
        """Parts of the batch."""
        return self.world_size // (self.sp.size * self.cfg.size)

    @property
    def dp_rank(self) -> int:
        """Which part of the batch is this rank's."""
        return self.rank // (self.sp.size * self.cfg.size)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def check_batch_sizes(self, batch_sizes: Iterable[int]) -> None:
        """Raise UserError, on every rank, if some rank would have no part of a batch."""
        smallest = min(batch_sizes, default=self.dp)
        if smallest < self.dp:
            self.fail(
                f"batch_size = {smallest}, but {self.world_size} processes with parallel.sp = {self.sp.size} "
                f"split each batch into {self.world_size} / {self.sp.size} = {self.dp} parts: use a batch_size of at "
                f"least {self.dp} in each of data.buckets (or a larger max_tokens), fewer processes, or a larger "
                "parallel.sp"
            )

    def fail(self, message: str) -> NoReturn:
        """Raise UserError; every rank calls this alike, and the first one speaks."""
        raise (UserError if self.is_main else OtherRankError)(message)

    def sample_range(self, batch_size: int) -> range:
        """Which samples of the global batch are this rank's."""
        parts = even_sizes(batch_size, self.dp)
        start = sum(parts[: self.dp_rank])
        return range(start, start + parts[self.dp_rank])

    def micro_batches(self, batch_size: int, most: int | None) -> list[tuple[slice, bool]]:
        """This rank's part of a batch, as `sharding.micro_batches` has it."""
        return micro_batches(even_sizes(batch_size, self.dp), self.dp_rank, most)

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """Mean over all ranks."""
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self.control_group)
        return total / self.world_size

    def all_reduce_max(self, values: Sequence[int]) -> list[int]:
        """Each over all ranks, in one message."""
        if self.world_size == 1:
            return list(values)
        box = torch.tensor(values, device=self.device)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control_group)
        return box.tolist()

    def on_all_ranks(self, action: Callable[[], Result]) -> Result:
        """Do it on every rank; if it fails on one, that one raises its error, and the others `OtherRankError`."""
        return self._together(action, range(self.world_size))

    def main_first(self, action: Callable[[], Result]) -> Result:
        """As `on_all_ranks`, first on the first rank, so that the others find what it wrote."""
        first = self._together(action if self.is_main else _nothing, range(1))
        rest = self._together(_nothing if self.is_main else action, range(1, self.world_size))
        return first if self.is_main else rest  # type: ignore[return-value]

    def on_main(self, action: Callable[[], Result]) -> Result:
        """Do it on the first rank alone; every rank gets its result, or raises when it fails."""
        if self.world_size == 1:
            return action()
        box = [self._together(action if self.is_main else _nothing, range(1))]
        dist.broadcast_object_list(box, src=0, group=self.control_group)
        return box[0]  # type: ignore[return-value]

    def gather_failures(self, news: Result | None) -> list[Result]:
        """The news of each part of the batch that has some, on every rank; while none has, one number travels.

        Raises:
            UserError: on every rank, if those that share their part tell different news.
        """
        if self.all_reduce_max([news is not None]) == [0]:
            return []
        told, each = self.all_gather_objects(news), self.world_size // self.dp
        for rank, one in enumerate(told):
            if one != told[lead := rank // each * each]:
                self.fail(
                    f"rank {rank} shares the videos of rank {lead}, but does not read them alike ({one}, not "
                    f"{told[lead]}): start every process on machines that have the same files"
                )
        return [one for one in told[::each] if one is not None]

    def gather_on_main(self, value: Result) -> list[Result]:
        """The value of each part of the batch, in order, on the first rank; an empty list on the others."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_main else None
        leads = self.sp.rank == self.cfg.rank == 0
        dist.gather_object(value if leads else None, values, group=self.control_group)
        return values[:: self.world_size // self.dp] if values else []

    def check_same(self, what: str, value: str) -> None:
        """Raise UserError on every rank if ``value`` differs between ranks."""
        values = self.all_gather_objects(value)
        odd = [rank for rank, other in enumerate(values) if other != values[0]]
        if odd:
            self.fail(
                f"{what} of rank {odd[0]} differs from what rank 0 has: start every process with the same "
                "command, on machines that have the same files"
            )

    def _together(self, action: Callable[[], Any], ranks: range) -> Any:
        if self.world_size == 1:
            return action()
        error: Exception | None = None
        result = None
        try:
            result = action()
        except Exception as caught:
            error = caught
        messages = self.all_gather_objects(None if error is None else str(error))
        failed = [rank for rank in ranks if messages[rank] is not None]
        if not failed:
            return result
        if error is not None and self.rank == failed[0]:
            raise error
        raise OtherRankError(f"rank {failed[0]} failed: {messages[failed[0]]}")

    def all_gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, in order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
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
        device: of this rank; its type decides how the ranks control_group.
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
    everyone.on_all_ranks(lambda: check_divides(sizes, size))
    shape = (size // prod(sizes.values()), *sizes.values())
    grid = dist.init_device_mesh(device.type, shape, mesh_dim_names=("dp", *sizes))
    chunks = {"sp": config.overlap_chunks, "cfg": 1}
    groups = {
        name: Group.of(grid.get_group(name), chunks[name]) for name, ranks in sizes.items() if ranks > 1
    }
    return Mesh(rank, size, groups.get("sp", Group()), groups.get("cfg", Group()), device)


def resolve_sp(mesh: Mesh, config: ParallelConfig, choose: Callable[[], SpChoice]) -> Mesh:
    """The grid that ``sp = auto`` comes to, by the choice of the first rank; other settings have theirs already."""
    if config.sp != "auto":
        return mesh
    choice = mesh.on_main(choose)
    if mesh.is_main:
        print(f"parallel.sp = auto, of {mesh.world_size} processes: {choice}")
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
