"""The workers of a server: start them, watch them, and restart those that end or hang."""

import logging
import os
import secrets
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from stdit.atomic_files import remove_unfinished
from stdit.errors import UserError
from stdit.serve.child_environment import environment_without_passwords
from stdit.serve.config import SampleCommand
from stdit.serve.gallery.thumbnails import remove_thumbnails
from stdit.serve.queue.jobs import JobStore
from stdit.serve.queue.paths import ServerPaths
from stdit.settings import to_yaml

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.1
MAX_PAUSE = 30.0
"""Seconds between two starts of a worker that ends again and again."""
_QUICK = 10.0
"""Seconds of life below which a worker has not worked."""
_CLEAN_SECONDS = 60.0
"""Between two looks for what is too old."""
_DELETED_SECONDS = 3600.0
"""For which it is known that a job was deleted."""
_UPLOAD_SECONDS = 7 * 86400.0
"""For which an upload that nobody uses is kept."""


@dataclass
class _Process:
    """A place for a worker, and the process that fills it."""

    place: int
    gpus: list[str]
    """Those that it may use; empty: whatever it finds."""
    name: str = ""
    """A new one for each process: what an earlier one still says of its jobs is ignored."""
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause: float = 0.0
    not_before: float = 0.0


@dataclass
class Supervisor:
    """The workers of a server."""

    config: SampleCommand
    paths: ServerPaths
    store: JobStore
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _workers: list[_Process] = field(default_factory=list)
    _cleaned: float = 0.0

    def start(self) -> None:
        """Let jobs of an earlier server wait again, and start the workers."""
        self.store.release()
        remove_unfinished(self.paths.videos)
        self.paths.write()
        self._config_file.write_text(to_yaml(self.config.of_worker()), encoding="utf-8")
        self._workers = [_Process(place, gpus) for place, gpus in enumerate(device_groups(self.config))]
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the workers; their jobs wait for the next server."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        for worker in self._workers:
            self._end(worker)
        self.store.release()

    @property
    def _config_file(self) -> Path:
        return self.paths.state / "worker.yaml"

    def _watch(self) -> None:
        while not self._stopping.wait(WATCH_SECONDS):
            try:
                for worker in self._workers:
                    self._look_after(worker)
                if time.monotonic() - self._cleaned > _CLEAN_SECONDS:
                    self._clean()
                    self._cleaned = time.monotonic()
            except Exception:  # such as a full disk: the workers are looked after again
                logger.exception("the workers could not be looked after")
                self._stopping.wait(1.0)

    def _look_after(self, worker: _Process) -> None:
        if worker.process is None:
            if time.monotonic() >= worker.not_before:
                self._start(worker)
            return
        code = worker.process.poll()
        if code is None:
            if self._hangs(worker):
                logger.warning(
                    "worker %d has made no step for %g seconds: it is restarted",
                    *(worker.place, self.config.server.hang_timeout),
                )
                self._end(worker)
                self._replace(worker, "it made no step for too long")
            return
        self._replace(worker, f"exit code {code}" if code >= 0 else f"signal {-code}")

    def _replace(self, worker: _Process, reason: str) -> None:
        if worker.process is not None and worker.process.stdin is not None:
            worker.process.stdin.close()  # for ranks that outlive their launcher
        remove_unfinished(self.paths.videos)
        for job in self.store.release(worker.name, crashed=True, reason=reason):
            logger.warning("%s failed: its worker ended again and again (%s)", job, reason)
        lived = time.monotonic() - worker.started
        worker.pause = 0.0 if lived > _QUICK else min(MAX_PAUSE, max(0.2, 2 * worker.pause))
        logger.warning("worker %d ended (%s): it is restarted", worker.place, reason)
        worker.process, worker.not_before = None, time.monotonic() + worker.pause

    def _start(self, worker: _Process) -> None:
        worker.name = f"worker-{worker.place}-{secrets.token_hex(4)}"
        worker.started = time.monotonic()
        self.store.register(worker.name)
        config, ranks = self.config, self.config.ranks
        launcher = [sys.executable, "-m"]
        if ranks > 1:
            launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
        imports = [flag for module in config.imports for flag in ("--import", module)]
        command = [*launcher, "stdit.serve.queue.worker", str(self.paths.state), worker.name]
        gpus = {"CUDA_VISIBLE_DEVICES": ",".join(worker.gpus)} if worker.gpus else {}
        try:
            worker.process = subprocess.Popen(
                [*command, "--config", str(self._config_file), *imports],
                stdin=subprocess.PIPE,
                env=environment_without_passwords() | gpus,
                start_new_session=True,  # Ctrl-C is for the server, which ends it
            )
        except OSError:
            self.store.release(worker.name)
            raise

    def _hangs(self, worker: _Process) -> bool:
        beats = [one["heartbeat"] for one in self.store.workers() if one["name"] == worker.name]
        return bool(beats) and time.time() - max(beats) > self.config.server.hang_timeout

    def _end(self, worker: _Process) -> None:
        process = worker.process
        if process is None:
            return
        assert process.stdin is not None
        try:
            group = [psutil.Process(process.pid)]  # its ranks have sessions of their own
            group += group[0].children(recursive=True)
        except psutil.NoSuchProcess:
            group = []
        process.stdin.close()  # the worker ends, and all ranks of its group
        for one in psutil.wait_procs(group, timeout=2)[1]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()

    def _clean(self) -> None:
        """Delete what is kept no longer."""
        server = self.config.server
        for job in self.store.expired(server.keep_days, server.keep_gib):
            self.paths.delete_video(self.store, job.id)
        self.store.purge(_DELETED_SECONDS)
        for upload in self.paths.uploads.remove_older(_UPLOAD_SECONDS):
            remove_thumbnails(upload, self.paths.thumbnails)


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if given := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return given.split(",")
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def device_groups(config: SampleCommand) -> list[list[str]]:
    """Return the GPUs of each worker; none on a CPU, or if the settings name one.

    Raises:
        UserError: if there are too few for as many workers as are asked for.
    """
    ranks, workers = config.ranks, config.server.workers
    gpus = visible_gpus() if config.device == "auto" else []
    if not gpus:
        return [[] for _ in range(workers or 1)]
    groups = [gpus[first : first + ranks] for first in range(0, len(gpus) - ranks + 1, ranks)]
    if len(groups) < (workers or 1):
        raise UserError(
            f"server.workers = {workers or 1} of {ranks} {'GPU' if ranks == 1 else 'GPUs'} each: there are only "
            f"{len(gpus)}: use fewer workers, or a smaller parallel.sp."
        )
    return groups[: workers or len(groups)]
