"""Work on many items in several processes; what is done is kept, so that an interrupt loses none of it."""

import contextlib
import json
import signal
import sys
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


class LeftOut(Exception):
    """An item that cannot be used. The message is "kind" or "kind: detail"."""


class Outcome(NamedTuple):
    """What became of one item: a value of plain JSON, or the reason why there is none."""

    value: Any = None
    reason: str | None = None


Outcomes = Generator[tuple[int, Outcome], None, None]


class _Failure(NamedTuple):
    """An error that is no item's fault, on its way out of a worker."""

    text: str
    for_people: bool


@dataclass
class Journal:
    """The outcomes so far, one line each, in a file that is removed when the result is whole.

    Lines that an interrupt cut off, and those of other keys, do not count.
    """

    path: Path
    known: dict[str, Outcome] = field(init=False)

    def __post_init__(self) -> None:
        self.known = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError):
                    key, value, reason = json.loads(line)
                    self.known[key] = Outcome(value, reason)

    @contextlib.contextmanager
    def recording(self) -> Iterator[Callable[[str, Outcome], None]]:
        """A function that keeps the outcome of a key. Raises UserError when the disk refuses."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" if file.tell() else "")  # ends a line that an interrupt cut off

                def record(key: str, outcome: Outcome) -> None:
                    self.known[key] = outcome
                    file.write(json.dumps([key, *outcome]) + "\n")
                    file.flush()

                yield record
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def run_all(
    work: Callable[[Any], Any],
    items: Sequence[Any],
    keys: Sequence[str],
    journal: Journal,
    workers: int = 0,
    label: str = "",
) -> list[Outcome]:
    """The outcome of each item, in order; those that the journal knows are not worked on again.

    Args:
        work: a function of a module (or a partial of one) that gives plain JSON, or raises LeftOut or DecodeError.
        keys: what an outcome depends on, for each item; equal keys are worked on once.
        workers: processes; 0 works in this one, where a decoder that crashes takes everything with it.

    Raises whatever else `work` raises, from a worker as a RuntimeError with its traceback (a UserError as such).
    """
    todo = {key: item for key, item in zip(keys, items, strict=True) if key not in journal.known}
    if todo:
        names, rest = list(todo), list(todo.values())
        done = len(set(keys)) - len(todo)
        outcomes = in_processes(work, rest, workers) if workers else in_this_process(work, rest)
        with (
            journal.recording() as record,
            contextlib.closing(tqdm(initial=done, total=done + len(todo), desc=label, disable=None)) as bar,
            contextlib.closing(outcomes) as results,
        ):
            try:
                for place, outcome in results:
                    record(names[place], outcome)
                    bar.update()
            except KeyboardInterrupt:
                bar.write(
                    f"{bar.n} of {bar.total} are done and kept: the same command goes on from there",
                    sys.stderr,
                )
                raise
    return [journal.known[key] for key in keys]


def in_this_process(work: Callable[[Any], Any], items: Sequence[Any]) -> Outcomes:
    """(place, outcome) of each item in order."""
    for place, item in enumerate(items):
        yield place, attempt(work, item)


def in_processes(work: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Outcomes:
    """(place, outcome) of each item as it is done.

    A worker that dies (a decoder that crashed on a damaged file, a kill for want of memory) costs its item and no
    other; a new one takes its place. Closing the iterator stops them all.
    """
    context: Any = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    context.set_forkserver_preload([__name__])  # torch is imported once, not by each worker
    crew: dict[Connection, tuple[BaseProcess, int]] = {}
    places = iter(range(len(items)))

    def hire(place: int | None) -> None:
        if place is not None:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(work, there), daemon=True)
            process.start()
            there.close()
            here.send(items[place])
            crew[here] = (process, place)

    try:
        for _ in range(workers):
            hire(next(places, None))
        while crew:
            for pipe in wait(list(crew)):
                assert isinstance(pipe, Connection)
                process, place = crew.pop(pipe)
                try:
                    result = pipe.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    pipe.close()
                    yield place, Outcome(reason=f"the process that read it died ({_cause(process.exitcode)})")
                    hire(next(places, None))
                    continue
                if isinstance(result, _Failure):
                    raise UserError(result.text) if result.for_people else RuntimeError(result.text)
                yield place, result
                following = next(places, None)
                if following is None:
                    pipe.close()
                    continue
                try:
                    pipe.send(items[following])
                except ConnectionError:  # it died after its last answer, which costs nothing
                    process.join()
                    pipe.close()
                    hire(following)
                else:
                    crew[pipe] = (process, following)
    finally:
        for pipe, (process, _) in crew.items():
            process.terminate()
            process.join()
            pipe.close()


def _cause(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return signal.Signals(-exitcode).name
    return f"exit code {exitcode}"


def _serve(work: Callable[[Any], Any], pipe: Connection) -> None:
    """A worker: items in, outcomes out, until the other side is gone. Ctrl-C is for the other side."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)  # the processes share the cores
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            item = pipe.recv()
            try:
                pipe.send(attempt(work, item))
            except UserError as error:
                pipe.send(_Failure(str(error), for_people=True))
            except Exception:
                pipe.send(_Failure(traceback.format_exc(), for_people=False))


def attempt(work: Callable[[Any], Any], item: Any) -> Outcome:
    """The value that `work` gives, or why it left the item out."""
    try:
        return Outcome(value=work(item))
    except DecodeError as error:
        return Outcome(reason=f"cannot be read: {error.reason}")
    except LeftOut as error:
        return Outcome(reason=str(error))


def key_of(media: Media, *settings: Hashable) -> str:
    """What an outcome depends on: which file, unchanged, and how it is worked on."""
    try:
        state: tuple[Hashable, ...] = media.state()
    except OSError as error:
        state = (str(error),)
    return xxhash.xxh3_128_hexdigest(repr((str(media), state, settings)).encode())
