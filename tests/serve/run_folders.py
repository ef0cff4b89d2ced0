"""Run folders as training writes them, and processes that hold their locks."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from stdit.checkpoint_files import write_manifest

HOLDER = """
import fcntl, os, signal, socket, sys, time
lock = open(sys.argv[1], "a+")
fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
lock.truncate(0)
lock.write(f"{sys.argv[2] or socket.gethostname()}, process {os.getpid()}, since 2026-01-01 00:00:00 UTC\\n")
lock.flush()
signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
print("locked", flush=True)
time.sleep(60)
"""
"""Does what `lock_run_folder` does, without stdit; ends with the code 7 after SIGTERM."""


def make_run(folder: Path, steps: int = 100, done: int = 0, **settings: Any) -> Path:
    """Write config and metrics of a run."""
    folder.mkdir(parents=True)
    config = {"name": folder.name, "trainer": {"steps": steps}, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write_metrics(folder, range(done))
    return folder


def write_metrics(folder: Path, steps: Sequence[int]) -> None:
    """Append lines to the metrics of a run: the loss of a step is a tenth of it."""
    with open(folder / "metrics.jsonl", "a") as file:
        for step in steps:
            line = {"step": step, "loss": step / 10, "lr": 0.001, "skipped": False, "clips": 8}
            line |= {"seconds": 0.3, "data_seconds": 0.1, "matmul_precision": "highest"}
            file.write(json.dumps(line) + "\n")


def make_checkpoint(run: Path, step: int) -> Path:
    """Write a checkpoint of a run, whole."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights.safetensors").write_bytes(bytes(1000))
    write_manifest(folder, {"step": step})
    return folder


@contextmanager
def locked(run: Path, host: str = "", script: str = "train.py") -> Iterator[subprocess.Popen[str]]:
    """Hold the lock of a run by a process that looks like a training, or not."""
    file = run.parent / f"bin-{run.name}" / script
    file.parent.mkdir(exist_ok=True)
    file.write_text(HOLDER)
    command = [sys.executable, str(file), str(run / ".lock"), host]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
