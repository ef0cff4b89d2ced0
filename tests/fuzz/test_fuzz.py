"""Any content of a file or flag is read or refused with a clear message; nothing hangs, no code is run.

    pytest tests/fuzz --hypothesis-profile long

is the long run: as many inputs to each reader as the profile says in conftest.py, fewer to the slow ones.
"""

import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from stdit.errors import UserError
from tests.fuzz.readers import Reader, readers

PATIENCE = 300
"""Seconds after which an input is taken to hang; a busy machine takes its time."""
READERS = readers()
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
)
RUNS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "pickle.find_class",
)


class AuditLog:
    """Record, while a folder is set, what this process writes outside of it, starts, or unpickles."""

    folder: Path | None = None

    def __init__(self) -> None:
        self.seen: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in RUNS:
            self.seen.append(f"{event} {arguments}")
        writes = event == "open" and (arguments[2] or 0) & WRITES
        if (writes or event in CHANGES) and isinstance(arguments[0], str | bytes | os.PathLike):
            path = Path(os.path.abspath(os.fsdecode(arguments[0])))
            if not path.is_relative_to(self.folder):
                self.seen.append(f"{event} {path}")


@pytest.fixture(scope="session")
def audit() -> AuditLog:
    return AuditLog()  # one for all tests: an audit hook cannot be removed


@pytest.fixture
def limit() -> Iterator[None]:
    def hangs(*_: object) -> None:
        raise TimeoutError(f"reading this input took more than {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, hangs)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", READERS)
def test_every_input_is_read_or_refused_with_a_message(
    name: str,
    audit: AuditLog,
    limit: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, str], None],
) -> None:
    reader = READERS[name]
    folder = tmp_path / "input"
    outcomes: Counter[bool] = Counter()

    @settings(max_examples=max(settings().max_examples // reader.cost, 10))
    @given(reader.inputs)
    def check(value: Any) -> None:
        folder.mkdir()
        try:
            refused = outcome(reader, value, folder, audit)
        finally:
            audit.folder = None
            signal.alarm(0)
            shutil.rmtree(folder)
            capsys.readouterr()
        assert not audit.seen, audit.seen
        assert refused is None or refused.strip(), "refused without a message"
        outcomes[refused is None] += 1

    check()
    record_property("inputs", f"{outcomes.total()} inputs, of which {outcomes[True]} were read")


def outcome(reader: Reader, value: Any, folder: Path, audit: AuditLog) -> str | None:
    """Return why an input was refused; None if it was read. Any other exception fails the test."""
    signal.alarm(PATIENCE)
    audit.folder, audit.seen = folder, []
    try:
        reader.read(value, folder)
    except UserError as error:
        return str(error)
    except SystemExit as end:
        assert end.code in (0, None), f"ended with code {end.code}"  # --help, --print_config
    return None
