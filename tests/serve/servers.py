"""What the tests of the server share."""

import io
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import PIL.Image
import psutil

from stdit.serve.client import VideoClient
from stdit.serve.config import SampleCommand, ServerConfig
from tests.waiting import seconds_left, wait_for

ROOT = Path(__file__).parents[2]
URL = "http://127.0.0.1"
PROMPT = "a red star orbits a blue square on a white background"


def command(folder: Path, **server: object) -> SampleCommand:
    """Settings of a server whose folder of runs is ``folder``."""
    values = {"runs": str(folder / "outputs"), "requests_per_second": 1000.0} | server
    return SampleCommand(serve=True, server=ServerConfig(**values))  # type: ignore[arg-type]


def png(width: int = 64, height: int = 64) -> bytes:
    """A red picture."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def has_ended(process: psutil.Process) -> bool:
    """Return whether a process has ended, also one that nobody has waited for."""
    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


class Served:
    """A server that was started by its command."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.flags = ["--server.port", str(self.port), "--server.runs", str(folder / "outputs"), *flags]
        self.client = VideoClient(f"http://127.0.0.1:{self.port}", timeout=seconds_left() or 3600.0)
        self.start()

    def start(self) -> None:
        with open(self.folder / "stderr.txt", "ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "sample.py"), "--serve", *self.flags],
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    def errors(self) -> str:
        """What it wrote to its standard error since it was first started."""
        return (self.folder / "stderr.txt").read_text(encoding="utf-8")

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_for(self, state: str) -> dict[str, Any]:
        """Wait until a worker is in a state."""

        def health() -> dict[str, Any] | None:
            found = self.client.health()
            return found if any(one["state"] == state for one in found["workers"]) else None

        return wait_for(health, f"a worker that is {state}", self.errors) or {}

    def wait_until_begun(self, video: dict[str, Any]) -> None:
        """Wait until a video has made two steps."""
        wait_for(lambda: self.client.get(video)["step"] >= 2, f"two steps of {video['id']}", self.errors)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(seconds_left())
