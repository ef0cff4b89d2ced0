"""The client and connections that break."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from stdit.errors import UserError
from stdit.serve.client import VideoClient

Answer = tuple[int, bytes, int]
"""Status, body, and the length that the header says."""
Answers = Callable[[list[Answer]], AbstractContextManager[VideoClient]]


def event(name: str, **data: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def whole(body: bytes, status: int = 200) -> Answer:
    return status, body, len(body)


@pytest.fixture
def answers() -> Answers:
    """Return a client whose server gives some answers, one per request, and the last one again and again."""

    @contextmanager
    def serve(given: list[Answer]) -> Iterator[VideoClient]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body, length = given.pop(0) if len(given) > 1 else given[0]
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *values: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield VideoClient(f"http://127.0.0.1:{server.server_port}", patience=5)
            finally:
                server.shutdown()
                thread.join()

    return serve


def test_an_answer_that_breaks_off_is_asked_for_again(answers: Answers) -> None:
    with answers([(200, b'{"id"', 100), whole(b'{"id": "video_1"}')]) as client:
        assert client.get("video_1") == {"id": "video_1"}
    with answers([(200, b'{"id"', 100)]) as client, pytest.raises(UserError, match="cannot be reached"):
        client.patience = 0
        client.get("video_1")


def test_events_go_on_after_the_connection_broke(answers: Answers) -> None:
    first = event("video", status="in_progress") + b": still here\n\n" + b"event: video\ndata: {"
    last = event("video", status="in_progress") + event("video", status="completed")
    with answers([(200, first, 1000), whole(b""), whole(last + event("video", status="never"))]) as client:
        told = [data["status"] for _, data in client.events("video_1")]
    assert told == ["in_progress", "in_progress", "completed"]


def test_events_end_when_the_video_is_deleted(answers: Answers) -> None:
    with answers([whole(event("workers") + event("deleted", id="video_1"))]) as client:
        assert [name for name, _ in client.events("video_1")] == ["workers", "deleted"]


def test_events_raise_in_the_words_of_the_server_or_of_the_connection(answers: Answers) -> None:
    refused = {"error": {"message": "there is no video video_1."}}
    with answers([whole(json.dumps(refused).encode(), 404)]) as client:
        with pytest.raises(UserError, match="there is no video video_1"):
            list(client.events("video_1"))
    with answers([whole(b"")]) as client, pytest.raises(UserError, match="it ended the connection"):
        client.patience = 0
        list(client.events("video_1"))
    with pytest.raises(UserError, match="cannot be reached"):  # the server has ended
        list(client.events("video_1"))
