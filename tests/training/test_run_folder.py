"""The lock on a run folder, and its copy of a small codec. The rest of its content is tested with train.py."""

import multiprocessing
import os
import re
import signal
import socket
from pathlib import Path

import pytest

from stdit.codecs.base import VideoCodec
from stdit.codecs.pixel import PixelCodec
from stdit.codecs.tiny import TinyCodec
from stdit.errors import UserError
from stdit.training.config import TrainConfig
from stdit.training.run_folder import lock_run_folder, write_run_files
from tests.waiting import hang

fork = multiprocessing.get_context("fork")


def hold(config: TrainConfig, ready: "multiprocessing.Queue[int]") -> None:
    """Hold the lock until killed, with a child process like a loader."""
    with lock_run_folder(config):
        loader = fork.Process(target=hang)
        loader.start()
        ready.put(loader.pid or 0)
        hang()


def test_a_run_folder_in_use_is_refused_with_the_process_that_uses_it(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    config = TrainConfig(output_dir=str(tmp_path))
    ready: multiprocessing.Queue[int] = fork.Queue()
    holder = fork.Process(target=hold, args=(config, ready))
    holder.start()
    loader = ready.get()
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


def test_a_run_keeps_the_codec_that_comes_with_stdit(tmp_path: Path) -> None:
    """A later stdit may come with another one."""
    codec = TinyCodec(4, (16, 16, 16))
    write_run_files(tmp_path, TrainConfig(), codec, new=True)
    assert VideoCodec.from_pretrained(tmp_path / "codec").fingerprint() == codec.fingerprint()
    write_run_files(tmp_path, TrainConfig(), PixelCodec(), new=True)
    assert not (tmp_path / "codec").exists()
