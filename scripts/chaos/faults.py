"""The faults of scripts/chaos/chaos.py: each waits for its moment in a running job, strikes, and says what it did."""

import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from scripts.bench.sequence import Place
from scripts.chaos.jobs import Job, send
from scripts.chaos.runs import checkpoint, is_saving, read_lines, steps_done, visible

SAVING_SECONDS = 0.02
"""Longest time to let a checkpoint be written before the kill."""
PAUSE_SECONDS = 1.5
"""How long a paused rank is stopped."""


class MissedError(Exception):
    """The job ended before the fault could strike."""


class StuckError(Exception):
    """The job neither went on nor ended for as long as it may take."""


@dataclass
class Scene:
    """A running job, and when a fault is to strike it."""

    job: Job
    run: Path
    """The folder of the run."""
    rng: random.Random
    target: int
    """Steps after which to strike."""
    startup: float
    """Seconds from launch to the first step, about."""
    limit: float
    """Seconds after which a job that does not go on is stuck."""
    damaged: set[int] = field(default_factory=set)
    """Steps of the checkpoints that earlier faults damaged."""
    place: Place | None = None
    """The network that its ranks are in, if it is one of our own."""
    launched: float = field(default_factory=time.time)

    def wait_for(self, condition: Callable[[], bool], pause: float = 0.01) -> None:
        """Return as soon as a condition holds."""
        deadline = time.monotonic() + self.limit
        while not condition():
            if self.job.poll() is not None:
                raise MissedError
            if time.monotonic() > deadline:
                raise StuckError(f"no progress for {self.limit:g} s, at step {steps_done(self.run)}")
            time.sleep(pause)

    def reach_target(self) -> None:
        """Wait until this job, and not one before it, has done the steps."""
        file = self.run / "metrics.jsonl"
        self.wait_for(lambda: file.exists() and file.stat().st_mtime >= self.launched)
        self.wait_for(lambda: steps_done(self.run) >= self.target)

    def some_ranks(self) -> tuple[list[int], str]:
        """One rank by chance, and its name."""
        ranks = self.job.ranks()
        if not ranks:
            raise MissedError
        number = self.rng.randrange(len(ranks))
        return [ranks[number]], f"rank {number} of {len(ranks)}"


def any_moment(scene: Scene) -> None:
    """Wait for a moment of the start (one in six), or of a step."""
    if scene.rng.random() < 1 / 6:
        moment = time.monotonic() + scene.rng.uniform(0, scene.startup)
        scene.wait_for(lambda: time.monotonic() > moment)
        return
    scene.reach_target()
    moment = time.monotonic() + scene.rng.uniform(0, 0.1)
    scene.wait_for(lambda: time.monotonic() > moment, pause=0.002)


def while_saving(scene: Scene) -> None:
    """Wait for a moment in which a checkpoint is being written."""
    scene.reach_target()
    while True:
        scene.wait_for(lambda: is_saving(scene.run, scene.launched), pause=0.0002)
        time.sleep(scene.rng.uniform(0, SAVING_SECONDS) * scene.rng.random())
        if is_saving(scene.run, scene.launched):
            return


def kill(scene: Scene) -> str:
    """All processes die at once, as when the power fails."""
    any_moment(scene)
    return _kill(scene, scene.job.everyone(), "all processes")


def kill_rank(scene: Scene) -> str:
    """One rank dies."""
    any_moment(scene)
    return _kill(scene, *scene.some_ranks())


def kill_saving(scene: Scene) -> str:
    """All processes, or one rank, die while a checkpoint is written."""
    whole = scene.rng.random() < 0.5
    while_saving(scene)
    return _kill(scene, *((scene.job.everyone(), "all processes") if whole else scene.some_ranks()))


def kill_with_checkpoints(scene: Scene) -> str:
    """All processes die when there are two checkpoints, one of which may then be damaged."""
    scene.wait_for(lambda: len(set(visible(scene.run)) - scene.damaged) > 1)
    return kill(scene)


def _kill(scene: Scene, pids: list[int], whose: str) -> str:
    if not pids:
        raise MissedError
    send(signal.SIGKILL, pids)
    return f"kill -9 to {whose}"


def stop_rank(scene: Scene) -> str:
    """One rank stops for good, and the others wait for it."""
    any_moment(scene)
    pids, whose = scene.some_ranks()
    send(signal.SIGSTOP, pids)
    return f"stopped {whose}"


def pause(scene: Scene) -> str:
    """One rank stops and goes on; later all processes die."""
    any_moment(scene)
    pids, whose = scene.some_ranks()
    send(signal.SIGSTOP, pids)
    time.sleep(PAUSE_SECONDS)
    send(signal.SIGCONT, pids)
    scene.reach_target()
    steps = steps_done(scene.run)
    scene.wait_for(lambda: steps_done(scene.run) > steps)
    return f"stopped {whose} for {PAUSE_SECONDS} s, then " + _kill(
        scene, scene.job.everyone(), "all processes"
    )


def full_disk(scene: Scene) -> str:
    """Files cannot grow any more: none, or none but the small ones."""
    any_moment(scene)
    small = sum(map(len, read_lines(scene.run))) + 8192
    limit = scene.rng.choice([1, small])
    for pid in scene.job.everyone():
        try:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit))
        except ProcessLookupError:
            raise MissedError from None
    return f"files cannot grow beyond {limit} bytes"


def drop_link(scene: Scene) -> str:
    """The network between two halves of the ranks goes down."""
    assert scene.place is not None
    any_moment(scene)
    space = scene.place.prefixes[-1][-1]
    subprocess.run(["ip", "-n", space, "link", "set", "link0", "down"], check=True)
    return "link down"


def signalled(number: signal.Signals) -> Callable[[Scene], str]:
    """A signal to one rank that trains."""

    def strike(scene: Scene) -> str:
        scene.reach_target()
        time.sleep(scene.rng.uniform(0, 0.1))
        pids, whose = scene.some_ranks()
        send(number, pids)
        return f"{number.name} to {whose}"

    return strike


def truncate(folder: Path, rng: random.Random) -> str:
    file, size = _some_file(folder, rng)
    keep = rng.randrange(size)
    with file.open("r+b") as opened:
        opened.truncate(keep)
    return f"cut {file.relative_to(folder)} to {keep} of {size} bytes"


def flip(folder: Path, rng: random.Random) -> str:
    file, size = _some_file(folder, rng)
    place, bit = rng.randrange(size), rng.randrange(8)
    with file.open("r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([byte ^ (1 << bit)]))
    return f"flipped bit {bit} of byte {place} of {file.relative_to(folder)}"


def delete(folder: Path, rng: random.Random) -> str:
    if rng.random() < 0.2:
        shutil.rmtree(folder)
        folder.mkdir()
        return "emptied the folder"
    file, _ = _some_file(folder, rng)
    file.unlink()
    return f"deleted {file.relative_to(folder)}"


def _some_file(folder: Path, rng: random.Random) -> tuple[Path, int]:
    """A file that is not empty, and its size."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    file = rng.choice(files)
    return file, file.stat().st_size


def damage_newest(scene: Scene, how: Callable[[Path, random.Random], str]) -> str:
    """Damage the newest checkpoint that is whole, if there is another one."""
    whole = sorted(set(visible(scene.run)) - scene.damaged)
    if len(whole) < 2:
        raise MissedError
    scene.damaged.add(whole[-1])
    return f"{checkpoint(scene.run, whole[-1]).name}: {how(checkpoint(scene.run, whole[-1]), scene.rng)}"


@dataclass(frozen=True)
class Fault:
    """Something that happens to a run, and how the job may end then."""

    strike: Callable[[Scene], str]
    weight: float = 1
    """How often, relative to others."""
    codes: Callable[[int], bool] = bool
    """Whether an exit code is right; default: any but 0."""
    damage: Callable[[Path, random.Random], str] | None = None
    """What is done to the newest checkpoint when the job has ended."""
    least_ranks: int = 1
    over_link: bool = False
    """Whether ranks have to be in two networks of our own."""
    loses_nothing: bool = False
    """Whether the run is to save before it ends."""


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
