"""Start the entry scripts: on several processes of this machine, or in this one."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest

from stdit.cli import run
from tests import warm
from tests.waiting import communicate, wait_for
from tests.warm import ROOT

GRACE_SECONDS = 15.0
"""Seconds for each of the other ranks to end after one has failed, before they are killed."""


def start(
    script: str, ranks: int, argv: list[str], launcher: str = "torchrun", **options: Any
) -> subprocess.Popen[str]:
    """Start ``train.py`` or ``sample.py`` through a launcher: torchrun or accelerate.

    Args:
        options: of `subprocess.Popen`.
    """
    port = str(free_port())
    commands = {
        "torchrun": ["torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(ranks)]
        + ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        + ["--main_process_port", port],
    }
    return subprocess.Popen(
        [sys.executable, "-m", *commands[launcher], script, *argv],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def launch(script: str, ranks: int, argv: list[str], launcher: str = "warm") -> tuple[int, str, str]:
    """Run a script on several ranks until it ends; return exit code, output and errors.

    Args:
        launcher: torchrun, accelerate, or warm: forked processes that start without importing torch again, in the
            environment that torchrun sets; as with torchrun, the exit code is 1 if any of them fails.
    """
    if launcher == "warm":
        return _launch_warm(script, ranks, argv)
    process = start(script, ranks, argv, launcher)
    try:
        output, errors = communicate(process)
    finally:
        process.kill()
    return process.returncode, output, errors


def _launch_warm(script: str, ranks: int, argv: Sequence[str]) -> tuple[int, str, str]:
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    common |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    processes = [warm.Python([script, *argv], env=os.environ | common | number) for number in numbers]

    def codes() -> list[int | None]:
        return [process.poll() for process in processes]

    def printed() -> list[str]:
        return ["".join(texts) for texts in zip(*(process.output() for process in processes), strict=True)]

    try:
        wait_for(
            lambda: any(codes()) or None not in codes(), "the end of all ranks, or a failure of one", printed
        )
        if None in codes():
            for process in processes:
                process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                for process in processes:
                    process.wait(GRACE_SECONDS)
    finally:
        for process in processes:
            process.kill()
    output, errors = printed()
    return int(any(code != 0 for code in codes())), output, errors


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def exit_code(main: Callable[[], object], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run a script's main in this process with these arguments; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        run(main)
    assert isinstance(exit.value.code, int)
    return exit.value.code
