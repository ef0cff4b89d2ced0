"""Who trains in a run folder: ask for the lock of `lock_run_folder` without ever taking it. Imports no torch."""

import os
import re
import socket
import stat
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

_HOLDER = re.compile(r"(?P<host>.+), process (?P<pid>\d{1,9}), since .+")
_COMMANDS = ("train.py", "stdit-train")
"""Names of the scripts that train."""
TRAIN_CODE = "from stdit.commands.train import train_command; train_command()"
"""What the page starts: the installed command, wherever its script is."""


@dataclass(frozen=True)
class RunLock:
    """The lock of a run folder."""

    held: bool | None
    """Whether a process holds it; None: the file system, or the system, does not tell."""
    host: str | None = None
    """Machine of the process that holds it, or held it last."""
    pid: int | None = None
    """That process; None: it is not known, such as one in a container, or one that has just started."""

    @property
    def is_here(self) -> bool:
        """Whether that process is, or was, on this machine."""
        return self.host == socket.gethostname()


def query_lock(run: Path) -> RunLock:
    """Return the state of the lock of a run folder.

    It is only asked for: a lock that is taken for a moment would make a training fail that starts at that moment.
    This process must not hold such a lock itself, since closing the file would release it.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(run / ".lock", flags)
    except FileNotFoundError:
        return RunLock(held=False)
    except OSError:
        return RunLock(held=None)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return RunLock(held=None)
        found = _HOLDER.fullmatch(os.read(descriptor, 1000).decode("utf-8", "replace").strip())
        held, pid = _ask(descriptor)
    except OSError:
        return RunLock(held=None)
    finally:
        os.close(descriptor)
    host = found["host"] if found else None
    written = int(found["pid"]) if found else None
    return RunLock(held, host, written if not held or pid == written else None)


def is_training(command: list[str]) -> bool:
    """Return whether a command line is that of Python with a script, or a module, that trains."""
    program = Path(command[0]).name if command else ""
    if not program.startswith(("python", "pypy")):
        return False
    return any(Path(part).name in _COMMANDS or part == TRAIN_CODE for part in command[1:])


def _ask(descriptor: int) -> tuple[bool | None, int | None]:
    """Return whether another process has locked an open file, and which, as far as the system tells."""
    if sys.platform != "linux" or struct.calcsize("P") != 8:  # elsewhere the structure differs
        return None, None
    import fcntl

    layout = "hhqqi4x"  # struct flock: type, whence, start, length, process
    question = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, question)
    except OSError:  # a file system without locks
        return None, None
    kind, _, _, _, pid = struct.unpack(layout, answer)
    if kind == fcntl.F_UNLCK:
        return False, None
    return True, pid if pid > 0 else None
