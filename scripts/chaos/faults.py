"""Faults of scripts/chaos/chaos.py: each waits for a moment of a running job, strikes, and returns a description."""

import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from scripts.chaos.jobs import Job, send_signal
from scripts.chaos.runs import checkpoint, is_saving, read_lines, steps_done, visible_steps
from scripts.network import Network

SAVING_SECONDS = 0.02
"""Longest time to let a checkpoint be written before the kill."""
PAUSE_SECONDS = 1.5
"""How long a paused rank is stopped."""


class MissedError(Exception):
    """The job ended before the fault could strike."""


class StuckError(Exception):
    """The job neither made progress nor ended within its time limit."""


@dataclass
class FaultContext:
    """A running job, and when a fault should strike it."""

    job: Job
    run: Path
    """The folder of the run."""
    rng: random.Random
    target: int
    """Steps after which to strike."""
    startup: float
    """Approximate seconds from launch to the first step."""
    limit: float
    """Seconds without progress after which a job is stuck."""
    damaged: set[int] = field(default_factory=set)
    """Steps of the checkpoints that earlier faults damaged."""
    network: Network | None = None
    """The pair of network namespaces that its ranks run in, if any."""
    launched: float = field(default_factory=time.time)

    def wait_for(self, condition: Callable[[], bool], pause: float = 0.01) -> None:
        """Wait until a condition holds. Raises MissedError if the job ends, StuckError after the time limit."""
        deadline = time.monotonic() + self.limit
        while not condition():
            if self.job.poll() is not None:
                raise MissedError
            if time.monotonic() > deadline:
                raise StuckError(f"no progress for {self.limit:g} s, at step {steps_done(self.run)}")
            time.sleep(pause)

    def reach_target(self) -> None:
        """Wait until this job, not an earlier one, has reached the target step."""
        file = self.run / "metrics.jsonl"
        self.wait_for(lambda: file.exists() and file.stat().st_mtime >= self.launched)
        self.wait_for(lambda: steps_done(self.run) >= self.target)

    def some_ranks(self) -> tuple[list[int], str]:
        """Choose a rank at random; return its process id and its name."""
        ranks = self.job.ranks()
        if not ranks:
            raise MissedError
        number = self.rng.randrange(len(ranks))
        return [ranks[number]], f"rank {number} of {len(ranks)}"


def any_moment(context: FaultContext) -> None:
    """Wait for a random moment: of the start (one in six), or of a step."""
    if context.rng.random() < 1 / 6:
        moment = time.monotonic() + context.rng.uniform(0, context.startup)
        context.wait_for(lambda: time.monotonic() > moment)
        return
    context.reach_target()
    moment = time.monotonic() + context.rng.uniform(0, 0.1)
    context.wait_for(lambda: time.monotonic() > moment, pause=0.002)


def while_saving(context: FaultContext) -> None:
    """Wait for a random moment at which a checkpoint is being written."""
    context.reach_target()
    while True:
        context.wait_for(lambda: is_saving(context.run, context.launched), pause=0.0002)
        time.sleep(context.rng.uniform(0, SAVING_SECONDS) * context.rng.random())
        if is_saving(context.run, context.launched):
            return


def kill(context: FaultContext) -> str:
    """Kill all processes at once, as a power failure does."""
    any_moment(context)
    return _kill(context, context.job.everyone(), "all processes")


def kill_rank(context: FaultContext) -> str:
    """Kill one rank."""
    any_moment(context)
    return _kill(context, *context.some_ranks())


def kill_saving(context: FaultContext) -> str:
    """Kill all processes, or one rank, while a checkpoint is being written."""
    everyone = context.rng.random() < 0.5
    while_saving(context)
    return _kill(context, *((context.job.everyone(), "all processes") if everyone else context.some_ranks()))


def kill_with_checkpoints(context: FaultContext) -> str:
    """Kill all processes once there are two checkpoints, so that the newest may be damaged."""
    context.wait_for(lambda: len(set(visible_steps(context.run)) - context.damaged) > 1)
    return kill(context)


def _kill(context: FaultContext, pids: list[int], whose: str) -> str:
    if not pids:
        raise MissedError
    send_signal(signal.SIGKILL, pids)
    return f"kill -9 to {whose}"


def stop_rank(context: FaultContext) -> str:
    """Stop one rank for good (SIGSTOP); the others wait for it."""
    any_moment(context)
    pids, whose = context.some_ranks()
    send_signal(signal.SIGSTOP, pids)
    return f"stopped {whose}"


def pause(context: FaultContext) -> str:
    """Stop one rank for a while; later kill all processes."""
    any_moment(context)
    pids, whose = context.some_ranks()
    send_signal(signal.SIGSTOP, pids)
    time.sleep(PAUSE_SECONDS)
    send_signal(signal.SIGCONT, pids)
    context.reach_target()
    steps = steps_done(context.run)
    context.wait_for(lambda: steps_done(context.run) > steps)
    return f"stopped {whose} for {PAUSE_SECONDS} s, then " + _kill(
        context, context.job.everyone(), "all processes"
    )


def full_disk(context: FaultContext) -> str:
    """Limit the size of files, so that none, or only small ones, can be written."""
    any_moment(context)
    small = sum(map(len, read_lines(context.run))) + 8192
    limit = context.rng.choice([1, small])
    for pid in context.job.everyone():
        try:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit))
        except ProcessLookupError:
            raise MissedError from None
    return f"files cannot grow beyond {limit} bytes"


def drop_link(context: FaultContext) -> str:
    """Take down the network between two halves of the ranks."""
    assert context.network is not None
    any_moment(context)
    space = context.network.prefixes[-1][-1]
    subprocess.run(["ip", "-n", space, "link", "set", "link0", "down"], check=True)
    return "link down"


def signalled(number: signal.Signals) -> Callable[[FaultContext], str]:
    """Return a fault that sends a signal to one rank while it trains."""

    def strike(context: FaultContext) -> str:
        context.reach_target()
        time.sleep(context.rng.uniform(0, 0.1))
        pids, whose = context.some_ranks()
        send_signal(number, pids)
        return f"{number.name} to {whose}"

    return strike


def truncate(folder: Path, rng: random.Random) -> str:
    """Cut a file."""
    file, size = _some_file(folder, rng)
    keep = rng.randrange(size)
    with file.open("r+b") as opened:
        opened.truncate(keep)
    return f"cut {file.relative_to(folder)} to {keep} of {size} bytes"


def flip(folder: Path, rng: random.Random) -> str:
    """Flip one bit of a file."""
    file, size = _some_file(folder, rng)
    position, bit = rng.randrange(size), rng.randrange(8)
    with file.open("r+b") as opened:
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ (1 << bit)]))
    return f"flipped bit {bit} of byte {position} of {file.relative_to(folder)}"


def delete(folder: Path, rng: random.Random) -> str:
    """Delete a file, or all."""
    if rng.random() < 0.2:
        shutil.rmtree(folder)
        folder.mkdir()
        return "emptied the folder"
    file, _ = _some_file(folder, rng)
    file.unlink()
    return f"deleted {file.relative_to(folder)}"


def _some_file(folder: Path, rng: random.Random) -> tuple[Path, int]:
    """Choose a file that is not empty; return it and its size."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    file = rng.choice(files)
    return file, file.stat().st_size


def damage_newest(context: FaultContext, how: Callable[[Path, random.Random], str]) -> str:
    """Damage the newest complete checkpoint, if there is another one. Raises MissedError if not."""
    complete = sorted(set(visible_steps(context.run)) - context.damaged)
    if len(complete) < 2:
        raise MissedError
    context.damaged.add(complete[-1])
    return f"{checkpoint(context.run, complete[-1]).name}: {how(checkpoint(context.run, complete[-1]), context.rng)}"


@dataclass(frozen=True)
class Fault:
    """Something that happens to a run, and how the job may end then."""

    strike: Callable[[FaultContext], str]
    weight: float = 1
    """Relative frequency."""
    codes: Callable[[int], bool] = bool
    """Whether an exit code is right; default: any but 0."""
    damage: Callable[[Path, random.Random], str] | None = None
    """Damage done to the newest checkpoint after the job has ended."""
    least_ranks: int = 1
    over_link: bool = False
    """Whether ranks must run in two network namespaces."""
    loses_nothing: bool = False
    """Whether the run must save before it ends."""


FAULTS = {
    "kill": Fault(kill, weight=3),
    "kill_rank": Fault(kill_rank, weight=3),
    "kill_saving": Fault(kill_saving, weight=6),
    "truncate": Fault(kill_with_checkpoints, damage=truncate),
    "flip": Fault(kill_with_checkpoints, damage=flip),
    "delete": Fault(kill_with_checkpoints, damage=delete),
    "full_disk": Fault(full_disk),
    "stop_rank": Fault(stop_rank, weight=0.5, least_ranks=2),
    "pause": Fault(pause),
    "drop_link": Fault(drop_link, weight=0.5, least_ranks=2, over_link=True),
    "sigterm": Fault(signalled(signal.SIGTERM), codes=lambda code: code == 0, loses_nothing=True),
    "sigusr1": Fault(signalled(signal.SIGUSR1), codes=lambda code: code == 0, loses_nothing=True),
    "sigint": Fault(signalled(signal.SIGINT), codes=lambda code: code in (130, 1), loses_nothing=True),
}
