"""A server without workers, and one with a worker, on the model that comes with stdit."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from stdit.serve.app import build_app
from stdit.serve.config import SampleCommand, ServerConfig

URL = "http://127.0.0.1"


def command(folder: Path, **server: object) -> SampleCommand:
    """Settings of a server whose folder of runs is ``folder``."""
    values = {"runs": str(folder / "outputs"), "requests_per_second": 1000.0} | server
    return SampleCommand(serve=True, server=ServerConfig(**values))  # type: ignore[arg-type]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """A server whose jobs wait: it has no workers."""
    with TestClient(build_app(command(tmp_path), with_workers=False), base_url=URL) as client:
        yield client
