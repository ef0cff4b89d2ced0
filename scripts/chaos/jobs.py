"""Start training on several processes for scripts/chaos/chaos.py, and list those processes.

A job is one start of ``train.py``, from launch to the end of its last process. The warm launcher forks ranks from a
process that has imported everything, so that a start takes a second or two; any other launcher is a command line.
"""

import ctypes
import multiprocessing
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

import psutil

from scripts.network import LOOPBACK, Network
from stdit.errors import UserError

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "torchrun": "{python} -m torch.distributed.run --nproc_per_node {ranks} --master_addr 127.0.0.1 "
    "--master_port {port} train.py",
    "python": "{python} train.py",
}
"""Command lines of launchers, by name."""
PATIENCE = 1.0
"""Seconds from the failure of one rank until the others are asked to end (SIGTERM)."""
GRACE = 15.0
"""Seconds after which ranks that were asked to end are killed; torchrun waits for 30."""
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
CLONE_NEWNET = 0x40000000  # setns(2)


@dataclass(frozen=True)
class Split:
    """How the processes of a job share the work: dp x sp or dp x grid, parameters sharded or not."""

    dp: int
    sp: tuple[int, ...]
    """Ranks that share a video; or their grid, in time and in space."""
    sharded: bool = False

    @property
    def ranks(self) -> int:
        return self.dp * prod(self.sp)

    @property
    def flags(self) -> list[str]:
        """Arguments of ``train.py``."""
        is_grid = len(self.sp) > 1
        sharing = ["--parallel.grid", str(list(self.sp))] if is_grid else ["--parallel.sp", str(self.sp[0])]
        return [*sharing, "--parallel.shard_parameters", str(self.sharded).lower()]

    def __str__(self) -> str:
        return "x".join(map(str, (self.dp, *self.sp))) + (":sharded" if self.sharded else "")


def parse_split(text: str) -> Split:
    """Read ``DPxSP`` or ``DPxTIMExSPACE``, with or without ``:sharded``. Raises UserError."""
    sizes, _, suffix = text.partition(":")
    numbers = sizes.split("x")
    valid = len(numbers) in (2, 3) and all(n.isdecimal() and int(n) > 0 for n in numbers)
    if not valid or text != f"{sizes}:sharded" and text != sizes:
        raise UserError(
            f"--splits {text}: must be DPxSP or DPxTIMExSPACE, and :sharded or nothing, such as 2x1, 1x2x2 or "
            "2x2:sharded"
        )
    return Split(int(numbers[0]), tuple(map(int, numbers[1:])), bool(suffix))


class Job(Protocol):
    """One start of training."""

    forced: bool
    """Whether ranks had to be killed after they were asked to end."""

    def poll(self) -> int | None:
        """The exit code once all ranks have ended (negative: the signal that killed it); until then None."""

    def ranks(self) -> list[int]:
        """Process ids of the living ranks on this machine, in order."""

    def everyone(self) -> list[int]:
        """Process ids of all its living processes: launcher, ranks, and those that they started."""


class ForkedJob:
    """Ranks forked from this process. When one fails the others are asked to end, as torchrun does."""

    def __init__(self, processes: Sequence[BaseProcess]) -> None:
        self.processes, self.forced = processes, False
        self._code, self._failed, self._asked = 0, 0.0, False

    def poll(self) -> int | None:
        codes = [process.exitcode for process in self.processes]
        if not self._failed and any(codes):
            self._code, self._failed = next(code for code in codes if code), time.monotonic()
        if None not in codes:
            return self._code
        since = time.monotonic() - self._failed if self._failed else 0.0
        if since > PATIENCE and not self._asked:
            self._asked = True
            send_signal(signal.SIGTERM, self.ranks())
        if since > PATIENCE + GRACE:
            self.forced = True
            send_signal(signal.SIGKILL, self.ranks())
        return None

    def ranks(self) -> list[int]:
        return [process.pid for process in self.processes if process.pid and process.exitcode is None]

    def everyone(self) -> list[int]:
        return [pid for rank in self.ranks() for pid in (rank, *descendants(rank))]


class CommandJob:
    """A command that starts ranks, or is one."""

    forced = False

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process

    def poll(self) -> int | None:
        return self.process.poll()

    def ranks(self) -> list[int]:
        """Return the processes that have a RANK in their environment; if none has, the command itself trains."""
        found: dict[int, int] = {}
        for pid in self.everyone():
            try:
                rank = psutil.Process(pid).environ().get("RANK", "")
            except psutil.Error:
                continue  # it has ended
            if rank.isdecimal():
                found.setdefault(int(rank), pid)
        return [found[rank] for rank in sorted(found)] or self.everyone()[:1]

    def everyone(self) -> list[int]:
        return [self.process.pid, *descendants(self.process.pid)] if self.poll() is None else []


class Launcher(Protocol):
    """Starts jobs."""

    takes_networks: bool
    """Whether it can start ranks in network namespaces."""

    def start(self, split: Split, argv: Sequence[str], log: Path, network: Network = LOOPBACK) -> Job:
        """Start ``train.py`` with these arguments and the flags of a split; output and errors go to ``log``."""


class CommandLauncher:
    """A command line with ``{ranks}``, ``{port}`` and ``{python}`` in it, to which arguments are added."""

    takes_networks = False

    def __init__(self, template: str) -> None:
        self.template = COMMANDS.get(template, template)
        try:
            self._command(1)
        except (ValueError, KeyError, IndexError) as error:
            raise UserError(
                f"--launcher {template!r} cannot be read ({error!r}): use warm, {', '.join(COMMANDS)}, or a command "
                "with {ranks} and {port} in it, such as 'srun -n {ranks} python train.py'"
            ) from None

    def _command(self, ranks: int) -> list[str]:
        template = (
            COMMANDS["python"] if ranks == 1 and self.template == COMMANDS["torchrun"] else self.template
        )
        return shlex.split(template.format(ranks=ranks, port=free_port(), python=shlex.quote(sys.executable)))

    def start(self, split: Split, argv: Sequence[str], log: Path, network: Network = LOOPBACK) -> Job:
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*self._command(split.ranks), *argv, *split.flags],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process, which then ends the job
            )
        return CommandJob(process)


class WarmLauncher:
    """Forks ranks from this process, which imports what training needs first; no thread may run in it."""

    takes_networks = True

    def __init__(self) -> None:
        import accelerate  # noqa: F401
        import jsonargparse  # noqa: F401
        import torch.distributed.checkpoint  # noqa: F401

        import stdit.pipelines.pipeline  # noqa: F401
        import stdit.training.session  # noqa: F401
        import train  # noqa: F401

    def start(self, split: Split, argv: Sequence[str], log: Path, network: Network = LOOPBACK) -> Job:
        context = multiprocessing.get_context("fork")
        arguments, port, processes = [*argv, *split.flags], str(free_port()), []
        for rank in range(split.ranks):
            environment: dict[str, str] = {}
            if split.ranks > 1:
                environment = network.environment | {"MASTER_PORT": port}
                environment |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
                environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(split.ranks))
            space = network.prefixes[rank % len(network.prefixes)][-1] if network.prefixes else None
            processes.append(context.Process(target=_train, args=(arguments, environment, log, space)))
        for process in processes:
            process.start()
        return ForkedJob(processes)


def _train(argv: Sequence[str], environment: dict[str, str], log: Path, space: str | None) -> None:
    """Train in a forked rank, set up like a process that was started by a command."""
    from stdit.cli import run
    from train import main

    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if space is not None:
        enter(space)
    os.environ.update(environment)
    sys.argv = ["train.py", *argv]
    run(main)


def enter(space: str) -> None:
    """Move this process into a network namespace that ``ip netns add`` made."""
    with open(f"/run/netns/{space}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {space}")


def adopt_orphans(adopt: bool = True) -> None:
    """Become the parent of processes whose parent dies, so that `remaining_processes` finds them. Linux only."""
    if sys.platform != "linux":
        raise UserError("this script needs Linux, where processes that a job leaves behind can be found")
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def remaining_processes() -> list[int]:
    """Return the living descendants of this process; while no job runs, these were left behind."""
    for child in psutil.Process().children():
        if child.status() == psutil.STATUS_ZOMBIE:
            os.waitpid(child.pid, os.WNOHANG)
    return descendants(os.getpid())


def descendants(pid: int) -> list[int]:
    """Return the ids of the living descendants of a process."""
    try:
        return [
            p.pid for p in psutil.Process(pid).children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE
        ]
    except psutil.NoSuchProcess:
        return []


def send_signal(number: signal.Signals, pids: Iterable[int]) -> None:
    """Send a signal to processes, some of which may be gone."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
