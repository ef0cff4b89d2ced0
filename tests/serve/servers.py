"""What the tests of the server share."""

import io
from pathlib import Path

import PIL.Image

from stdit.serve.config import SampleCommand, ServerConfig

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
