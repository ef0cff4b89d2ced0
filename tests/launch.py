"""Starts the entry scripts on several processes of this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def start(script: str, ranks: int, argv: list[str], launcher: str = "torchrun") -> subprocess.Popen[str]:
    """Start ``train.py`` or ``sample.py`` on so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
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
    )


def launch(script: str, ranks: int, argv: list[str], launcher: str = "torchrun") -> tuple[int, str, str]:
    """Run a script to its end -> (exit code, output, errors)."""
    process = start(script, ranks, argv, launcher)
    try:
        output, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, output, errors
