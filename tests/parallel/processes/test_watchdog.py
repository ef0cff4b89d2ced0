"""Watchdogs of ranks that die, hang, stop or fail; the processes only wait, so a case takes a second or two."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from stdit.cli import run
from stdit.errors import UserError
from stdit.parallel.processes.watchdog import RankWatchdog, Watchdog, code_location, watching
from stdit.training.stop_signals import Stop

RANKS = 3
PATIENCE = 60.0
"""Seconds that a process may take on a busy machine."""
server = multiprocessing.get_context("forkserver")  # pytest's own process has threads, and must not be forked
server.set_forkserver_preload([__name__])


def wait_for_others() -> None:
    """Block, as in a collective that another rank does not join."""
    threading.Event().wait(PATIENCE)


def begin(watchdog: RankWatchdog, doing: str) -> None:
    """Begin a phase, and return when the status of every rank has one."""
    watchdog.phase(doing)
    wait_until(lambda: all(b"step" in watchdog.store.get(str(rank)) for rank in range(watchdog.size)))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def dies(rank: int, watchdog: RankWatchdog) -> None:
    begin(watchdog, "step 12, computing")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    raise RuntimeError("Connection closed by peer")


def hangs(rank: int, watchdog: RankWatchdog) -> None:
    begin(watchdog, "step 12, waiting for data")
    if rank != 1:
        watchdog.phase("step 12, computing")
    wait_for_others()


def all_hang(rank: int, watchdog: RankWatchdog) -> None:
    begin(watchdog, "step 12, computing")
    wait_for_others()


def stops(rank: int, watchdog: RankWatchdog) -> None:
    begin(watchdog, "step 12, computing")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    wait_for_others()


def fails(rank: int, watchdog: RankWatchdog) -> None:
    begin(watchdog, "step 12, computing")
    if rank == 1:
        1 / 0  # noqa: B018
    wait_for_others()


def finds_no_room(rank: int, watchdog: RankWatchdog) -> None:
    begin(watchdog, "step 13, saving")
    if rank == 0:
        raise UserError("checkpoint x could not be written")
    if rank == 1:
        time.sleep(0.3)
        raise RuntimeError("Connection closed by peer")
    wait_for_others()


def all_fail(rank: int, watchdog: RankWatchdog) -> None:
    begin(watchdog, "step 12, computing")
    raise UserError("loss or gradient not finite")


def is_told_twice(rank: int, watchdog: Watchdog) -> None:
    if rank == 1:
        raise Stop(0)
    wait_for_others()


def ends_well(rank: int, watchdog: Watchdog) -> None:
    time.sleep(0.1 * rank)


def clocks_jump(rank: int, watchdog: Watchdog) -> None:
    """Move the clock of each rank differently: forward by a year, and back before the start."""
    now = time.time
    for jump in (365 * 86400.0 * rank, -3600.0 * (RANKS - rank)):
        watchdog.phase("step 12, computing")
        time.time = lambda jump=jump: now() + jump  # affects only this process
        time.sleep(0.7)


def waits(rank: int, watchdog: Watchdog) -> None:
    watchdog.phase("step 12, computing")
    wait_for_others()


SCENES = {
    scene.__name__: scene
    for scene in (dies, hangs, all_hang, stops, fails, finds_no_room, all_fail, is_told_twice, ends_well)
}


@dataclass
class End:
    """How the processes of a scene ended."""

    codes: list[int | None]
    said: str


def play(scene: Callable[[int, RankWatchdog], None], rank: int, port: int, said: Path) -> None:
    sys.stderr = open(said, "a")
    os.dup2(sys.stderr.fileno(), 2)
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    patient = {} if scene in (hangs, all_hang) else {"timeout": PATIENCE}
    patient |= {} if scene in (stops, waits) else {"heartbeat_timeout": PATIENCE}
    times = {"timeout": 2.0, "heartbeat_timeout": 2.0, "interval": 0.1, "grace": 1.0, **patient}

    def main() -> int:
        with watching(RankWatchdog(store=store, rank=rank, size=RANKS, **times)) as watchdog:
            scene(rank, watchdog)
        return 0

    def ended() -> None:
        try:
            run(main)
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(int(end.code or 0))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(1)

    ended()


def host(port: "multiprocessing.Queue[int]") -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.put(store.port)
    time.sleep(PATIENCE)


@contextmanager
def playing(
    scene: Callable[[int, RankWatchdog], None], said: Path
) -> Iterator[list[multiprocessing.Process]]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [server.Process(target=play, args=(scene, rank, store.port, said)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    try:
        yield processes  # type: ignore[misc]
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, End]:
    """Play all scenes, three at a time.

    One thread starts and joins all processes: `Process.start` polls those of other threads as well, and of
    two threads that poll a process of a forkserver, the second reads an exit code of 255.
    """
    folder, names, result = tmp_path_factory.mktemp("scenes"), list(SCENES), {}
    for first in range(0, len(names), 3):
        with ExitStack() as stack:
            together = {
                name: stack.enter_context(playing(SCENES[name], folder / name))
                for name in names[first : first + 3]
            }
            for name, processes in together.items():
                if name == "stops":
                    processes[0].join(PATIENCE)
                    processes[2].join(PATIENCE)
                    os.kill(processes[1].pid or 0, signal.SIGCONT)
                for process in processes:
                    process.join(PATIENCE)
                codes = [process.exitcode for process in processes]
                result[name] = End(codes, (folder / name).read_text())
    return result


def test_a_rank_that_dies_is_named(ends: dict[str, End]) -> None:
    end = ends["dies"]
    assert end.codes == [1, -signal.SIGKILL, 1]
    assert end.said.count("error: ") == 1 and len(end.said.splitlines()) == 1
    assert end.said.startswith(
        "error: rank 1 is lost: it ended without an error message, as noticed by rank "
    )
    assert ", step 12, computing. Its last heartbeat was in step 12, computing, tests/parallel" in end.said


def test_a_rank_that_hangs_is_named(ends: dict[str, End]) -> None:
    end = ends["hangs"]
    assert end.codes == [1, 1, 1]
    assert end.said.count("error: ") == 1 and len(end.said.splitlines()) == 1
    assert (
        "has made no progress for 2 s (parallel.timeout): rank 1 is in step 12, waiting for data, tests/"
        in end.said
    )
    assert "rank 2 is in" not in end.said


def test_if_all_ranks_hang_the_location_of_each_is_printed(ends: dict[str, End]) -> None:
    end = ends["all_hang"]
    assert end.codes == [1, 1, 1] and end.said.count("error: ") == 1
    assert all(
        f"rank {rank} is in step 12, computing, tests/parallel/processes/test_watchdog.py" in end.said
        for rank in (0, 1, 2)
    )


def test_a_rank_that_is_stopped_is_named(ends: dict[str, End]) -> None:
    end = ends["stops"]
    assert end.codes == [1, 1, 1]
    assert end.said.count("error: ") == 1 and len(end.said.splitlines()) == 1
    assert (
        "rank 1 has sent no heartbeat for 2 s (parallel.heartbeat_timeout): its last one was in step 12"
        in end.said
    )


def test_an_error_of_one_rank_ends_all_and_is_printed_once(ends: dict[str, End]) -> None:
    end = ends["fails"]
    assert end.codes == [1, 1, 1]
    assert end.said.count("Traceback") == 1 and "ZeroDivisionError" in end.said
    assert "This happened on rank 1, step 12, computing" in end.said


def test_a_user_error_ends_all_with_its_code(ends: dict[str, End]) -> None:
    end = ends["finds_no_room"]
    assert end.codes == [2, 2, 2]
    assert end.said == "error: rank 0, step 13, saving: checkpoint x could not be written\n"
    end = ends["all_fail"]
    assert end.codes == [2, 2, 2]
    assert end.said.count("error: ") == 1


def test_a_rank_that_must_stop_at_once_ends_the_others(ends: dict[str, End]) -> None:
    assert ends["is_told_twice"].codes == [0, 0, 0]  # the code of the signal


def test_ranks_without_errors_print_nothing(ends: dict[str, End]) -> None:
    assert ends["ends_well"] == End([0, 0, 0], "")


def test_jumps_of_the_clock_have_no_effect(tmp_path: Path) -> None:
    with playing(clocks_jump, tmp_path / "said") as processes:
        for process in processes:
            process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "said").read_text() == ""


@pytest.mark.parametrize(
    "number, words",
    [
        (signal.SIGKILL, "cannot reach it"),
        (signal.SIGSTOP, "had no answer from it for 3 s (parallel.heartbeat_timeout)"),
    ],
)
def test_a_lost_store_names_rank_0(tmp_path: Path, number: signal.Signals, words: str) -> None:
    said, ports = tmp_path / "said", server.Queue()
    hosting = server.Process(target=host, args=(ports,))
    hosting.start()
    port = ports.get()
    process = server.Process(target=play, args=(waits, 2, port, said))
    process.start()
    try:
        store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        wait_until(lambda: b"step" in store.get("2"))
        os.kill(hosting.pid or 0, number)
        process.join(PATIENCE)
    finally:
        for one in (hosting, process):
            one.kill()
        hosting.join()
    assert process.exitcode == 1
    assert f"error: rank 0 or its machine is lost: rank 2, step 12, computing, {words}" in said.read_text()


def test_code_location_is_the_innermost_line_of_this_project() -> None:
    assert code_location(None) == ""
    assert code_location(sys._getframe()).startswith("tests/parallel/processes/test_watchdog.py:")
    shown: list[str] = []
    sorted([2, 1], key=lambda _: shown.append(code_location(sys._getframe())) or 0)
    assert "test_watchdog.py:" in shown[0] and ", in" not in shown[0]
