"""Read the ``metrics.jsonl`` of a run as it grows: curves of bounded size, and its last lines. Imports no torch."""

import json
import math
import os
import stat
import threading
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from stdit.serve.json_values import finite_number, whole_number, whole_text

MOST_BUCKETS = 2000
"""Buckets of a curve; when it is full, neighbours are merged."""
MOST_FIELDS = 256
_MOST_LEVELS = 4
"""Of nested fields, whose names are joined with slashes."""
_CHUNK = 1 << 20
"""Bytes read at a time; a longer line is left out."""
_MOST_AT_ONCE = 64 << 20
"""Bytes read by one update: seconds of work."""
_TAIL = 1 << 16
_FINGERPRINT = 64
"""Bytes before the place that was read up to, by which a file that was replaced is told from one that grew."""
RECENT = 20
"""Lines at the end over which `read_last_lines` averages."""


class Curve:
    """Measurements of a field: mean, least and largest of at most `MOST_BUCKETS` buckets of equal counts."""

    def __init__(self) -> None:
        self.width = 1
        """Measurements in a bucket; the last one may have fewer."""
        self.steps, self.counts = array("q"), array("q")
        self.means, self.lows, self.highs = array("d"), array("d"), array("d")

    def add(self, step: int, value: float) -> None:
        """Add a measurement of a later step."""
        if self.counts and self.counts[-1] < self.width:
            self._merge(-1, step, 1, value, value, value)
            return
        if len(self.counts) == MOST_BUCKETS:
            self._halve()
        for column, one in zip(self._columns(), (step, 1, value, value, value), strict=True):
            column.append(one)  # type: ignore[arg-type]

    def points(self, most: int, after: int = -1) -> list[tuple[int, float, float, float]]:
        """Return at most ``most`` points of later steps: (last step, mean, least, largest) each."""
        first = next((place for place, step in enumerate(self.steps) if step > after), len(self.steps))
        each = max(1, -(-(len(self.steps) - first) // most))
        found = [
            self._joined(range(at, min(at + each, len(self.steps))))
            for at in range(first, len(self.steps), each)
        ]
        return [point for point in found if all(map(math.isfinite, point[1:]))]

    def _joined(self, places: range) -> tuple[int, float, float, float]:
        total = sum(self.counts[place] for place in places)
        mean = sum(self.means[place] * (self.counts[place] / total) for place in places)
        low, high = min(self.lows[place] for place in places), max(self.highs[place] for place in places)
        return self.steps[places[-1]], mean, low, high

    def _merge(self, place: int, step: int, count: int, mean: float, low: float, high: float) -> None:
        """Add ``count`` later measurements to a bucket."""
        total = self.counts[place] + count
        share = count / total
        self.means[place] = self.means[place] * (1 - share) + mean * share
        self.steps[place], self.counts[place] = step, total
        self.lows[place], self.highs[place] = min(self.lows[place], low), max(self.highs[place], high)

    def _halve(self) -> None:
        """Merge neighbours."""
        for place in range(0, len(self.counts) - 1, 2):
            self._merge(place, *(column[place + 1] for column in self._columns()))  # type: ignore[arg-type]
        for column in self._columns():
            del column[1::2]
        self.width *= 2

    def _columns(self) -> tuple[array, ...]:
        return self.steps, self.counts, self.means, self.lows, self.highs


class MetricsReader:
    """Curves of a ``metrics.jsonl``, which follow it as it grows; several threads may use one.

    Lines that are damaged, and numbers that are not finite, are left out; so is a last line without its end.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self.problem: str | None = None
        """Why it cannot be read."""
        self._forget()

    def update(self) -> None:
        """Read what is new; everything again if the file was replaced, as when a run resumes or rolls back."""
        with self._lock:
            try:
                with _open_regular(self.path) as file:
                    self._read(file)
            except FileNotFoundError:
                self._forget()
            except OSError as error:
                self.problem = f"{self.path.name} cannot be read ({error.strerror})"

    def points(self, fields: list[str] | None, most: int, after: int) -> dict[str, list]:
        """Return `Curve.points` by field; of all fields if ``fields`` is None. Unknown ones have no points."""
        with self._lock:
            names = list(self.curves) if fields is None else fields
            return {
                name: self.curves[name].points(most, after) if name in self.curves else [] for name in names
            }

    def _forget(self) -> None:
        self.curves: dict[str, Curve] = {}
        """By name; nested ones are joined with slashes."""
        self.last_step = -1
        self.damaged = 0
        """Lines that are no measurements of a later step."""
        self.complete = True
        """Whether the file was read to its end."""
        self.problem = None
        self._file: tuple[int, int] | None = None
        self._offset, self._rest, self._skips, self._before = 0, b"", False, b""

    def _read(self, file: BinaryIO) -> None:
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino)
        if self._file != identity or status.st_size < self._offset or not self._continues(file):
            self._forget()
            self._file = identity
        self.problem = None
        file.seek(self._offset)
        end = self._offset + _MOST_AT_ONCE
        while self._offset < end and (chunk := file.read(_CHUNK)):
            self._offset += len(chunk)
            self._before = (self._before + chunk)[-_FINGERPRINT:]
            self._take(chunk)
        self.complete = self._offset < end

    def _continues(self, file: BinaryIO) -> bool:
        file.seek(self._offset - len(self._before))
        return file.read(len(self._before)) == self._before

    def _take(self, chunk: bytes) -> None:
        *lines, rest = (self._rest + chunk).split(b"\n")
        if lines and self._skips:
            lines, self._skips = lines[1:], False
        for line in lines:
            self._add(line)
        if len(rest) > _CHUNK or self._skips:
            self.damaged += not self._skips
            rest, self._skips = b"", True
        self._rest = rest

    def _add(self, line: bytes) -> None:
        values = parse_line(line)
        step = None if values is None else whole_number(values.get("step"))
        if values is None or step is None or step <= self.last_step:
            self.damaged += bool(line.strip())
            return
        self.last_step = step
        for name, value in _numbers(values):
            if name != "step" and (name in self.curves or len(self.curves) < MOST_FIELDS):
                self.curves.setdefault(name, Curve()).add(step, value)


@dataclass(frozen=True)
class LastLines:
    """What the end of a ``metrics.jsonl`` says; None: nothing."""

    step: int | None = None
    """The last one."""
    loss: float | None = None
    """Mean of the last lines."""
    clips_per_second: float | None = None
    seconds_per_step: float | None = None
    updated: float | None = None
    """When the file was written last, in Unix seconds."""


def read_last_lines(path: Path) -> LastLines:
    """Read the end of a ``metrics.jsonl``; a file that cannot be read says nothing."""
    try:
        with _open_regular(path) as file:
            status = os.fstat(file.fileno())
            lines: list[dict[str, Any]] = []
            for size in (_TAIL, 64 * _TAIL):  # lines with norms of all blocks are long
                if not lines:
                    file.seek(max(0, status.st_size - size))
                    whole = file.read(size).split(b"\n")[:-1]
                    lines = [found for line in whole[-RECENT:] if (found := parse_line(line))]
    except OSError:
        return LastLines()
    steps = [step for line in lines if (step := whole_number(line.get("step"))) is not None]
    losses = [loss for line in lines if (loss := finite_number(line.get("loss"))) is not None]
    times = [(_seconds(line), finite_number(line.get("clips")) or 0.0) for line in lines[-RECENT:]]
    seconds, clips = (sum(column) for column in zip(*times, strict=True)) if times else (0.0, 0.0)
    return LastLines(
        step=max(steps, default=None),
        loss=sum(loss / len(losses) for loss in losses) if losses else None,
        clips_per_second=clips / seconds if clips and seconds else None,
        seconds_per_step=seconds / len(times) if seconds else None,
        updated=status.st_mtime,
    )


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the object of a line; None if it is damaged."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _numbers(
    values: Mapping[str, Any], prefix: str = "", levels: int = _MOST_LEVELS
) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a nested object; true and false are 1 and 0."""
    for key, value in values.items():
        if isinstance(value, dict) and levels:
            yield from _numbers(value, f"{prefix}{key}/", levels - 1)
        elif (number := finite_number(value)) is not None:
            yield whole_text(f"{prefix}{key}"[:200]), number


def _seconds(line: Mapping[str, Any]) -> float:
    return sum(max(0.0, finite_number(line.get(name)) or 0.0) for name in ("seconds", "data_seconds"))


def _open_regular(path: Path) -> BinaryIO:
    """Open a file that is neither a link, a folder nor a pipe. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "not a regular file")
    return open(descriptor, "rb", buffering=0)
