"""One server per folder: two would take each other's workers for lost ones."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stdit.errors import UserError

_WAIT_SECONDS = 3.0
"""For a server that is ending."""


@contextmanager
def lock_server(state: Path) -> Iterator[None]:
    """Hold the folder of a server's state during a block. Raises UserError if another server has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    state.mkdir(parents=True, exist_ok=True)
    with open(state / "lock", "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise UserError(
                        f"another server uses {state} ({file.read().strip()}): stop it, or choose another folder "
                        "with --server.runs."
                    ) from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield
