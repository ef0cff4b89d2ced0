"""What a run asks of the process that it lives in: signals, memory, devices."""

import ctypes
import logging
import os
import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from stdit.parallel.mesh import Mesh, runs_on_cpu
from stdit.training.trainer import TrainerConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # mallopt(3)


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next allocation instead of returning it to the kernel.

    A training step frees and allocates the same large blocks over and over; fresh pages cost a fault each,
    which was 19% of a step of a small model on a CPU. Returns whether this C library could be told so.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def started() -> tuple[int, int]:
    """Rank of this process, and number of those that torchrun or accelerate launch started."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def prepare_process(config: TrainerConfig, timeout: float) -> "Accelerator":
    """Set threads and memory, choose the device, and meet the other processes, if any were started.

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
            InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)),
            AutocastKwargs(cache_enabled=False),  # which would keep all rounded weights until the pass ends
        ],
    )
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w")  # one process speaks
        logging.getLogger("stdit").setLevel(logging.ERROR)
    if accelerator.device.type == "cpu" and config.keep_freed_memory:
        keep_freed_memory()
    return accelerator


class Interrupts:
    """Which signal asked the run to stop, if any."""

    caught: signal.Signals | None = None
    agreed: signal.Signals | None = None
    """The signal that any rank caught: all stop after the same step."""
    patient = False
    """Whether the run finishes its step first; otherwise a signal ends it where it is."""

    def agree(self, mesh: Mesh) -> None:
        """Tell the other ranks, and hear from them."""
        number = mesh.largest(0 if self.caught is None else self.caught.value)
        self.agreed = signal.Signals(number) if number else None

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as shells expect; 0 after SIGTERM: the run was preempted and can go on."""
        return 130 if (self.agreed or self.caught) == signal.SIGINT else 0

    def __str__(self) -> str:
        return "interrupted" if self.exit_code else "preempted"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        at_once = self.caught is None and not self.patient
        asked_twice = self.caught == signal.SIGINT == number
        self.caught = signal.Signals(number)
        if at_once or asked_twice:
            raise KeyboardInterrupt


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """While it lasts, SIGTERM and Ctrl-C end the block, as if it were done.

    Once the run is patient they are noted instead, and only a second Ctrl-C ends the block.
    """
    state = Interrupts()
    before = {number: signal.signal(number, state._handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield state
    except KeyboardInterrupt:
        if state.caught is None:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ProgressBar(tqdm):
    """Steps with the latest losses, clips a second, and the time that is left."""

    smooth_loss: float | None = None

    def show(self, line: dict[str, Any]) -> None:
        """Move on by the step that a line of ``metrics.jsonl`` describes."""
        if line["loss"] is None:
            self.write(f"step {line['step']}: loss or gradient not finite, step skipped")
        else:
            self.smooth_loss = (self.smooth_loss or line["loss"]) * 0.95 + 0.05 * line["loss"]
        loss = "none" if self.smooth_loss is None else f"{self.smooth_loss:.4f}"
        self.set_postfix_str(f"loss {loss}, {line['clips_per_second']:.1f} clips/s", refresh=False)
        self.update()


def progress_bar(start: int, steps: int, shown: bool) -> ProgressBar:
    """On a terminal it moves; in a log file it writes every half minute."""
    return ProgressBar(
        initial=start,
        total=steps,
        unit="step",
        dynamic_ncols=True,
        disable=not shown,
        mininterval=0.2 if sys.stderr.isatty() else 30,
    )
