"""The lock on a run folder. Its content is tested with train.py."""

import multiprocessing
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from stdit.errors import UserError
from stdit.training.config import TrainConfig
from stdit.training.run_folder import lock_run_folder

fork = multiprocessing.get_context("fork")


def hold(config: TrainConfig, ready: "multiprocessing.Queue[int]") -> None:
    """Hold the lock until killed, with a child process like a loader."""
    with lock_run_folder(config):
        loader = fork.Process(target=time.sleep, args=(30,))
        loader.start()
        ready.put(loader.pid or 0)
        time.sleep(30)


def test_a_run_folder_in_use_is_refused_with_the_process_that_uses_it(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    config = TrainConfig(output_dir=str(tmp_path))
    ready: multiprocessing.Queue[int] = fork.Queue()
    holder = fork.Process(target=hold, args=(config, ready))
    holder.start()
    loader = ready.get(timeout=20)
    try:
        who = rf"\({re.escape(socket.gethostname())}, process {holder.pid}, since \d{{4}}-\d\d-\d\d .* UTC\)"
        with pytest.raises(UserError, match=rf"another process trains in .* {who}: wait for it"):
            lock_run_folder(config).__enter__()
        holder.kill()
        holder.join()
        with lock_run_folder(config) as (folder, checkpoint):  # although its child process still runs
            os.kill(loader, 0)
            assert folder == tmp_path / "run" and checkpoint is None
    finally:
        holder.kill()
        os.kill(loader, signal.SIGKILL)
