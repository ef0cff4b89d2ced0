"""Processes that the page has started: trainings, which outlive the server, and dry runs, which do not."""

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import stdit
from stdit.serve.child_environment import environment_without_passwords
from stdit.serve.errors import RequestError
from stdit.serve.runs.run_locks import TRAIN_CODE

MOST_KEPT = 20
"""Launches that are remembered."""
_MOST_TRAININGS, _MOST_DRY_RUNS = 4, 2
"""Processes at a time."""
_DRY_RUN_SECONDS = 900.0
_MOST_OUTPUT = 1 << 16
"""Bytes of a dry run's output that are kept."""
_TAIL_BYTES, _TAIL_LINES = 1 << 14, 60
"""How much of a training's log is shown."""
_LAUNCHER = {
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
}
_LAUNCHER |= {"MASTER_ADDR", "MASTER_PORT"}
"""Variables of torchrun, which a training would take for its own."""


@dataclass(frozen=True)
class Launch:
    """A training, or a dry run, that was started from the page."""

    id: str
    name: str
    """Of the run."""
    dry_run: bool
    state: Literal["running", "done", "failed"]
    report: str
    """What it has printed: all, or of a training the last lines."""
    exit_code: int | None
    """None: it runs; negative: the signal that ended it."""
    started: float
    """Unix seconds."""
    command: str
    """The same on the command line."""


@dataclass
class _Started:
    id: str
    name: str
    command: str
    process: subprocess.Popen[bytes]
    log: Path | None
    """File of a training's output; None for a dry run."""
    log_start: int = 0
    """Bytes that were in it before."""
    output: bytearray = field(default_factory=bytearray)
    note: str = ""
    exit_code: int | None = None
    started: float = field(default_factory=time.time)
    thread: threading.Thread = field(default_factory=threading.Thread)
    """Waits for its end."""


class LaunchProcesses:
    """The last processes that were started, with what they print."""

    def __init__(self) -> None:
        self._started: OrderedDict[str, _Started] = OrderedDict()
        self._lock = threading.Lock()

    def start_training(self, arguments: list[str], command: str, name: str, log: Path) -> Launch:
        """Start a training whose output goes to the end of a file.

        Raises:
            RequestError: if too many are running, or the process or the file cannot be made.
        """
        self._check_room(dry_run=False, name=name)
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            with open(os.open(log, flags, 0o666), "ab") as file:
                start = file.seek(0, os.SEEK_END)
                process = _popen(arguments, stdout=file)
        except OSError as error:
            raise RequestError(
                f"run {name} cannot be started: {log.name} or its process could not be made ({error.strerror}).",
                status=503,
                code="not_started",
            ) from None
        return self._follow(_Started(_new_id(), name, command, process, log, start))

    def start_dry_run(self, arguments: list[str], command: str, name: str) -> Launch:
        """Start a dry run, and end an earlier one of the same name. Raises RequestError as `start_training`."""
        with self._lock:
            earlier = [one for one in self._started.values() if one.log is None and one.name == name]
        for one in earlier:
            _kill(one.process)
            one.thread.join()
        self._check_room(dry_run=True, name=name)
        try:
            process = _popen(arguments, stdout=subprocess.PIPE)
        except OSError as error:
            raise RequestError(
                f"dry run of {name} cannot be started ({error.strerror}).", status=503, code="not_started"
            ) from None
        return self._follow(_Started(_new_id(), name, command, process, None))

    def state(self, id: str) -> Launch:
        """Return what became of a launch. Raises RequestError (404) if it is not known, or no longer."""
        with self._lock:
            started = self._started.get(id)
        if started is None:
            raise RequestError(
                f"launch {id[:40]!r}: there is none of this id among the last {MOST_KEPT}.",
                status=404,
                param="id",
                code="not_found",
            )
        return _launch(started)

    def close(self) -> None:
        """End all dry runs."""
        with self._lock:
            dry_runs = [one for one in self._started.values() if one.log is None]
        for one in dry_runs:
            _kill(one.process)

    def _check_room(self, dry_run: bool, name: str) -> None:
        with self._lock:
            unfinished = [one for one in self._started.values() if one.exit_code is None]
        running = [one.name for one in unfinished if (one.log is None) == dry_run]
        if name in running:
            raise RequestError(
                f"run {name} has been started already: wait for that to end.", status=409, code="running"
            )
        count = len(running)
        most, what = (_MOST_DRY_RUNS, "dry runs") if dry_run else (_MOST_TRAININGS, "trainings")
        if count >= most:
            raise RequestError(
                f"{count} {what} that were started here are running, and at most {most} may: wait for one of them.",
                status=429,
                code="busy",
            )

    def _follow(self, started: _Started) -> Launch:
        with self._lock:
            self._started[started.id] = started
            ended = [id for id, one in self._started.items() if one.exit_code is not None]
            for id in ended[: max(0, len(self._started) - MOST_KEPT)]:
                del self._started[id]
        wait = _collect if started.log is None else _wait
        started.thread = threading.Thread(
            target=wait, args=(started,), name=f"launch {started.name}", daemon=True
        )
        started.thread.start()
        return _launch(started)


def _popen(arguments: list[str], stdout: int | IO[bytes]) -> subprocess.Popen[bytes]:
    """Start the training command in a session of its own. Raises OSError."""
    kept = {
        name: value
        for name, value in environment_without_passwords().items()
        if name not in _LAUNCHER and not name.startswith("TORCHELASTIC_")
    }
    package = str(Path(stdit.__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, kept.get("PYTHONPATH")]))
    return subprocess.Popen(
        # -P: modules of the current folder are not imported by accident
        [sys.executable, "-P", "-c", TRAIN_CODE, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=kept | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
    )


def _wait(started: _Started) -> None:
    started.exit_code = started.process.wait()


def _collect(started: _Started) -> None:
    """Read the output of a dry run to its end, or until it takes too long."""

    def too_long() -> None:
        started.note = f"\nstopped: it took more than {_DRY_RUN_SECONDS:.0f} s\n"
        _kill(started.process)

    timer = threading.Timer(_DRY_RUN_SECONDS, too_long)
    timer.daemon = True
    timer.start()
    output = started.process.stdout
    assert output is not None
    with output:
        while chunk := os.read(output.fileno(), 1 << 14):
            started.output += chunk[: _MOST_OUTPUT - len(started.output)]
    timer.cancel()
    started.exit_code = started.process.wait()


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _launch(started: _Started) -> Launch:
    code = started.exit_code
    return Launch(
        id=started.id,
        name=started.name,
        dry_run=started.log is None,
        state="running" if code is None else "done" if code == 0 else "failed",
        report=_report(started),
        exit_code=code,
        started=started.started,
        command=started.command,
    )


def _report(started: _Started) -> str:
    """Return what a process has printed; of a line that was printed over, such as a progress bar, the last state."""
    content = bytes(started.output)
    if started.log is not None:
        with suppress(OSError), open(started.log, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(started.log_start, end - _TAIL_BYTES))
            content = file.read(_TAIL_BYTES)
    lines = content.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
    shown = [line.rstrip("\r").rpartition("\r")[2] for line in lines]
    return "\n".join(shown if started.log is None else shown[-_TAIL_LINES:]) + started.note


def _new_id() -> str:
    return f"launch_{secrets.token_hex(8)}"
