import json
import multiprocessing
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from stdit.data.decoding.decode import DecodeError
from stdit.data.preparation.jobs import ExcludedError, Journal, Outcome, run_all, run_in_workers
from stdit.errors import UserError


def work(item: int, log: Path | None = None) -> int:
    """Squares an item; some items fail, each in another way."""
    if log is not None:
        with log.open("a") as file:
            file.write(f"{item}\n")
    if item == 3:
        raise ExcludedError("three: is odd")
    if item == 5:
        raise DecodeError("five.mp4", "is damaged")
    if item == 7:
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == 11:
        raise UserError("--eleven: is too much")
    if item == 13:
        raise ZeroDivisionError("thirteen")
    if item == 17:
        raise KeyboardInterrupt
    return item * item


def keys(items: list[int]) -> list[str]:
    return [f"key {item}" for item in items]


def test_outcomes_in_order_with_reasons(tmp_path: Path) -> None:
    items = [4, 3, 5, 4, 2]
    outcomes = run_all(work, items, keys(items), Journal(tmp_path / "partial"))
    assert outcomes == [
        Outcome(16),
        Outcome(reason="three: is odd"),
        Outcome(reason="cannot be read: is damaged"),
        Outcome(16),
        Outcome(4),
    ]


def work_and_die(item: int) -> int:
    """Returns, and dies a moment later, as a process that is killed for its memory."""
    if item == 1:
        threading.Timer(0.2, os._exit, [9]).start()
    return item


def test_a_worker_that_dies_between_two_items_costs_no_item() -> None:
    others = set(multiprocessing.active_children())  # that other tests left
    outcomes = run_in_workers(work_and_die, [1, 2, 3], workers=1)
    first = next(outcomes)
    while any(child.is_alive() for child in set(multiprocessing.active_children()) - others):
        time.sleep(0.05)
    assert [first, *outcomes] == [(0, Outcome(1)), (1, Outcome(2)), (2, Outcome(3))]


def test_a_worker_that_dies_costs_only_its_item() -> None:
    items = [1, 7, 3, 7, 5, 2]
    outcomes = dict(run_in_workers(work, items, workers=2))
    assert [outcomes[place].value for place in range(6)] == [1, None, None, None, None, 4]
    assert outcomes[1].reason == outcomes[3].reason == "the process that read it died (SIGSEGV)"
    assert outcomes[4].reason == "cannot be read: is damaged"


@pytest.mark.parametrize(("item", "error", "message"), [
    (11, UserError, "--eleven: is too much"), (13, RuntimeError, "ZeroDivisionError: thirteen"),
])  # fmt: skip
def test_errors_that_no_item_causes_are_raised(item: int, error: type[Exception], message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(error, match=message):
        list(run_in_workers(work, [1, item, 2, 4], workers=2))
    assert time.monotonic() - begin < 60


def work_or_hang(item: int) -> int:
    """Never returns for 0, like a decoder that hangs."""
    while item == 0:
        time.sleep(1)
    return item


def test_an_item_that_hangs_is_excluded_and_the_others_are_done(tmp_path: Path) -> None:
    items = [1, 0, 2, 3]
    for workers in (1, 2):
        journal = Journal(tmp_path / f"partial-{workers}")
        outcomes = run_all(work_or_hang, items, keys(items), journal, workers, timeout=2)
        assert outcomes == [
            Outcome(1), Outcome(reason="took longer than 2 s (--timeout)"), Outcome(2), Outcome(3),
        ]  # fmt: skip
        assert Journal(journal.path).known.keys() == {"key 1", "key 2", "key 3"}, "tried again next time"
    others = multiprocessing.active_children()
    assert not any(child.is_alive() and child.name.startswith("ForkServerProcess") for child in others)


def test_an_interrupt_loses_nothing(tmp_path: Path) -> None:
    log, items = tmp_path / "log", [1, 2, 3, 17, 4, 6]
    logged = partial(work, log=log)
    with pytest.raises(KeyboardInterrupt):
        run_all(logged, items, keys(items), Journal(tmp_path / "partial"))
    assert log.read_text().split() == ["1", "2", "3", "17"]

    items[3] = 8
    with (tmp_path / "partial").open("a") as file:
        file.write('["key 6", 99')  # a line that kill -9 cut off
    outcomes = run_all(logged, items, keys(items), Journal(tmp_path / "partial"))
    assert log.read_text().split() == ["1", "2", "3", "17", "8", "4", "6"]
    assert [outcome.value for outcome in outcomes] == [1, 4, None, 64, 16, 36]
    assert run_all(logged, items, keys(items), Journal(tmp_path / "partial")) == outcomes
    assert len(log.read_text().split()) == 7


def test_a_journal_of_nonsense_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "partial"
    path.write_bytes(b'\xff\xfe\n[]\n{"a": 1}\n3\n' + json.dumps(["key 1", 77, None]).encode() + b"\n")
    assert run_all(work, [1, 2], keys([1, 2]), Journal(path)) == [Outcome(77), Outcome(4)]


def test_a_journal_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="partial cannot be written: "):
        run_all(work, [1], ["key 1"], Journal(tmp_path / "file" / "partial"))
