"""The device mesh: all processes of a run as a grid, dp x cfg x sp, and control messages between them.

The dp ranks split the batch (or the prompts); the cfg ranks split the two halves of classifier-free guidance (in
sampling); the sp ranks share each video. sp varies fastest: the ranks of a video are neighbours, on one machine if it
is large enough.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from math import prod
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stdit.errors import OtherRankError, UserError
from stdit.parallel.config import ParallelConfig, SamplingParallelConfig
from stdit.parallel.sequence.group import Group
from stdit.parallel.sequence.layouts import Grid, even_sizes
from stdit.parallel.sequence.planner import ParallelDims, SpChoice
from stdit.parallel.sequence.sharding import micro_batches
from stdit.parallel.sequence.stages import Speeds

_T = TypeVar("_T")


@dataclass(frozen=True)
class Mesh:
    """This process's position in the grid of processes; the default is a single process."""

    rank: int = 0
    """Rank among all processes."""
    world_size: int = 1
    """Number of processes."""
    sp: Group = field(default_factory=Group)
    """The ranks that share this rank's videos."""
    cfg: Group = field(default_factory=Group)
    """The ranks that compute the halves of guidance for this rank's videos."""
    device: torch.device = torch.device("cpu")
    """Device of this rank."""
    control_group: dist.ProcessGroup | None = None
    """Process group for control messages; None: the default group."""

    def with_control_group(self, timeout: float) -> "Mesh":
        """Return the same mesh with a gloo control group of its own, for use in a thread beside training.

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
        """Number of data-parallel ranks: the parts of the batch."""
        return self.world_size // (self.sp.size * self.cfg.size)

    @property
    def dp_rank(self) -> int:
        """Which part of the batch this rank has."""
        return self.rank // (self.sp.size * self.cfg.size)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints messages."""
        return self.rank == 0

    def check_batch_sizes(self, batch_sizes: Iterable[int]) -> None:
        """Raise UserError on every rank if a batch has fewer samples than there are data-parallel ranks."""
        smallest = min(batch_sizes, default=self.dp)
        if smallest < self.dp:
            self.fail(
                f"batch_size = {smallest}, but {self.world_size} processes with parallel.sp = {self.sp.size} "
                f"split each batch into {self.world_size} / {self.sp.size} = {self.dp} parts: raise "
                "data.batch_multiplier, or batch_size (or max_tokens) in data.buckets, use fewer processes, or a "
                "larger parallel.sp"
            )

    def fail(self, message: str) -> NoReturn:
        """Raise UserError on the main rank and OtherRankError on others; every rank must call this."""
        raise (UserError if self.is_main else OtherRankError)(message)

    def sample_range(self, batch_size: int) -> range:
        """Return the indices of this rank's samples in the global batch."""
        sizes = even_sizes(batch_size, self.dp)
        start = sum(sizes[: self.dp_rank])
        return range(start, start + sizes[self.dp_rank])

    def micro_batches(self, batch_size: int, max_size: int | None) -> list[tuple[slice, bool]]:
        """Split this rank's part of a batch into micro-batches; see `sharding.micro_batches`."""
        return micro_batches(even_sizes(batch_size, self.dp), self.dp_rank, max_size)

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """Return the mean of ``values`` over all ranks."""
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self.control_group)
        return total / self.world_size

    def on_all_ranks(self, action: Callable[[], _T]) -> _T:
        """Run ``action`` on every rank; if it fails on one, raise its error there and OtherRankError elsewhere."""
        return self._run_together(action, range(self.world_size))

    def main_first(self, action: Callable[[], _T]) -> _T:
        """Run ``action`` on the main rank, then on the others, which find what it wrote; errors as `on_all_ranks`."""
        if self.is_main:
            result = self._run_together(action, range(1))
            self._run_together(_nothing, range(1, self.world_size))
            return result
        self._run_together(_nothing, range(1))
        return self._run_together(action, range(1, self.world_size))

    def on_main(self, action: Callable[[], _T]) -> _T:
        """Run ``action`` on the main rank only, and return its result on every rank; errors as `on_all_ranks`."""
        if self.world_size == 1:
            return action()
        result: list[_T | None] = [None]
        if self.is_main:
            result = [self._run_together(action, range(1))]
        else:
            self._run_together(_nothing, range(1))
        dist.broadcast_object_list(result, src=0, group=self.control_group)
        return result[0]  # type: ignore[return-value]  # the main rank's, of type _T

    def gather_failures(self, failures: _T | None) -> list[_T]:
        """Return the failures of each part of the batch that has some, on every rank; every rank must call this.

        Raises:
            UserError: on every rank, if ranks that share a part of the batch have different failures.
        """
        gathered, part_ranks = self.all_gather_objects(failures), self.world_size // self.dp
        for rank, found in enumerate(gathered):
            lead = rank // part_ranks * part_ranks
            if found != gathered[lead]:
                self.fail(
                    f"rank {rank} and rank {lead} share videos, but read them differently ({found}, not "
                    f"{gathered[lead]}): start every process on machines that have the same files"
                )
        return [found for found in gathered[::part_ranks] if found is not None]

    def gather_on_main(self, value: _T) -> list[_T]:
        """Return the value of each part of the batch, in order, on the main rank, and an empty list on others."""
        if self.world_size == 1:
            return [value]
        gathered: list[_T | None] | None = [None] * self.world_size if self.is_main else None
        leads = self.sp.rank == self.cfg.rank == 0
        dist.gather_object(value if leads else None, gathered, group=self.control_group)
        return gathered[:: self.world_size // self.dp] if gathered else []  # type: ignore[return-value]

    def check_same(self, what: str, value: str) -> None:
        """Raise UserError on every rank if ``value`` differs between ranks."""
        values = self.all_gather_objects(value)
        odd = [rank for rank, other in enumerate(values) if other != values[0]]
        if odd:
            self.fail(
                f"{what} of rank {odd[0]} differs from that of rank 0: start every process with the same command, on "
                "machines that have the same files"
            )

    def all_gather_objects(self, value: _T) -> list[_T]:
        """Return the values of all ranks, in order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[_T | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values  # type: ignore[return-value]  # every rank has filled its place

    def _run_together(self, action: Callable[[], _T], ranks: range) -> _T:
        """Run ``action``, and raise on every rank if it failed on one of ``ranks``."""
        if self.world_size == 1:
            return action()
        error: Exception | None = None
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


def _nothing() -> None:
    return None


def runs_on_cpu(device: str) -> bool:
    """Return whether to run on the CPU: if asked to, or if there is no accelerator.

    accelerate must be told so even if there is none; otherwise it starts no process group.
    """
    return device == "cpu" or not torch.accelerator.is_available()


def build_mesh(config: ParallelConfig, device: torch.device) -> Mesh:
    """Return the mesh of the processes that were started; every rank must call this.

    With ``sp = "auto"`` no videos are shared yet: see `resolve_sp`.

    Args:
        device: of this rank; its type decides the backend of the groups.

    Raises:
        UserError: on every rank, if the number of processes is no multiple of cfg x sp, or if settings differ.
    """
    sizes = {"sp": 1 if config.sp == "auto" else config.sp}
    if isinstance(config, SamplingParallelConfig):
        sizes = {"cfg": config.cfg, **sizes}
    if not dist.is_initialized():
        check_divides(config, sizes, 1)
        return Mesh(device=device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    world = Mesh(rank, world_size, device=device)
    world.check_same("parallel.*", str(config))
    world.on_all_ranks(lambda: check_divides(config, sizes, world_size))
    shape = (world_size // prod(sizes.values()), *sizes.values())
    grid = dist.init_device_mesh(device.type, shape, mesh_dim_names=("dp", *sizes))
    groups = {name: Group.of(grid.get_group(name)) for name, size in sizes.items() if size > 1}
    sp = replace(
        groups.get("sp", Group()),
        chunks=config.overlap_chunks,
        grid=None if config.grid == "auto" else Grid(*config.grid),
        speeds=_speeds(config, device.type == "cpu"),
    )
    return Mesh(rank, world_size, sp, groups.get("cfg", Group()), device)


def parallel_dims(config: ParallelConfig, processes: int, sp: int, on_cpu: bool) -> ParallelDims:
    """Return how processes would share the work with a value of sp; raise no error if they cannot.

    For another sp than that of the settings, the grid is as is fastest.
    """
    grid = None if config.grid == "auto" or config.grid[0] * config.grid[1] != sp else Grid(*config.grid)
    return ParallelDims(processes, sp, config.overlap_chunks, grid, _speeds(config, on_cpu))


def _speeds(config: ParallelConfig, on_cpu: bool) -> Speeds:
    tflops, gbit, latency, value_bytes = (0.1, 8.0, 500.0, 4) if on_cpu else (400.0, 3200.0, 20.0, 2)
    latency = latency if config.latency_us is None else config.latency_us
    values = (config.link_gbit or gbit) * 1e9 / 8 / value_bytes  # per second
    return Speeds((config.tflops or tflops) * 1e12 / values, latency / 1e6 * values, value_bytes)


def resolve_sp(mesh: Mesh, config: ParallelConfig, choose: Callable[[], SpChoice]) -> Mesh:
    """Return the mesh for the sp that the main rank chooses if ``sp = "auto"``; else ``mesh`` as it is."""
    if config.sp != "auto":
        return mesh
    choice = mesh.on_main(choose)
    if mesh.is_main:
        print(f"parallel.sp = auto, {mesh.world_size} processes: {choice}")
        if not choice.fits:
            print(
                "warning: it will probably run out of memory; use more processes, smaller batches, or shorter or "
                "smaller videos"
            )
    return build_mesh(replace(config, sp=choice.sp), mesh.device)


def check_divides(config: ParallelConfig, sizes: dict[str, int], processes: int) -> None:
    """Raise UserError unless the number of processes is a multiple of the product of the group sizes."""
    needed = prod(sizes.values())
    if processes % needed:
        settings = {f"parallel.{name}": str(size) for name, size in sizes.items() if size > 1}
        if config.grid != "auto" and sizes["sp"] > 1:
            settings = {
                "parallel.grid": f"{list(config.grid)}, of {settings.pop('parallel.sp')} ranks",
                **settings,
            }
        grid_hint = "" if config.grid == "auto" else " (parallel.grid = auto suits any parallel.sp)"
        flags = " and ".join(f"{name} = {value}" for name, value in settings.items())
        raise UserError(
            f"{flags}, but {processes} {'process was' if processes == 1 else 'processes were'} started: start a "
            f"multiple of {needed} (torchrun --nproc_per_node {needed} ...), or lower the setting{grid_hint}"
        )
