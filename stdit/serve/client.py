"""A thin client of the server's API, with nothing but Python's standard library.

from stdit.serve.client import VideoClient

client = VideoClient("http://localhost:8000")
video = client.create("a red star moves to the right on a white background", seed=1)
client.save(client.wait(video), "star.mp4")
"""

import http.client
import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stdit.atomic_files import atomic_write
from stdit.errors import UserError

_OVER = ("completed", "failed", "cancelled")
_BROKEN = (OSError, http.client.HTTPException)
"""Errors of a connection; those of urllib are OSErrors."""
_PAUSE = 0.5
"""Seconds between two of them."""


@dataclass
class VideoClient:
    """A client of a server of videos.

    Args:
        url: of the server.
        token: its ``--server.token``, if it has one.
        timeout: seconds that one answer may take.
        patience: seconds for which a request that finds no server is sent again: it may be starting.
    """

    url: str = "http://localhost:8000"
    token: str | None = None
    timeout: float = 60.0
    patience: float = 15.0

    def create(self, prompt: str, **fields: Any) -> dict[str, Any]:
        """Ask for a video; if the server ends meanwhile, ask again, and get one video nevertheless.

        Args:
            fields: further fields of a request, such as seed or num_inference_steps.

        Returns:
            the video as the API shows it.

        Raises:
            UserError: the server's message, if the request breaks a rule.
        """
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        found: dict[str, Any] = self.request("POST", "/v1/videos", {"prompt": prompt, **fields}, headers)
        return found

    def get(self, video: Mapping[str, Any] | str) -> dict[str, Any]:
        """Return the state of a video."""
        found: dict[str, Any] = self.request("GET", f"/v1/videos/{_id(video)}")
        return found

    def wait(
        self,
        video: Mapping[str, Any] | str,
        timeout: float = 3600.0,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Wait until a video is over; return it.

        Args:
            timeout: seconds.
            on_progress: called with the video as it changes.

        Raises:
            UserError: if it failed or was cancelled, or takes too long.
        """
        deadline, before = time.monotonic() + timeout, None
        while True:
            found = self.get(video)
            if on_progress is not None and found != before:
                on_progress(found)
            before = found
            if found["status"] == "completed":
                return found
            if found["status"] in _OVER:
                raise UserError(
                    f"{found['id']} {found['status']}: {(found['error'] or {}).get('message', '')}"
                )
            if time.monotonic() > deadline:
                raise UserError(f"{found['id']} is not finished after {timeout:g} seconds: wait again.")
            time.sleep(0.2)

    def save(self, video: Mapping[str, Any] | str, file: str | Path) -> Path:
        """Save a finished video; return its file."""
        path = Path(file)
        content = self._send("GET", f"/v1/videos/{_id(video)}/content")
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
        return path

    def events(self, video: Mapping[str, Any] | str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the name and data of each event of a video, such as its previews, until it is over or deleted.

        If the connection breaks, it is opened again, and the state of the video is the first event again.

        Raises:
            UserError: the server's message, or that there is no server.
        """
        request, deadline = self._request("GET", f"/v1/videos/{_id(video)}/events"), None
        while True:
            broken: Exception | None = None
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    for name, data in _read_events(answer):
                        deadline = None
                        yield name, data
                        if name == "deleted" or (name == "video" and data["status"] in _OVER):
                            return
            except urllib.error.HTTPError as error:
                raise UserError(_message(error)) from None
            except _BROKEN as error:
                broken = error
            deadline = time.monotonic() + self.patience if deadline is None else deadline
            self._pause(broken, deadline)

    def health(self) -> dict[str, Any]:
        """Return the state of the server and its workers."""
        found: dict[str, Any] = self.request("GET", "/health")
        return found

    def cancel(self, video: Mapping[str, Any] | str) -> dict[str, Any]:
        """Cancel a video unless it is over."""
        found: dict[str, Any] = self.request("POST", f"/v1/videos/{_id(video)}/cancel")
        return found

    def delete(self, video: Mapping[str, Any] | str) -> None:
        """Delete a video and its file."""
        self.request("DELETE", f"/v1/videos/{_id(video)}")

    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Any:
        """Send any request of the API, with a body as JSON; return the answer's JSON.

        Raises:
            UserError: the server's message, or that there is no server.
        """
        return json.loads(self._send(method, path, body, headers))

    def _send(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        request = self._request(method, path, body, headers)
        deadline = time.monotonic() + self.patience
        while True:
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    content: bytes = answer.read()
                    return content
            except urllib.error.HTTPError as error:
                raise UserError(_message(error)) from None
            except _BROKEN as error:
                self._pause(error, deadline)

    def _pause(self, broken: Exception | None, deadline: float) -> None:
        """Wait before another try. Raises UserError after the deadline."""
        if time.monotonic() > deadline:
            reason = getattr(broken, "reason", broken) or "it ended the connection"
            raise UserError(f"{self.url} cannot be reached ({reason}): is the server running?") from None
        time.sleep(_PAUSE)

    def _request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> urllib.request.Request:
        sent = dict(headers or {}) | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        data = None
        if body is not None:
            data, sent["Content-Type"] = json.dumps(body).encode(), "application/json"
        return urllib.request.Request(self.url.rstrip("/") + path, data, sent, method=method)


def _id(video: Mapping[str, Any] | str) -> str:
    return video if isinstance(video, str) else str(video["id"])


def _read_events(lines: Iterable[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and data of each event of a stream; an event that broke off is left out."""
    name = data = ""
    for line in lines:
        text = line.decode().rstrip("\n")
        if text.startswith("event: "):
            name = text.removeprefix("event: ")
        elif text.startswith("data: "):
            data = text.removeprefix("data: ")
        elif not text and data:
            yield name, json.loads(data)
            name = data = ""


def _message(error: urllib.error.HTTPError) -> str:
    """Return the server's words for an error."""
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"{error.code} {error.reason}"
