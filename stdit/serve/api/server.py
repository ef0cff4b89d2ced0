"""``sample.py --serve``: check what is needed, and run the server until it is interrupted."""

import os
import socket
from contextlib import closing
from pathlib import Path

from stdit.checkpoint_files import verify_if_sealed
from stdit.errors import UserError, install_command
from stdit.pipelines.loading import pipeline_settings
from stdit.pipelines.sources import find_checkpoint_source
from stdit.pipelines.writer import check_writable
from stdit.serve.config import SampleCommand
from stdit.serve.queue.supervisor import device_groups


def serve(config: SampleCommand) -> None:
    """Serve the page and the API until Ctrl-C.

    Raises:
        UserError: if the extra is not installed, the port is in use, the checkpoint is missing or damaged, or a
            folder cannot be written.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"--serve needs {error.name}: {install_command('serve')}") from None
    from stdit.serve.api.app import build_app
    from stdit.serve.api.http_server import HttpServer
    from stdit.serve.api.lock import lock_server

    _check_folders(config)
    if config.server.workers is not None or config.ranks > 1:
        device_groups(config)
    with (
        closing(_listen(config.server.host, config.server.port)) as listening,
        lock_server(config.state_folder),
    ):
        app = build_app(config)
        server = HttpServer(app)
        host, port = listening.getsockname()[:2]
        shown = {"127.0.0.1": "localhost", "::1": "localhost"}.get(host, host)
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else shown
        print(f"open http://{shown}:{port} in a browser; Ctrl-C stops the server", flush=True)
        server.run(sockets=[listening])


def _check_folders(config: SampleCommand) -> None:
    """Raise UserError if a folder cannot be used, or the checkpoint is missing or damaged."""
    if config.checkpoint is not None:
        source = find_checkpoint_source(config.checkpoint, config.ema)
        pipeline_settings(source)
        for part in source.path.iterdir() if source.is_pipeline else ():
            if part.is_dir():
                verify_if_sealed(part)
    if config.server.loras is not None and not Path(config.server.loras).is_dir():
        raise UserError(f"server.loras = {config.server.loras}: there is no such folder: correct the path.")
    way_out = "choose a folder that can be written"
    check_writable(config.state_folder, f"server.runs = {config.server.runs}:", way_out)
    check_writable(config.videos_folder)


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UserError if the port is in use or the host is not of this machine."""
    listening = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        if os.name == "posix":  # elsewhere it lets two servers share a port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)
    except (OSError, UnicodeError) as error:  # UnicodeError: a host such as a..b
        if listening is not None:
            listening.close()
        reason = getattr(error, "strerror", None) or error
        another = (
            f"another, such as --server.port {port + 1 if port < 65535 else 8000}, or 0 for any that is free"
        )
        if isinstance(error, socket.gaierror | UnicodeError):
            another = "another host, such as 127.0.0.1 or a name of this machine"
        raise UserError(
            f"server.host = {host}, server.port = {port}: cannot be listened on ({reason}): choose {another}."
        ) from None
    return listening
