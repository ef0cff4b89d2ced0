"""What a supervisor keeps and removes, and the processes that it starts."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from stdit.errors import UserError
from stdit.serve.config import SampleCommand
from stdit.serve.queue import supervisor as module
from stdit.serve.queue.job import NewJob
from stdit.serve.queue.jobs import JobStore
from stdit.serve.queue.paths import ServerPaths
from stdit.serve.queue.supervisor import Supervisor
from tests.serve.servers import command, has_ended
from tests.waiting import wait_for


def supervisor_of(config: SampleCommand) -> Supervisor:
    paths = ServerPaths(config.state_folder, config.videos_folder, config.runs_folder)
    paths.videos.mkdir(parents=True)
    return Supervisor(config, paths, JobStore(paths.jobs_file))


def finished(one: Supervisor, number: int, size: int) -> Path:
    """A job that is completed, with its video."""
    name = f"video_{number}"
    new = NewJob(id=name, client="c", body={"prompt": "p"}, model="m", batch="b", work=1.0, facts={})
    one.store.submit(new)
    if number == 0:
        one.store.register("w")
    one.store.claim("w", 1)
    file = one.paths.videos / f"{number}.mp4"
    file.write_bytes(b"x" * size)
    one.store.complete("w", name, file.name, size, 1.0)
    return file


@pytest.mark.parametrize("server, kept", [({"keep_gib": 2.5e-6}, [False, True, True]), ({}, [True] * 3)])
def test_large_and_old_videos_are_deleted(tmp_path: Path, server: dict[str, Any], kept: list[bool]) -> None:
    one = supervisor_of(command(tmp_path, **server))
    files = [finished(one, number, 1000) for number in range(3)]
    one._clean()
    assert [file.exists() for file in files] == kept
    assert [one.store.get(f"video_{number}") is not None for number in range(3)] == kept


def test_old_videos_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = supervisor_of(command(tmp_path, keep_days=1))
    file, now = finished(one, 0, 10), time.time()
    for days, kept in ((0.9, True), (1.1, False)):
        monkeypatch.setattr(time, "time", lambda days=days: now + days * 86400)
        one._clean()
        assert file.exists() == kept


def test_each_worker_is_a_process_or_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    class Process:
        def __init__(self, argv: list[str], **_: Any) -> None:
            started.append(argv)

        def poll(self) -> None:
            return None

    monkeypatch.setattr(module.subprocess, "Popen", Process)
    for sp, workers in ((1, 2), (2, 1)):
        config = command(tmp_path / str(sp), workers=workers)
        config.parallel.sp, config.imports = sp, ["json"]
        one = supervisor_of(config)
        one.start()
        wait_for(lambda workers=workers: len(started) >= workers, f"{workers} workers", lambda: started)
        one._stopping.set()
        assert one._thread is not None
        one._thread.join()
        assert all(argv[-2:] == ["--import", "json"] for argv in started)
        assert all(("--nproc_per_node" in argv) == (sp == 2) for argv in started)
        assert len({argv[argv.index(str(one.paths.state)) + 1] for argv in started}) == workers
        assert len(one.store.workers()) == workers
        started.clear()


def test_what_a_killed_process_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = supervisor_of(command(tmp_path))
    kept = one.paths.videos / "v.mp4"
    kept.touch()
    writes = (
        "import os, pathlib, sys; from stdit.atomic_files import atomic_write\n"
        "with atomic_write(pathlib.Path(sys.argv[1])) as file: file.touch(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", writes, str(kept)], check=True)
    [left] = one.paths.videos.glob(".*")
    monkeypatch.setattr(Supervisor, "_watch", lambda self: None)
    one.start()
    assert kept.exists() and not left.exists()


def test_the_ranks_of_a_group_that_hangs_are_ended(tmp_path: Path) -> None:
    one = supervisor_of(command(tmp_path))
    sleeps = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(100)"]
    launches = f"import subprocess; subprocess.Popen({sleeps!r}, start_new_session=True).wait()"
    process = subprocess.Popen(
        [sys.executable, "-c", launches],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    [rank] = psutil.Process(process.pid).children()
    one._end(module._Process(0, [], process=process))
    process.stdout.close()
    assert process.poll() is not None
    wait_for(lambda: has_ended(rank), "the end of the rank")


def test_a_worker_that_ends_again_and_again_waits_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = supervisor_of(command(tmp_path))
    worker, pauses, now = module._Process(0, [], "w", started=1.0), [], [1.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    for _ in range(12):
        one._replace(worker, "exit code 1")
        pauses.append(worker.pause)
    assert pauses == sorted(pauses) and pauses[0] < 1 and pauses[-1] == module.MAX_PAUSE
    now[0] += 1000
    one._replace(worker, "signal 9")
    assert worker.pause == 0.0


@pytest.mark.parametrize(
    "workers, sp, device, groups",
    [
        (None, 1, "auto", [["4"], ["5"], ["6"]]),
        (2, 1, "auto", [["4"], ["5"]]),
        (None, 2, "auto", [["4", "5"]]),
        (2, 1, "cpu", [[], []]),
        (None, 1, "cuda:1", [[]]),
    ],
)
def test_each_worker_has_gpus_of_its_own(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int | None,
    sp: int,
    device: str,
    groups: list[list[str]],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    config = command(tmp_path, workers=workers)
    config.parallel.sp, config.device = sp, device
    assert module.device_groups(config) == groups
    if groups != [[]] and device == "auto":
        config.server.workers = 4
        with pytest.raises(UserError, match="server.workers = 4 of"):
            module.device_groups(config)
