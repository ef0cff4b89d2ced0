"""The helper by which tests wait: its deadline comes from pytest, and its errors say what was waited for."""

import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import waiting, warm
from tests.waiting import communicate, hang, seconds_left, wait_for

PRINTS = "import signal; print('began', flush=True); signal.pause()"


def pytest_leaves(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change what the helper sees of pytest's timer."""
    monkeypatch.setattr(waiting.signal, "getitimer", lambda timer: (seconds, 0.0))


def start(kind: str, folder: Path, program: str = PRINTS) -> Any:
    """Start a program as one of the kinds of processes that tests start."""
    if kind == "warm":
        script = folder / "script.py"
        script.write_text(program)
        return warm.Python([str(script)])
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=kind == "text")


@pytest.mark.timeout(500)
def test_deadline_is_a_little_under_the_timeout_of_the_test() -> None:
    left = seconds_left()
    assert left is not None and 400 < left < 500


def test_waits_have_no_end_without_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest_leaves(0, monkeypatch)
    assert seconds_left() is None
    values = iter(["", "", "third"])
    assert wait_for(lambda: next(values), "the third value") == "third"


@pytest.mark.parametrize("kind", ["text", "bytes", "warm"])
def test_at_the_deadline_errors_show_what_a_process_has_printed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(kind, tmp_path)
    try:
        if kind == "warm":
            wait_for(lambda: process.output()[0], "its output", process)
        else:
            select.select([process.stdout], [], [])
        pytest_leaves(0.05, monkeypatch)
        with pytest.raises(AssertionError, match="waited in vain for snow; exit code None, .*:\nbegan"):
            wait_for(lambda: False, "snow", process)
        with pytest.raises(AssertionError, match="pause.*has not ended; .*\nbegan|script.py.*\nbegan"):
            communicate(process)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["text", "warm"])
def test_the_end_of_the_process_ends_the_wait(kind: str, tmp_path: Path) -> None:
    process = start(kind, tmp_path, "print('gone'); raise SystemExit(3)")
    with pytest.raises(AssertionError, match="waited in vain for snow; exit code 3, printed so far:\ngone"):
        wait_for(lambda: False, "snow", process)
    assert wait_for(lambda: process.poll() == 3, "its end", process)
    assert communicate(process)[0] == "gone\n"


def test_errors_show_a_log_file_or_the_text_of_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest_leaves(0.01, monkeypatch)
    log = tmp_path / "log.txt"
    with pytest.raises(AssertionError, match="snow; .*log.txt:\n.does not exist"):
        wait_for(lambda: False, "snow", log)
    log.write_text("it rains")
    with pytest.raises(AssertionError, match="it rains"):
        wait_for(lambda: False, "snow", log)
    with pytest.raises(AssertionError, match="snow; so far:\n{'rain': 3}"):
        wait_for(lambda: False, "snow", lambda: {"rain": 3})
    with pytest.raises(AssertionError, match="for snow$"):
        wait_for(lambda: False, "snow")


def test_what_hangs_ends_with_the_process_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = iter([7, 7, 7, 1])
    monkeypatch.setattr(waiting.os, "getppid", lambda: next(parents))
    hang()
    assert not list(parents)
