"""Files that are complete or absent, whatever ends the process that writes them."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file name beside ``path``; on success it is renamed to ``path``, on failure it is removed.

    Several threads and processes may write the same file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of `atomic_write` in a folder whose processes have ended."""
    for left in folder.glob(".*.tmp") if folder.is_dir() else ():
        number = left.name.split(".")[-2].partition("-")[0]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            left.unlink(missing_ok=True)


def write_json_atomic(path: Path, values: Mapping[str, Any]) -> None:
    """Write readable JSON."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
