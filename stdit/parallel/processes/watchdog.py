"""Watchdog of the ranks of a run: when one dies, hangs or fails, all processes end and one error says why.

A thread of each rank writes a heartbeat, with what its main thread is doing, to the store of the rendezvous. It ends
its process when another rank has failed, when another rank sends no heartbeat for ``parallel.heartbeat_timeout``, and
when its own main thread makes no progress for ``parallel.timeout``, because it waits for a rank that hangs or hangs
itself. One rank then prints which rank failed, in which step, and why; the others end quietly.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType

from torch.distributed import PrefixStore, Store, TCPStore

from stdit.errors import LostRankError, OtherRankError, UserError, interrupt_behind
from stdit.parallel.config import TrainingParallelConfig
from stdit.parallel.processes.exit import end_process
from stdit.parallel.processes.mesh import Mesh

HEARTBEAT_SECONDS = 1.0
"""Seconds between two heartbeats."""
GRACE_SECONDS = 5.0
"""Seconds for the first error of a run to reach all ranks, and after which a rank without a new heartbeat is lost."""
_RESUME_HINT = "The same command resumes from the newest complete checkpoint."
_REPOSITORY = Path(__file__).parents[3]
_FAILURE_KEY = "failure"
_MAX_NAMED_RANKS = 8


@dataclass
class Watchdog:
    """Watchdog of a single process, which does nothing but record its phase."""

    current_phase: str = ""

    def phase(self, name: str) -> None:
        """Record what begins now, such as "step 12, waiting for data"."""
        self.current_phase = name

    def explain(self, error: Exception) -> Exception:
        """Return the exception with which this process should end because of ``error``."""
        return error

    def stop(self, code: int | None = None) -> None:
        """Stop watching. With an exit code, end all other ranks at once, with that code."""


@dataclass(frozen=True)
class RankStatus:
    """The content of a heartbeat."""

    heartbeat: int
    """Number of heartbeats so far; -1 once the rank has stopped watching."""
    phases: int
    """Number of phases that the main thread has begun; the rank with the fewest is the one that others wait for."""
    phase: str
    location: str
    """File and line of the main thread, and the host."""

    def __str__(self) -> str:
        return ", ".join(part for part in (self.phase, self.location) if part)


@dataclass
class RankWatchdog(Watchdog):
    """Watchdog of one of several ranks; starts its threads when it is made.

    Args:
        store: store that all ranks share; a connection that nothing else uses.
        heartbeat_timeout: seconds without a heartbeat after which a rank is lost.
        timeout: seconds without progress of the main thread after which the run has failed.
        interval: seconds between two heartbeats.
        grace: see `GRACE_SECONDS`.
        end: ends this process with an exit code while its main thread may be stuck.
    """

    store: Store = field(default_factory=lambda: TCPStore("localhost", 0, is_master=True))
    rank: int = 0
    size: int = 1
    heartbeat_timeout: float = 300.0
    timeout: float = 1800.0
    interval: float = HEARTBEAT_SECONDS
    grace: float = GRACE_SECONDS
    end: Callable[[int], None] = lambda code: end_process(code)

    def __post_init__(self) -> None:
        self.phases = self.heartbeat = 0
        self._stopped = threading.Event()
        self._seen: dict[int, tuple[int, float]] = {}
        """By rank, its newest heartbeat and when that was first seen."""
        self._main_thread = threading.current_thread().ident
        self._progress_at = self._checked_at = time.monotonic()
        self._stack: tuple[object, ...] = ()
        self._send_heartbeat()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch_store, name="watchdog of the store", daemon=True).start()

    def phase(self, name: str) -> None:
        self.current_phase = name
        self.phases += 1

    def stop(self, code: int | None = None) -> None:
        self._stopped.set()
        self._thread.join(self.grace)
        if code is not None:
            self._record_failure(f"rank {self.rank} received a signal to stop at once", code)
        self.heartbeat = -1
        self._send_heartbeat()

    def explain(self, error: Exception) -> Exception:
        """Return the exception to end with: this rank's own, that a rank is lost, or that another rank failed."""
        if isinstance(error, OtherRankError):
            return error
        lost = [] if isinstance(error, UserError) else self._lost_ranks()
        if lost:
            status = self._statuses([lost[0]]).get(lost[0])
            text = (
                f"rank {lost[0]} is lost: it ended without an error message, as noticed by {self._name()}. Its last "
                f"heartbeat was in {status or 'its start'}"
            )
            own: Exception = LostRankError(f"{text}. {_RESUME_HINT}")
        elif isinstance(error, UserError):
            text = f"{self._name()}: {error}" if self.current_phase or self.rank else str(error)
            own = UserError(text)
        else:
            text, own = f"{self._name()}: {type(error).__name__}: {error}", error
            own.add_note(f"This happened on {self._name()}. {_RESUME_HINT}")
        code = own.code if isinstance(own, UserError) else 1
        if self._record_failure(text, code):
            return own
        text, code = self._failure() or (text, code)
        return OtherRankError(text, code)

    def _name(self) -> str:
        return f"rank {self.rank}, {self.current_phase}" if self.current_phase else f"rank {self.rank}"

    def _run(self) -> None:
        """Send heartbeats and check the other ranks, in a thread, until stopped."""
        try:
            before = time.monotonic()
            while not self._stopped.wait(self.interval):
                now = time.monotonic()
                if now - before > self.heartbeat_timeout / 2:  # this process was suspended: start again
                    self._seen.clear()
                    self._progress_at = now
                before = self._checked_at = now
                self._check(now)
        except Exception as error:  # the store is gone, and with it the machine of rank 0
            if not self._stopped.wait(self.grace):
                _print_error(f"rank 0 or its machine is lost: {self._name()}, cannot reach it ({error})")
                self.end(1)

    def _watch_store(self) -> None:
        """End the process if the first thread gets no answer from the store, which may hang for ever."""
        before = time.monotonic()
        while not self._stopped.wait(self.interval):
            now = time.monotonic()
            if now - before > self.heartbeat_timeout / 2:  # this process was suspended, with both threads
                self._checked_at = now
            before = now
            if now - self._checked_at > self.heartbeat_timeout + self.grace:
                _print_error(
                    f"rank 0 or its machine is lost: {self._name()}, had no answer from it for "
                    f"{now - self._checked_at:.0f} s (parallel.heartbeat_timeout)"
                )
                self.end(LostRankError.code)

    def _check(self, now: float) -> None:
        """Send a heartbeat, and end the process if the run has failed. Rank 0 checks all ranks, others rank 0."""
        self._send_heartbeat()
        failure = self._failure()
        if failure is not None:
            if not self._stopped.wait(self.grace):
                self.end(failure[1])
            return
        others = range(1, self.size) if self.rank == 0 else range(1)
        silent = self._silent_rank(now, self._statuses(others))
        if silent:
            rank, status = silent
            self._fail_and_end(
                f"rank {rank} has sent no heartbeat for {self.heartbeat_timeout:g} s "
                f"(parallel.heartbeat_timeout): its last one was in {status}"
            )
        elif now - self._progress_at > self.timeout:
            self._fail_and_end(
                f"{self._name()}, has made no progress for {self.timeout:g} s (parallel.timeout): "
                f"{self._slowest_ranks()}"
            )

    def _silent_rank(self, now: float, statuses: dict[int, RankStatus]) -> tuple[int, RankStatus] | None:
        """Return a rank whose heartbeat has not changed for ``heartbeat_timeout``."""
        for rank, status in statuses.items():
            heartbeat, since = self._seen.get(rank, (None, now))
            if heartbeat != status.heartbeat or status.heartbeat < 0:
                since = now
            self._seen[rank] = (status.heartbeat, since)
            if now - since > self.heartbeat_timeout:
                return rank, status
        return None

    def _slowest_ranks(self) -> str:
        """Return, as text, where the ranks are that have begun the fewest phases."""
        statuses = self._statuses(range(self.size))
        fewest = min(status.phases for status in statuses.values())
        slowest = [rank for rank, status in statuses.items() if status.phases == fewest]
        named = "; ".join(f"rank {rank} is in {statuses[rank]}" for rank in slowest[:_MAX_NAMED_RANKS])
        others = len(slowest) - _MAX_NAMED_RANKS
        return named + (f"; and {others} more ranks" if others > 0 else "")

    def _fail_and_end(self, text: str) -> None:
        """Record a failure, print it if it is the first of the run, and end this process."""
        if self._record_failure(text, LostRankError.code):
            _print_error(text)
        self.end(LostRankError.code)

    def _lost_ranks(self) -> list[int]:
        """Return ranks that send no heartbeat for a while; none as soon as some rank has recorded a failure."""
        ranks = [rank for rank in range(self.size) if rank != self.rank]
        before = self._statuses(ranks)
        deadline = time.monotonic() + self.grace
        while time.monotonic() < deadline:
            if self._failure():
                return []
            time.sleep(0.1)
        after = self._statuses(ranks)
        return [
            rank
            for rank in ranks
            if rank not in after or (after[rank] == before.get(rank) and after[rank].heartbeat >= 0)
        ]

    def _send_heartbeat(self) -> None:
        """Write this rank's status to the store, and note whether the main thread has made progress."""
        if self.heartbeat >= 0:
            self.heartbeat += 1
        frame = sys._current_frames().get(self._main_thread or 0)
        stack = (self.phases, *((id(one.f_code), one.f_lasti) for one in _frames(frame)))
        if stack != self._stack:
            self._stack, self._progress_at = stack, time.monotonic()
        where = f"{code_location(frame)} on {socket.gethostname()}"
        status = RankStatus(self.heartbeat, self.phases, self.current_phase, where)
        self.store.set(str(self.rank), json.dumps(asdict(status)))

    def _statuses(self, ranks: Iterable[int]) -> dict[int, RankStatus]:
        """Return the newest status of each of ``ranks`` that has sent one."""
        known = [rank for rank in ranks if rank in self._seen or self.store.check([str(rank)])]
        texts = self.store.multi_get([str(rank) for rank in known]) if known else []
        return {rank: RankStatus(**json.loads(text)) for rank, text in zip(known, texts, strict=True)}

    def _failure(self) -> tuple[str, int] | None:
        """Return the message and exit code of the failure that a rank has recorded, if any."""
        if not self.store.check([_FAILURE_KEY]):
            return None
        text, code, _ = json.loads(self.store.get(_FAILURE_KEY))
        return text, code

    def _record_failure(self, text: str, code: int) -> bool:
        """Record for all ranks why the run has failed; return False if another rank was first."""
        own = json.dumps([text, code, self.rank])
        return bool(self.store.compare_set(_FAILURE_KEY, "", own).decode() == own)


def _print_error(text: str) -> None:
    print(f"error: {text}. {_RESUME_HINT}", file=sys.stderr, flush=True)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame and its callers."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def code_location(frame: FrameType | None) -> str:
    """Return the innermost file and line of this project on a stack, and the library function that it has called."""
    inner = next(_frames(frame), None)
    for one in _frames(frame):
        path = Path(one.f_code.co_filename)
        own = path.is_relative_to(_REPOSITORY) and "site-packages" not in path.parts
        if own or path.is_relative_to(_REPOSITORY / "stdit"):
            called = f", in {inner.f_code.co_name}" if inner is not None and inner is not one else ""
            return f"{path.relative_to(_REPOSITORY)}:{one.f_lineno}{called}"
    return f"{inner.f_code.co_name}" if inner is not None else ""


def build_watchdog(mesh: Mesh, config: TrainingParallelConfig) -> Watchdog:
    """Return the watchdog of this process; all ranks must call this."""
    if mesh.world_size == 1:
        return Watchdog()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(
        address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=config.timeout)
    )
    # A name of its own, since torchrun keeps its store when it restarts processes.
    name = mesh.all_gather_objects(secrets.token_hex(8))[0]
    return RankWatchdog(
        store=PrefixStore(f"stdit/watchdog/{name}", store),
        rank=mesh.rank,
        size=mesh.world_size,
        heartbeat_timeout=config.heartbeat_timeout,
        timeout=config.timeout,
    )


@contextmanager
def watching(watchdog: Watchdog) -> Iterator[Watchdog]:
    """Run the ``with`` block under a watchdog: an exception on one rank ends all, and says which rank raised it.

    Raises:
        UserError, or what the block raised: on the rank that should print it; `OtherRankError` on the others.
    """
    try:
        yield watchdog
    except (Exception, KeyboardInterrupt) as error:
        if (interrupt := interrupt_behind(error)) is not None:
            watchdog.stop(getattr(interrupt, "code", 130))
            raise
        assert isinstance(error, Exception)  # else it is an interrupt itself
        explained = watchdog.explain(error)
        watchdog.stop()
        if explained is error:
            raise
        raise explained from error
    watchdog.stop()
