"""What the ranks of a run tell each other beside their work, so that all end when one fails, and one says why.

A thread of each rank writes a sign of life, and what its main thread is doing, to the store by which the ranks met.
It ends its process when another rank has failed, when one has been silent for too long, and when its own main thread
has not moved for too long, be it that it waits for a rank that hangs, or hangs itself. Then one rank says which rank
is to blame, in which step, and why; the others end without a word.
"""

import json
import multiprocessing
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NoReturn

from torch.distributed import PrefixStore, Store, TCPStore

from stdit.errors import LostRankError, OtherRankError, UserError
from stdit.parallel.config import TrainingParallelConfig
from stdit.parallel.processes.mesh import Mesh

ROOT = Path(__file__).parents[3]
INTERVAL = 1.0
"""Seconds between two signs of life."""
GRACE = 5.0
"""Seconds in which the first error of a run becomes known, and after which a rank without a sign of life is gone."""
NAMED = 8
"""Ranks that a message tells of, at most."""
FAILURE = "failure"
AGAIN = "The same command goes on from the newest whole checkpoint."


@dataclass
class Watchdog:
    """What a process is doing; of one that is alone, nobody wants to know."""

    doing: str = ""

    def phase(self, doing: str) -> None:
        """Say what begins now, such as "step 12, reading data"."""
        self.doing = doing

    def explained(self, error: Exception) -> Exception:
        """The error with which this process is to end."""
        return error

    def leave(self, code: int | None = None) -> None:
        """No more is to be watched; with a code, the others are to end at once, with that code."""


@dataclass(frozen=True)
class Report:
    """What a rank tells the others."""

    beat: int
    """Counts its signs of life; below 0 once it has left."""
    begun: int
    """How many things its main thread has begun: less than others, and it is the one they wait for."""
    doing: str
    place: str
    """Where in the code its main thread is, and on which machine."""

    def __str__(self) -> str:
        return ", ".join(part for part in (self.doing, self.place) if part)


@dataclass
class RankWatchdog(Watchdog):
    """The watch of one rank of several.

    Args:
        store: where the ranks meet; a connection that nothing else uses.
        heartbeat_timeout: seconds without a sign of life after which a rank counts as lost.
        timeout: seconds after which a main thread that has not moved hangs, or waits for one that does.
        end: how the process is ended when its main thread cannot.
    """

    store: Store = field(default_factory=lambda: TCPStore("localhost", 0, is_master=True))
    rank: int = 0
    size: int = 1
    heartbeat_timeout: float = 300.0
    timeout: float = 1800.0
    interval: float = INTERVAL
    grace: float = GRACE
    end: Callable[[int], None] = lambda code: end_process(code)

    def __post_init__(self) -> None:
        self.begun = self.beat = 0
        self._stop = threading.Event()
        self._heard: dict[int, tuple[int, float]] = {}
        self._main = threading.current_thread().ident
        self._still_since = self._looked = time.monotonic()
        self._stack: tuple[object, ...] = ()
        self._say()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch_the_store, name="watch of the store", daemon=True).start()

    def phase(self, doing: str) -> None:
        self.doing = doing
        self.begun += 1

    def leave(self, code: int | None = None) -> None:
        self._stop.set()
        self._thread.join(self.grace)
        if code is not None:
            self._blame(f"rank {self.rank} was told to stop at once", code)
        self.beat = -1
        self._say()

    def explained(self, error: Exception) -> Exception:
        """The error with which this process ends: its own, that of a rank that is lost, or another's."""
        if isinstance(error, OtherRankError):
            return error
        lost = [] if isinstance(error, UserError) else self._roll_call()
        if lost:
            other = self._reports([lost[0]]).get(lost[0])
            text = (
                f"rank {lost[0]} is lost, without a word, as {self._name()}, found: it was last heard of in "
                f"{other or 'its start'}"
            )
            mine: Exception = LostRankError(f"{text}. {AGAIN}")
        elif isinstance(error, UserError):
            text = f"{self._name()}: {error}" if self.doing or self.rank else str(error)
            mine = UserError(text)
        else:
            text, mine = f"{self._name()}: {type(error).__name__}: {error}", error
            mine.add_note(f"This happened on {self._name()}. {AGAIN}")
        code = mine.code if isinstance(mine, UserError) else 1
        if self._blame(text, code):
            return mine
        text, code = self._failure() or (text, code)
        return OtherRankError(text, code)

    def _name(self) -> str:
        return f"rank {self.rank}, {self.doing}" if self.doing else f"rank {self.rank}"

    def _run(self) -> None:
        """The thread."""
        try:
            before = time.monotonic()
            while not self._stop.wait(self.interval):
                now = time.monotonic()
                if (
                    now - before > self.heartbeat_timeout / 2
                ):  # this process was stopped: nobody else is to blame
                    self._heard.clear()
                    self._still_since = now
                before = self._looked = now
                self._look(now)
        except Exception as error:  # the store is gone, and with it the first machine
            if not self._stop.wait(self.grace):
                self._speak(
                    f"rank 0 is lost, or its machine: {self._name()}, cannot reach it ({error}). {AGAIN}"
                )
                self.end(1)

    def _watch_the_store(self) -> None:
        """A second thread, which asks the store nothing: one that is stopped, or cut off, never answers the first."""
        before = time.monotonic()
        while not self._stop.wait(self.interval):
            now = time.monotonic()
            if (
                now - before > self.heartbeat_timeout / 2
            ):  # this process was stopped, and its other thread, too
                self._looked = now
            before = now
            if now - self._looked > self.heartbeat_timeout + self.grace:
                self._speak(
                    f"rank 0 is lost, or its machine: {self._name()}, had no answer from it for "
                    f"{now - self._looked:.0f} s (parallel.heartbeat_timeout). {AGAIN}"
                )
                self.end(LostRankError.code)

    def _look(self, now: float) -> None:
        """Give a sign of life; end the process if the run has failed."""
        self._say()
        failure = self._failure()
        if failure is not None:
            if not self._stop.wait(self.grace):
                self.end(failure[1])
            return
        others = range(1, self.size) if self.rank == 0 else range(1)
        silent = self._silent(now, self._reports(others))
        if silent:
            rank, report = silent
            self._accuse(
                f"rank {rank} has given no sign of life for {self.heartbeat_timeout:g} s "
                f"(parallel.heartbeat_timeout): it was last heard of in {report}"
            )
        elif now - self._still_since > self.timeout:
            self._accuse(
                f"{self._name()}, has not moved for {self.timeout:g} s (parallel.timeout): {self._laggards()}"
            )

    def _silent(self, now: float, reports: dict[int, Report]) -> tuple[int, Report] | None:
        for rank, report in reports.items():
            beat, since = self._heard.get(rank, (None, now))
            if beat != report.beat or report.beat < 0:
                since = now
            self._heard[rank] = (report.beat, since)
            if now - since > self.heartbeat_timeout:
                return rank, report
        return None

    def _laggards(self) -> str:
        """Who is behind; if nobody is, where everybody is."""
        reports = self._reports(range(self.size))
        least = min(report.begun for report in reports.values())
        behind = [rank for rank, report in reports.items() if report.begun == least]
        named = "; ".join(f"rank {rank} is in {reports[rank]}" for rank in behind[:NAMED])
        return named + (f"; and so are {len(behind) - NAMED} more" if len(behind) > NAMED else "")

    def _accuse(self, text: str) -> None:
        """End the process for what another rank, or a thread that cannot be reached, has done."""
        if self._blame(text, LostRankError.code):
            self._speak(f"{text}. {AGAIN}")
        self.end(LostRankError.code)

    def _roll_call(self) -> list[int]:
        """Ranks that gave no sign of life for a while; none as soon as one has said why the run fails."""
        ranks = [rank for rank in range(self.size) if rank != self.rank]
        before = self._reports(ranks)
        deadline = time.monotonic() + self.grace
        while time.monotonic() < deadline:
            if self._failure():
                return []
            time.sleep(0.1)
        after = self._reports(ranks)
        return [
            rank
            for rank in ranks
            if rank not in after or (after[rank] == before.get(rank) and after[rank].beat >= 0)
        ]

    def _say(self) -> None:
        if self.beat >= 0:
            self.beat += 1
        frame = sys._current_frames().get(self._main or 0)
        stack = (self.begun, *((id(one.f_code), one.f_lasti) for one in callers(frame)))
        if stack != self._stack:
            self._stack, self._still_since = stack, time.monotonic()
        report = Report(self.beat, self.begun, self.doing, f"{place(frame)} on {socket.gethostname()}")
        self.store.set(str(self.rank), json.dumps(asdict(report)))

    def _reports(self, ranks: "range | list[int]") -> dict[int, Report]:
        """What the ranks have told, of those that have told something."""
        known = [rank for rank in ranks if rank in self._heard or self.store.check([str(rank)])]
        told = self.store.multi_get([str(rank) for rank in known]) if known else []
        return {rank: Report(**json.loads(text)) for rank, text in zip(known, told, strict=True)}

    def _failure(self) -> tuple[str, int] | None:
        """Why the run has failed, and with which code its processes end; None if it goes well."""
        if not self.store.check([FAILURE]):
            return None
        text, code, _ = json.loads(self.store.get(FAILURE))
        return text, code

    def _blame(self, text: str, code: int) -> bool:
        """Tell all ranks why the run has failed; False if another was first, who speaks."""
        mine = json.dumps([text, code, self.rank])
        return self.store.compare_set(FAILURE, "", mine).decode() == mine

    def _speak(self, text: str) -> None:
        print(f"error: {text}", file=sys.stderr, flush=True)


def callers(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and those that called it."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def place(frame: FrameType | None) -> str:
    """Where in this project's code a thread is, and which function of others it has called from there."""
    inner = next(callers(frame), None)
    for one in callers(frame):
        path = Path(one.f_code.co_filename)
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            called = f", in {inner.f_code.co_name}" if inner is not None and inner is not one else ""
            return f"{path.relative_to(ROOT)}:{one.f_lineno}{called}"
    return f"{inner.f_code.co_name}" if inner is not None else ""


def end_process(code: int) -> NoReturn:
    """End without waiting for a main thread that may be stuck in a library; loader processes go first."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def build_watchdog(mesh: Mesh, config: TrainingParallelConfig) -> Watchdog:
    """The watch of this process; all ranks make theirs together."""
    if mesh.world_size == 1:
        return Watchdog()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(
        address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=config.timeout)
    )
    name = mesh.all_gather_objects(secrets.token_hex(8))[
        0
    ]  # torchrun keeps its store when it starts processes anew
    return RankWatchdog(
        store=PrefixStore(f"stdit/watch/{name}", store),
        rank=mesh.rank,
        size=mesh.world_size,
        heartbeat_timeout=config.heartbeat_timeout,
        timeout=config.timeout,
    )


@contextmanager
def watching(watchdog: Watchdog) -> Iterator[Watchdog]:
    """While it lasts, the ranks look after each other; an error that ends it ends all, and says whose it is.

    Raises:
        UserError, or what was raised in it: on the rank that is to speak; `OtherRankError` on the others.
    """
    try:
        yield watchdog
    except KeyboardInterrupt as stop:
        watchdog.leave(getattr(stop, "code", 130))
        raise
    except Exception as error:
        explained = watchdog.explained(error)
        watchdog.leave()
        if explained is error:
            raise
        raise explained from error
    watchdog.leave()
