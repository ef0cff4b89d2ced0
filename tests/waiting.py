"""Wait for what other threads and processes do: until shortly before pytest's own timeout, never less.

pytest-timeout runs on the timer of the process, which a process forked from it does not inherit: there a wait has no
end of its own, and lasts until the test ends the process.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

SHARE = 0.95
"""Of the time that pytest leaves to the test; the rest is for the message and for cleaning up."""
Value = TypeVar("Value")


@runtime_checkable
class Process(Protocol):
    """`subprocess.Popen`, or `tests.warm.Python`."""

    args: Any
    returncode: Any

    def poll(self) -> int | None: ...

    def communicate(self, *, timeout: float | None = None) -> tuple[Any, Any]: ...


def seconds_left() -> float | None:
    """Return how long a wait may take, for arguments called ``timeout``; None: without end."""
    return SHARE * signal.getitimer(signal.ITIMER_REAL)[0] or None


def wait_for(
    condition: Callable[[], Value], what: str, printed: Process | Path | Callable[[], object] | None = None
) -> Value:
    """Return the first true value of a condition; raise AssertionError if the test's time is over before.

    Args:
        what: what is waited for, named in the error.
        printed: what the error shows: the output of a process, without which the condition cannot come true, so that
            its end is an error too; a log file; or what a function returns.
    """
    left, begin = seconds_left(), time.monotonic()
    while True:
        ended = isinstance(printed, Process) and printed.poll() is not None
        if found := condition():
            return found
        if ended or (left is not None and time.monotonic() - begin > left):
            raise AssertionError(f"waited in vain for {what}{_printed(printed)}")
        time.sleep(0.01)


def communicate(process: Process) -> tuple[Any, Any]:
    """Wait for the end of a process; return its output and errors. Raises AssertionError with what it has printed."""
    try:
        return process.communicate(timeout=seconds_left())
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{process.args} has not ended{_printed(process)}") from None


def hang() -> None:
    """Do nothing until something ends this process, or the process that started it has ended."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.1)


def _printed(source: Process | Path | Callable[[], object] | None) -> str:
    if source is None:
        return ""
    if isinstance(source, Process):
        try:
            parts = source.communicate(timeout=1)
        except subprocess.TimeoutExpired as running:
            parts = running.output, running.stderr
        texts = [part.decode(errors="replace") if isinstance(part, bytes) else part or "" for part in parts]
        return f"; exit code {source.poll()}, printed so far:\n{''.join(texts)}"
    if isinstance(source, Path):
        return f"; {source}:\n{source.read_text(errors='replace') if source.exists() else '(does not exist)'}"
    return f"; so far:\n{source()}"
