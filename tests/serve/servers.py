"""What the tests of the server share."""

import io
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import PIL.Image
import psutil

from stdit.serve.client import VideoClient
from stdit.serve.config import SampleCommand, ServerConfig

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


class Served:
    """A server that was started by its command."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.flags = ["--server.port", str(self.port), "--server.runs", str(folder / "outputs"), *flags]
        self.client = VideoClient(f"http://127.0.0.1:{self.port}", timeout=60)
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
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            found = self.client.request("GET", "/health")
            if any(one["state"] == state for one in found["workers"]):
                return dict(found)
            time.sleep(0.1)
        raise TimeoutError(state)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)
