"""Prepare the process that trains: process group, device, threads and memory; and its progress bar."""

import ctypes
import logging
import os
import platform
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from stdit.parallel.processes.mesh import runs_on_cpu
from stdit.parallel.processes.rendezvous import init_method
from stdit.training.config import TrainerConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # mallopt(3)


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next allocation instead of returning it to the kernel.

    A training step frees and allocates the same large blocks over and over; fresh pages cost a fault each,
    which was 19% of a step of a small model on a CPU. Return whether this C library supports it.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def launched_processes() -> tuple[int, int]:
    """Return the rank of this process, and how many torchrun or accelerate launch started."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def prepare_process(config: TrainerConfig, timeout: float) -> "Accelerator":
    """Set threads and memory, choose the device, and join the process group if several processes were started.

    Standard output of all processes but the main one is discarded.

    Args:
        timeout: seconds that a process waits for the others.
    """
    from accelerate import Accelerator, AutocastKwargs, InitProcessGroupKwargs

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    accelerator = Accelerator(
        mixed_precision={"fp32": "no", "bf16": "bf16"}[config.precision],
        cpu=runs_on_cpu(config.device),
        kwargs_handlers=[
            InitProcessGroupKwargs(
                init_method=init_method(),
                timeout=timedelta(
                    seconds=1.2 * timeout + 30
                ),  # later than the watchdog, whose message says more
            ),
            AutocastKwargs(cache_enabled=False),  # it would keep all rounded weights until the pass ends
        ],
    )
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w")
        logging.getLogger("stdit").setLevel(logging.ERROR)
    return accelerator


class ProgressBar(tqdm):
    """Steps with a running mean of the loss, clips per second, and the remaining time."""

    mean_loss: float | None = None

    def show(self, line: dict[str, Any]) -> None:
        """Advance by the step of a line of ``metrics.jsonl``."""
        if line["loss"] is None:
            self.write(f"step {line['step']}: loss or gradient not finite, step skipped")
        else:
            self.mean_loss = (self.mean_loss or line["loss"]) * 0.95 + 0.05 * line["loss"]
        loss = "none" if self.mean_loss is None else f"{self.mean_loss:.4f}"
        self.set_postfix_str(f"loss {loss}, {line['clips_per_second']:.1f} clips/s", refresh=False)
        self.update()


def progress_bar(start: int, steps: int, shown: bool) -> ProgressBar:
    """Return a progress bar that moves on a terminal, and writes a line every half minute to a log file."""
    return ProgressBar(
        initial=start,
        total=steps,
        unit="step",
        dynamic_ncols=True,
        disable=not shown,
        mininterval=0.2 if sys.stderr.isatty() else 30,
    )
