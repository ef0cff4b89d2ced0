"""The application and what serves it: unexpected errors, the end, the socket, the address of a client."""

import asyncio
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from fastapi.testclient import TestClient

from stdit.errors import UserError
from stdit.pipelines.bundled import BUNDLED
from stdit.serve.api import security
from stdit.serve.api.app import build_app
from stdit.serve.api.http_server import HttpServer
from stdit.serve.api.server import _check_folders, _listen
from stdit.serve.gallery.gallery import Gallery
from stdit.serve.queue.jobs import JobStore
from tests.serve.servers import URL, command
from tests.waiting import seconds_left, wait_for


@pytest.mark.parametrize("error", [RuntimeError("secret"), KeyError("secret")])
def test_an_unexpected_error_is_logged_and_answered_with_all_headers(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(self: JobStore, *args: object) -> None:
        raise error

    monkeypatch.setattr(JobStore, "list_jobs", fail)
    answer = client.get("/v1/videos")
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "server_error"
    assert "secret" not in answer.text and "secret" in caplog.text and "GET /v1/videos failed" in caplog.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_each_closing_happens_even_if_another_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Gallery) -> None:
        raise OSError("the gallery cannot be closed")

    closed = list[JobStore]()
    monkeypatch.setattr(Gallery, "close", fail)
    monkeypatch.setattr(JobStore, "close", lambda store: closed.append(store))
    with (
        pytest.raises(OSError, match="the gallery cannot be closed"),
        TestClient(build_app(command(tmp_path), with_workers=False), base_url=URL),
    ):
        pass
    assert len(closed) == 2


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of a server in a thread."""
    server = HttpServer(build_app(command(tmp_path), with_workers=False))
    with _listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        wait_for(lambda: server.started, "the server")
        yield f"{URL}:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_the_address_of_a_client_is_not_taken_from_a_header(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = set[str]()

    def take(self: security.RequestLimit, client: str) -> float:
        clients.add(client)
        return 0.0

    monkeypatch.setattr(security.RequestLimit, "take", take)
    urlopen(
        Request(f"{server}/health", headers={"X-Forwarded-For": "203.0.113.7"}), timeout=seconds_left()
    ).close()
    assert clients == {"127.0.0.1"}


def test_a_client_that_leaves_in_the_middle_of_a_body_is_not_logged(
    server: str, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = server.removeprefix("http://").split(":")
    for kind in ("application/json", "multipart/form-data; boundary=x"):
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
            connection.sendall(f"{head}Content-Length: 100\r\n\r\n--x".encode())
    urlopen(f"{server}/v1/models", timeout=seconds_left()).close()
    assert "Traceback" not in caplog.text and "failed" not in caplog.text


def test_head_is_answered_without_a_body(server: str) -> None:
    for path in ("/", "/health", "/v1/videos", "/v1/models"):
        with urlopen(Request(f"{server}{path}", method="HEAD"), timeout=seconds_left()) as answer:
            assert answer.status == 200 and answer.read() == b""


@pytest.mark.parametrize(
    "case, words",
    [
        ("weights", "has 100 bytes, but"),
        ("index", "is not JSON"),
        ("loras", "server.loras = .*nope: there is no such folder"),
        ("runs", "server.runs = .*file: .*cannot be written .*: choose a folder that can be written"),
    ],
)
def test_folders_that_cannot_be_used_are_refused_before_the_server_starts(
    tmp_path: Path, case: str, words: str
) -> None:
    config = command(tmp_path)
    if case == "loras":
        config.server.loras = str(tmp_path / "nope")
    elif case == "runs":
        (tmp_path / "file").touch()
        config.server.runs = str(tmp_path / "file")
    else:
        config.checkpoint = str(shutil.copytree(BUNDLED, tmp_path / "model"))
        if case == "index":
            (tmp_path / "model" / "meta.json").unlink()
            (tmp_path / "model" / "model_index.json").write_text("{")
        else:
            [weights] = (tmp_path / "model" / "transformer").glob("*.safetensors")
            weights.write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=words):
        _check_folders(config)


def test_a_host_or_port_that_cannot_be_listened_on_is_refused_in_words() -> None:
    with pytest.raises(UserError, match=r"server.host = a\.\.b, .*: cannot be listened on"):
        _listen("a..b", 8000)
    with _listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(UserError, match=f"server.port = {port}: cannot be listened on"):
            _listen("127.0.0.1", port)


@pytest.mark.filterwarnings("error::ResourceWarning")
def test_a_socket_that_cannot_be_bound_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[socket.socket]()

    class Unbound(socket.socket):
        def bind(self, address: object) -> None:
            made.append(self)
            raise OSError("in use")

    monkeypatch.setattr(socket, "socket", Unbound)
    with pytest.raises(UserError, match="in use"):
        _listen("127.0.0.1", 0)
    assert [one.fileno() for one in made] == [-1]
