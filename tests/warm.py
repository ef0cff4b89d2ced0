"""Processes that start in milliseconds: forked from a server that has already imported torch.

The server starts with the first process, and has no threads. Code that reads environment variables while it is
imported sees those of the server: tests of such code must start Python themselves.
"""

import atexit
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.waiting import communicate

ROOT = Path(__file__).parents[1]
IMPORTED = [
    "accelerate",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers",
    "stdit.pipelines.pipeline",
    "stdit.training.trainer",
]
"""Modules that most processes of the tests need."""


def context() -> ForkServerContext:
    """Return the context whose processes are forked from the server."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(IMPORTED)
    return found


def run(
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    largest_file: int | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Run ``python ARGV`` to its end, as `subprocess.run` does with captured text.

    Args:
        largest_file: bytes beyond which writing to a file fails (Python ignores SIGXFSZ).
    """
    process = Python(argv, env, cwd, largest_file)
    try:
        output, errors = communicate(process)
    finally:
        process.kill()
    return subprocess.CompletedProcess(argv, process.wait(), output, errors)


class Python:
    """A process that runs a script of the repository, with the interface of `subprocess.Popen`."""

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        largest_file: int | None = None,
    ) -> None:
        """Start ``python ARGV``, whose output is kept in files."""
        self.args = list(argv)
        self.returncode: int | None = None
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        environment = dict(os.environ if env is None else env)
        given = (self.args, environment, cwd, self._files, largest_file)
        self._process = context().Process(target=_run, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code. Raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if self.poll() is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout, *self.output())
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; return output and errors."""
        self.wait(timeout)
        return self.output()

    def output(self) -> tuple[str, str]:
        """Return the output and errors so far."""
        texts = [file.read_text(errors="replace") if file.exists() else "" for file in self._files]
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process."""
        self.send_signal(signal.SIGKILL)


def _run(
    argv: list[str],
    environment: Mapping[str, str],
    cwd: Path,
    files: Sequence[Path],
    largest_file: int | None,
) -> None:
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor, file in zip((1, 2), files, strict=True):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)
    sys.stdin = open(os.devnull)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).resolve().parent))
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing does not run them
        sys.stdout.flush()
