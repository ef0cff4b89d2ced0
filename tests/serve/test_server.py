"""The server as its users start it: a process with workers, which are killed, hang, and end with it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from stdit.errors import UserError
from stdit.pipelines.video_io import read_frames
from tests.serve.servers import PROMPT, ROOT, Served

QUICK = {"num_inference_steps": 4, "refine_pairs": 0}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    one = Served(tmp_path_factory.mktemp("server"), "--server.hang_timeout", "10")
    yield one
    one.process.kill()


def file_of(served: Served, video: dict[str, Any]) -> Path:
    return served.folder / "outputs" / "served" / str(video["file"])


def test_a_video_with_previews_and_the_frames_of_the_command_line(served: Served, tmp_path: Path) -> None:
    served.wait_for("idle")
    asked = served.client.create(PROMPT, seed=1)
    events = list(served.client.events(asked))
    assert [data for name, data in events if name == "preview"]
    steps = [data["step"] for name, data in events if name == "video"]
    assert steps == sorted(steps)
    video = served.client.get(asked)
    assert video["status"] == "completed" and video["progress"] == 100
    saved = served.client.save(video, tmp_path / "served.mp4")
    command = [sys.executable, str(ROOT / "sample.py"), "--prompt", PROMPT, "--seed", "1", "--format", "mp4"]
    subprocess.run([*command, "--output", str(tmp_path)], check=True, capture_output=True)
    [alone] = tmp_path.glob("000-*.mp4")
    assert (read_frames(saved, 99) == read_frames(alone, 99)).all()


@pytest.mark.parametrize("target", [pytest.param("worker", marks=pytest.mark.slow), "server"])
def test_what_is_killed_starts_again_and_no_video_is_lost(served: Served, target: str) -> None:
    served.wait_for("idle")
    asked = [served.client.create(PROMPT, seed=seed, num_inference_steps=40) for seed in range(3)]
    while served.client.get(asked[0])["step"] < 2:
        time.sleep(0.02)
    workers = served.workers()
    if target == "server":
        served.process.kill()
        served.process.wait()
        served.start()
    else:
        workers[0].kill()
    videos = [served.client.wait(one, timeout=120) for one in asked]
    assert len({one["file"] for one in videos}) == 3
    assert all(file_of(served, one).is_file() for one in videos)
    assert not any(worker.is_running() and worker.status() != "zombie" for worker in workers)


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(served: Served) -> None:
    served.wait_for("idle")
    asked = served.client.create(PROMPT, seed=7, num_inference_steps=60)
    while served.client.get(asked)["step"] < 2:
        time.sleep(0.02)
    [worker] = served.workers()
    worker.send_signal(signal.SIGSTOP)
    assert served.client.wait(asked, timeout=120)["status"] == "completed"


def test_cancelling_frees_the_worker(served: Served) -> None:
    served.wait_for("idle")
    long = served.client.create(PROMPT, num_inference_steps=4000)
    while served.client.get(long)["step"] < 2:
        time.sleep(0.02)
    assert served.client.cancel(long)["status"] == "cancelled"
    assert served.client.wait(served.client.create(PROMPT, **QUICK))["status"] == "completed"
    with pytest.raises(UserError, match="cancelled"):
        served.client.wait(long)


def test_a_second_server_is_refused(served: Served) -> None:
    command = [sys.executable, str(ROOT / "sample.py"), "--serve", *served.flags]
    same_port = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert same_port.returncode == 2
    assert f"server.port = {served.port}: cannot be listened on" in same_port.stderr
    same_folder = subprocess.run([*command, "--server.port", "0"], capture_output=True, text=True, timeout=60)
    assert same_folder.returncode == 2 and "another server uses" in same_folder.stderr
    missing = [*command, "--server.port", "0", "--checkpoint", "nowhere"]
    no_checkpoint = subprocess.run(missing, capture_output=True, text=True, timeout=60)
    assert (
        no_checkpoint.returncode == 2
        and "checkpoint nowhere: there is no such folder" in no_checkpoint.stderr
    )


def test_ctrl_c_ends_server_workers_and_open_streams(served: Served) -> None:
    served.wait_for("idle")
    workers, before = served.workers(), len(served.errors())
    with urlopen(f"{served.client.url}/v1/events", timeout=60) as stream:
        assert stream.readline() == b"event: workers\n"
        began = time.monotonic()
        assert served.stop() in (0, 130)
        assert time.monotonic() - began < 5
        assert stream.read()  # to its end
    assert "Traceback" not in served.errors()[before:]
    deadline = time.monotonic() + 10
    while any(worker.is_running() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{worker.pid}") for worker in workers)


@pytest.mark.slow
def test_a_worker_of_two_ranks_makes_cancels_and_ends(tmp_path: Path) -> None:
    served = Served(tmp_path, "--parallel.sp", "2")
    try:
        served.wait_for("idle")
        video = served.client.wait(served.client.create(PROMPT, seed=1, **QUICK))
        long = served.client.create(PROMPT, num_inference_steps=4000)
        while served.client.get(long)["step"] < 2:
            time.sleep(0.05)
        served.client.cancel(long)
        again = served.client.wait(served.client.create(PROMPT, seed=1, **QUICK), timeout=60)
        first, second = (read_frames(file_of(served, one), 99) for one in (video, again))
        assert (first == second).all()
        workers = served.workers()
        assert len(workers) == 3  # the launcher and two ranks
    finally:
        served.process.kill()
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{worker.pid}") for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{worker.pid}") for worker in workers)
