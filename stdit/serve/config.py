"""Settings of the page and the server. Imports no torch."""

import os
from dataclasses import dataclass, field, fields
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from stdit.errors import UserError
from stdit.pipelines.config import SampleConfig
from stdit.settings import plain

OF_SERVER = (
    "checkpoint",
    "imports",
    "lora_other_base",
    "output",
    "batch_size",
    "ema",
    "dtype",
    "compile",
    "device",
    "codec",
    "parallel",
)
"""Settings of sampling that a server has; all others belong to each request."""


@dataclass
class ServerConfig:
    """The page and the API that --serve starts."""

    host: str = "127.0.0.1"
    """Address to listen on; others than this machine's own need auth or token."""
    port: int = 8000
    """Port to listen on."""
    runs: str = "outputs"
    """Folder of runs, whose models can be chosen, and whose videos and curves the page shows."""
    loras: str | None = None
    """Folder of adapters (.safetensors) that can be chosen, beside those of the runs."""
    auth: str | None = field(default=None, repr=False)
    """USER:PASSWORD, for which browsers ask; none: the variable STDIT_SERVER_AUTH, or no password."""
    token: str | None = field(default=None, repr=False)
    """Token that programs send (Authorization: Bearer ...), also valid as a password; none: STDIT_SERVER_TOKEN."""
    allow_training: bool = True
    """Let the page start, stop and resume trainings."""
    workers: int | None = None
    """Processes, or groups of parallel.sp x parallel.cfg processes, that make videos at the same time; none: as many
    as there are GPUs for, or one on a CPU."""
    hang_timeout: float = 600.0
    """Seconds without a step after which a worker counts as hanging, and is restarted."""
    max_upload_mib: float = 64.0
    """MiB that a request may send."""
    max_uploads_gib: float = 10.0
    """GiB of all uploads that are kept, above which no more are taken."""
    max_waiting: int = 1000
    """Videos that may wait at a time."""
    max_waiting_per_client: int = 200
    """Videos of one client, known by its address, that may wait at a time."""
    requests_per_second: float = 50.0
    """Requests that a client may make per second, on average."""
    keep_days: float | None = None
    """Days after which videos that the server made are deleted; none: never."""
    keep_gib: float | None = None
    """GiB of videos that the server made, above which the oldest are deleted; none: no limit."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"server.port = {self.port}: must be from 1 to 65535, or 0 for any that is free.")
        positive = (
            "hang_timeout",
            "max_upload_mib",
            "max_uploads_gib",
            "requests_per_second",
            "keep_days",
            "keep_gib",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"server.{name} = {value}: must be positive.")
        for name in ("workers", "max_waiting", "max_waiting_per_client"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"server.{name} = {value}: must be at least 1.")
        self.auth = self.auth or os.environ.get("STDIT_SERVER_AUTH") or None
        self.token = self.token or os.environ.get("STDIT_SERVER_TOKEN") or None
        if self.auth is not None and not all(self.auth.partition(":")):
            raise UserError("server.auth must be USER:PASSWORD, neither of them empty.")
        if not (is_loopback(self.host) or self.auth or self.token):
            raise UserError(
                f"server.host = {self.host}: other machines could use this one without a password: add --server.auth "
                "USER:PASSWORD or --server.token TOKEN, or leave the host out."
            )


@dataclass
class SampleCommand(SampleConfig):
    """Generate videos from prompts, or serve a page that does."""

    serve: bool = False
    """Instead of writing videos, start a page and an API (needs the extra serve); see stdit/serve/README.md."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """The page and the API."""

    def __post_init__(self) -> None:
        super().__post_init__()
        others = [f for f in fields(self) if f.name not in (*OF_SERVER, "serve", "server")]
        if self.serve and (own := [f.name for f in others if _is_set(self, f)]):
            raise UserError(
                f"{' and '.join(own)} beside serve: the page and the API take that from each request: leave it out."
            )
        unset = ServerConfig()  # with the passwords of the environment
        if not self.serve and self.server != unset:
            names = (f.name for f in fields(unset))
            name = next(one for one in names if getattr(self.server, one) != getattr(unset, one))
            raise UserError(f"server.{name} is for --serve: add that, or leave it out.")

    @property
    def ranks(self) -> int:
        """Processes of a worker."""
        return (1 if self.parallel.sp == "auto" else self.parallel.sp) * self.parallel.cfg

    @property
    def runs_folder(self) -> Path:
        """Folder of the runs."""
        return Path(self.server.runs)

    @property
    def videos_folder(self) -> Path:
        """Folder of the videos that the server makes."""
        return self.runs_folder / "served" if self.output is None else Path(self.output)

    @property
    def state_folder(self) -> Path:
        """Folder of the jobs, uploads and thumbnails."""
        return self.runs_folder / ".serve"

    def of_worker(self) -> dict[str, Any]:
        """Return the settings that a worker has, as YAML can hold them; no password is among them."""
        return {name: plain(getattr(self, name)) for name in OF_SERVER}


def _is_set(config: Any, setting: Any) -> bool:
    default = setting.default_factory() if callable(setting.default_factory) else setting.default
    return bool(getattr(config, setting.name) != default)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a host's address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
