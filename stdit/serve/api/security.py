"""Who may ask the server what: passwords, hosts, origins, sizes and numbers of requests."""

import base64
import hmac
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any
from urllib.parse import urlsplit

from stdit.serve.config import ServerConfig, is_loopback
from stdit.serve.errors import RequestError, error_body
from stdit.serve.queue.uploads import too_large

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

MAX_BODY = 2**20
"""Bytes of a request without a file."""
_OPEN = ("/health",)
"""Paths that need no password."""
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; style-src 'self'; "
        "script-src 'self'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    ),
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
_CLIENTS = 4096
"""Clients that are remembered."""
_BURST_SECONDS = 4.0
"""Seconds' worth of requests that may come at once."""


@dataclass
class RequestLimit:
    """A token bucket per client."""

    per_second: float
    _left: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def take(self, client: str) -> float:
        """Count a request; return after how many seconds it would be allowed, 0 if it is now."""
        now, burst = time.monotonic(), max(1.0, self.per_second * _BURST_SECONDS)
        left, since = self._left.pop(client, (burst, now))
        left = min(burst, left + (now - since) * self.per_second)
        self._left[client] = (left - 1 if left >= 1 else left, now)
        if len(self._left) > _CLIENTS:
            self._left.popitem(last=False)
        return 0.0 if left >= 1 else (1 - left) / self.per_second


class Guard:
    """ASGI middleware that lets through only what is allowed, and adds headers of safety to each answer."""

    def __init__(self, app: Any, config: ServerConfig) -> None:
        self.app, self.config = app, config
        self.limit = RequestLimit(config.requests_per_second)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_safely(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                named = {name for name, _ in message.get("headers", [])}
                added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                headers = [*message.get("headers", []), *(one for one in added if one[0] not in named)]
                message = {**message, "headers": headers}
            await send(message)

        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        try:
            self._check(scope, headers)
            limited = self._limited(receive, headers)
        except RequestError as error:
            await _refuse(error, send_safely)
            return
        await self.app(scope, limited, send_safely)

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        client = client_of(scope)
        if wait := self.limit.take(client):
            raise RequestError(
                f"more than {self.config.requests_per_second:g} requests per second: wait {max(0.1, wait):.1f} s.",
                status=429,
                code="rate_limit_exceeded",
                retry_after=ceil(wait),
            )
        self._check_host(headers)
        if scope["path"] not in _OPEN:
            self._check_password(headers.get("authorization", ""))
        origin = headers.get("origin")
        changes = scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if changes and origin is not None and origin.partition("://")[2] != headers.get("host"):
            raise RequestError(
                "a page of another origin may not change anything here.", status=403, code="other_origin"
            )

    def _check_host(self, headers: dict[str, str]) -> None:
        """Raise RequestError for a host that is not this one: a page elsewhere can let its name lead here."""
        try:
            host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        except ValueError:
            host = ""
        if self.config.auth or self.config.token or is_loopback(host) or host == self.config.host:
            return
        raise RequestError(f"host {host:.80} is not this server.", status=403, code="other_host")

    def _check_password(self, given: str) -> None:
        wanted_auth, token = self.config.auth, self.config.token
        if wanted_auth is None and token is None:
            return
        kind, _, value = given.partition(" ")
        right = False
        if kind.lower() == "bearer" and token is not None:
            right = _same(value.encode("latin-1", "replace"), token)  # as it was sent, in UTF-8
        elif kind.lower() == "basic":
            try:
                pair = base64.b64decode(value, validate=True)
            except ValueError:
                pair = b""
            right = wanted_auth is not None and _same(pair, wanted_auth)
            right |= token is not None and _same(pair.partition(b":")[2], token)
        if not right:
            raise RequestError(
                "this server needs a password or token: send Authorization.", status=401, code="unauthorized"
            )

    def _limited(self, receive: Receive, headers: dict[str, str]) -> Receive:
        """Return ``receive`` that fails once a body is larger than allowed."""
        has_file = headers.get("content-type", "").lower().startswith("multipart/form-data")
        of_files = int(self.config.max_upload_mib * 2**20)
        most, error = (of_files + MAX_BODY, too_large(of_files)) if has_file else (MAX_BODY, too_large_text())
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > most:
            raise error
        got = 0

        async def limited() -> dict[str, Any]:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > most:
                raise error
            return message

        return limited


def too_large_text() -> RequestError:
    """Return the error of a request whose settings are too long."""
    return RequestError(
        f"JSON of more than {MAX_BODY // 2**20} MiB is not read: send files to /v1/uploads, as a form "
        "(multipart/form-data), and name them by their ids.",
        status=413,
        code="too_large",
    )


def client_of(scope: Scope) -> str:
    """Return the address of a client."""
    return scope["client"][0] if scope.get("client") else "unknown"


def _same(given: bytes, wanted: str) -> bool:
    return hmac.compare_digest(given, wanted.encode("utf-8", "surrogateescape"))


async def _refuse(error: RequestError, send: Send) -> None:
    body = json.dumps(error_body(str(error), error.param, error.error_code, error.status)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status == 401:
        headers.append((b"www-authenticate", b'Basic realm="stdit", charset="UTF-8"'))
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
