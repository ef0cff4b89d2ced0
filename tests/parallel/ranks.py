"""Run a function on several ranks: gloo processes that end together."""

import datetime
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from stdit.parallel.sequence.group import Group
from tests import warm
from tests.waiting import seconds_left


def run_on_ranks(ranks: int, function: Callable[..., None], *args: Any) -> None:
    """Call ``function(group, *args)`` on each of ``ranks`` processes; an error on one is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        warm.context()
        left = datetime.timedelta(seconds=seconds_left() or 86400)
        arguments = (ranks, Path(folder) / "store", left, function, args)
        mp.start_processes(_start, arguments, nprocs=ranks, start_method="forkserver")


def _start(
    rank: int,
    ranks: int,
    store: Path,
    timeout: datetime.timedelta,
    function: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", timeout, ranks, rank)
    function(Group.of(dist.group.WORLD), *args)
    dist.destroy_process_group()
