"""Process many items in worker processes, with a time limit per item; finished items survive an interrupt."""

import contextlib
import json
import math
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from tqdm import tqdm

from stdit.data.decoding.decode import DecodeError
from stdit.data.decoding.media import Media
from stdit.errors import UserError

KILL_SECONDS = 5.0
"""How long to wait for a process that was killed; one that the kernel cannot end (a dead network disk) is left."""
TIMED_OUT = "took longer than"
"""How the reason of an item that hit the time limit begins."""
FIRST_FAILURES = 10
"""Failures of one kind, before any success, that stop a step: the fault is hardly that of the clips."""
_READY = "ready"


class ExcludedError(Exception):
    """An item that cannot be used. The message is "kind" or "kind: detail"."""


class FailedError(ExcludedError):
    """An item for which code failed that may be mended, such as a user's score; the next call tries it again."""


@dataclass(frozen=True)
class Outcome:
    """The result for one item: a value that JSON can hold, or the reason why there is none."""

    value: Any = None
    reason: str | None = None
    is_final: bool = field(default=True, compare=False)
    """False: the item itself need not be the cause (a time limit, a crash, a failed score), so try it again."""


Outcomes = Generator[tuple[int, Outcome], None, None]


class _Failure(NamedTuple):
    """An error in a worker that no item is the cause of."""

    text: str
    is_user_error: bool


@dataclass
class Journal:
    """A file of the outcomes so far, one line each, which is removed when the result is complete.

    Lines that were cut off by an interrupt are ignored. Outcomes that are not final are not written, so that the
    next call, with a higher limit or a mended score, tries these items again.
    """

    path: Path
    known: dict[str, Outcome] = field(init=False)
    """By key."""

    def __post_init__(self) -> None:
        self.known = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError):
                    key, value, reason = json.loads(line)
                    self.known[key] = Outcome(value, reason)

    @contextlib.contextmanager
    def recording(self) -> Iterator[Callable[[str, Outcome], None]]:
        """Provide a function that records the outcome of a key. Raises UserError if the file cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" if file.tell() else "")  # ends a line that an interrupt cut off

                def record(key: str, outcome: Outcome) -> None:
                    self.known[key] = outcome
                    if outcome.is_final:
                        file.write(json.dumps([key, outcome.value, outcome.reason]) + "\n")
                        file.flush()

                try:
                    yield record
                finally:
                    if not any(outcome.is_final for outcome in self.known.values()):
                        self.remove()  # there is nothing to resume from
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def run_all(
    work: Callable[[Any], Any],
    items: Sequence[Any],
    keys: Sequence[str],
    journal: Journal,
    workers: int = 0,
    timeout: float = 0.0,
    label: str = "",
    then: "Callable[[Outcomes, Sequence[int]], Outcomes] | None" = None,
) -> list[Outcome]:
    """Return the outcome of each item, in order; items whose key is in the journal are not processed again.

    Args:
        work: a function of a module (or a partial of one) that returns what JSON can hold, or raises ExcludedError or
            DecodeError.
        keys: for each item, everything that its outcome depends on; items with equal keys are processed once.
        workers: processes; 0 runs in this one, where a decoder that crashes or hangs stops everything.
        timeout: seconds per item, after which its worker is killed; 0: no limit. Needs workers.
        then: a second stage in this process, from the outcomes of `work`, whose values may be anything that can be
            pickled, and the places in `items` that theirs stand for, to the final outcomes.

    Raises:
        UserError: if the first items that fail, before any success, all fail in the same way: see FIRST_FAILURES.
        Any other error that `work` raises; from a worker as a UserError, or a RuntimeError with its traceback.
    """
    todo = {key: place for place, key in enumerate(keys) if key not in journal.known}
    if todo:
        names, rest = list(todo), [items[place] for place in todo.values()]
        done = len(set(keys)) - len(todo)
        outcomes = (
            run_in_workers(work, rest, workers, timeout)
            if workers
            else ((place, _outcome(work, item)) for place, item in enumerate(rest))
        )
        if then is not None:
            outcomes = then(outcomes, list(todo.values()))
        check = _FirstFailures(any(journal.known[key].reason is None for key in {*keys} & {*journal.known}))
        with (
            journal.recording() as record,
            contextlib.closing(tqdm(initial=done, total=done + len(todo), desc=label, disable=None)) as bar,
            contextlib.closing(outcomes) as results,
        ):
            try:
                for place, outcome in results:
                    record(names[place], outcome)
                    bar.update()
                    check.add(outcome)
            except KeyboardInterrupt:
                bar.write(f"{bar.n} of {bar.total} are done and kept: the same command resumes", sys.stderr)
                raise
    return [journal.known[key] for key in keys]


@dataclass
class _FirstFailures:
    """Stops a step whose first outcomes are all failures of one kind."""

    succeeded: bool
    """Whether an item has succeeded; from then on a failure is that of its item."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Failures so far by kind."""

    def add(self, outcome: Outcome) -> None:
        """Count an outcome. Raises UserError."""
        self.succeeded |= outcome.reason is None
        if self.succeeded or outcome.is_final:
            return
        assert outcome.reason is not None
        kind = outcome.reason.partition(": ")[0]
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        if self.kinds[kind] == FIRST_FAILURES:
            raise UserError(
                f"{outcome.reason}\nstopped, since the first {FIRST_FAILURES} clips all failed in this way, and "
                "nothing is written: mend the cause, and the same command begins again"
            )


@dataclass
class _Worker:
    """A process and the item that it works on."""

    process: BaseProcess
    place: int
    deadline: float = math.inf
    """Of `time.monotonic`, once the process has started up."""

    def stop(self) -> None:
        self.process.kill()
        self.process.join(KILL_SECONDS)


def run_in_workers(
    work: Callable[[Any], Any], items: Sequence[Any], workers: int, timeout: float = 0.0
) -> Outcomes:
    """Yield (place, outcome) of each item as it is finished by one of several processes.

    A worker that dies (a decoder that crashes on a damaged file, or runs out of memory), or that takes longer than
    `timeout` seconds (0: no limit) for an item, costs that item only: another worker takes over the rest. Closing
    the iterator stops all workers.
    """
    context: Any = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    context.set_forkserver_preload([__name__])  # imports torch once, instead of once per worker
    crew: dict[Connection, _Worker] = {}
    places = iter(range(len(items)))

    def start_worker(place: int | None) -> None:
        if place is not None:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(work, there), daemon=True)
            process.start()
            there.close()
            here.send(items[place])
            crew[here] = _Worker(process, place)

    def limit() -> float:
        return time.monotonic() + timeout if timeout else math.inf

    try:
        for _ in range(workers):
            start_worker(next(places, None))
        while crew:
            soonest = min(worker.deadline for worker in crew.values())
            for pipe in wait(
                list(crew), None if soonest == math.inf else max(0.0, soonest - time.monotonic())
            ):
                assert isinstance(pipe, Connection)
                worker = crew[pipe]
                try:
                    result = pipe.recv()
                except (EOFError, ConnectionError):
                    del crew[pipe]
                    worker.process.join()
                    pipe.close()
                    cause = _exit_cause(worker.process.exitcode)
                    reason = f"the process that read it died ({cause})"
                    yield worker.place, Outcome(reason=reason, is_final=False)
                    start_worker(next(places, None))
                    continue
                if result == _READY:
                    worker.deadline = limit()
                    continue
                if isinstance(result, _Failure):
                    raise UserError(result.text) if result.is_user_error else RuntimeError(result.text)
                yield worker.place, result
                following = next(places, None)
                if following is None:
                    del crew[pipe]
                    pipe.close()
                    continue
                worker.place, worker.deadline = following, limit()
                try:
                    pipe.send(items[following])
                except ConnectionError:  # it died after its last answer, which costs no item
                    del crew[pipe]
                    worker.process.join()
                    pipe.close()
                    start_worker(following)
            for pipe, worker in list(crew.items()):
                if worker.deadline <= time.monotonic() and not pipe.poll():
                    del crew[pipe]
                    worker.stop()
                    pipe.close()
                    reason = f"{TIMED_OUT} {timeout:g} s (--timeout)"
                    yield worker.place, Outcome(reason=reason, is_final=False)
                    start_worker(next(places, None))
    finally:
        for pipe, worker in crew.items():
            worker.stop()
            pipe.close()


def _exit_cause(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return signal.Signals(-exitcode).name
    return f"exit code {exitcode}"


def _serve(work: Callable[[Any], Any], pipe: Connection) -> None:
    """Run a worker: receive items and send outcomes until the pipe is closed. Ctrl-C is left to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)  # the processes share the cores
    with contextlib.suppress(EOFError, ConnectionError):
        pipe.send(_READY)
        while True:
            item = pipe.recv()
            try:
                pipe.send(_outcome(work, item))
            except UserError as error:
                pipe.send(_Failure(str(error), is_user_error=True))
            except Exception:
                pipe.send(_Failure(traceback.format_exc(), is_user_error=False))


def _outcome(work: Callable[[Any], Any], item: Any) -> Outcome:
    try:
        return Outcome(value=work(item))
    except DecodeError as error:
        return Outcome(reason=f"cannot be read: {error.reason}")
    except ExcludedError as error:
        return Outcome(reason=str(error), is_final=not isinstance(error, FailedError))


def outcome_key(media: Media, *settings: Hashable) -> str:
    """Return a hash of everything that an outcome depends on: which file, in which state, and the settings."""
    try:
        state: tuple[Hashable, ...] = media.state()
    except OSError as error:
        state = (str(error),)
    return xxhash.xxh3_128_hexdigest(repr((str(media), state, settings)).encode())
