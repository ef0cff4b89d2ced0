"""uvicorn as this server needs it."""

import socket
from typing import cast

import uvicorn
from fastapi import FastAPI

from stdit.serve.api.events import EventStream


class HttpServer(uvicorn.Server):
    """Serves an application of `build_app` until SIGINT or SIGTERM."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                ws="none",
                server_header=False,
                date_header=False,
                proxy_headers=False,  # anyone could name an address in them, and evade the limits per client
                timeout_graceful_shutdown=3,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams of events, which uvicorn would wait for, then all else."""
        cast(EventStream, self.app.state.events).close()
        for connection in list(self.server_state.connections):
            if connection.transport.is_closing():  # of a client that was dropped, and takes nothing
                connection.transport.abort()
        await super().shutdown(sockets)
