"""A server without workers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from stdit.serve.api.app import build_app
from tests.serve.servers import URL, command


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    """A server whose jobs wait: it has no workers."""
    with TestClient(build_app(command(tmp_path), with_workers=False), base_url=URL) as client:
        yield client
