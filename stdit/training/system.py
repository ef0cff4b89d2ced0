"""What a run asks of the process that it lives in: signals, memory, devices."""

import ctypes
import logging
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from stdit.parallel.processes.mesh import Mesh, runs_on_cpu
from stdit.parallel.processes.rendezvous import init_method
from stdit.parallel.processes.watchdog import end_process
from stdit.training.config import TrainerConfig

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
            InitProcessGroupKwargs(
                init_method=init_method(),
                timeout=timedelta(seconds=1.2 * timeout + 30),  # the watch speaks before
            ),
            AutocastKwargs(cache_enabled=False),  # which would keep all rounded weights until the pass ends
        ],
    )
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w")  # one process speaks
        logging.getLogger("stdit").setLevel(logging.ERROR)
    if accelerator.device.type == "cpu" and config.keep_freed_memory:
        keep_freed_memory()
    return accelerator


class Stop(KeyboardInterrupt):
    """A signal ends the process where it is, with a code."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
"""Signals that ask a run to stop: those of schedulers, launchers and keyboards."""
APART = 1.0
"""Seconds between two signals that are two requests: launchers pass on what their processes have got already."""
PATIENCE = 3.0
"""Seconds after the second one in which the process is to end by itself."""


def exit_code(number: int | None) -> int:
    """130 after Ctrl-C, as shells expect; else 0: the run was preempted and can go on."""
    return 130 if number == signal.SIGINT else 0


class Interrupts:
    """Which signal asked the run to stop, if any."""

    caught: signal.Signals | None = None
    agreed: signal.Signals | None = None
    """The signal that any rank caught: all stop after the same step."""
    patient = False
    """Whether the run finishes its step first; otherwise a signal ends it where it is."""

    def __init__(self) -> None:
        self._since = 0.0

    def agree(self, mesh: Mesh, stop: bool = False, others: Sequence[int] = ()) -> list[int]:
        """Tell the other ranks, and hear from them.

        Args:
            stop: the run is asked to stop by other means than a signal; it counts as SIGTERM.
            others: numbers to agree on with the same message.

        Returns:
            The largest of each of ``others``, over all ranks.
        """
        caught = signal.SIGTERM if stop else self.caught
        number, *agreed = mesh.all_reduce_max([0 if caught is None else caught.value, *others])
        self.agreed = signal.Signals(number) if number else None
        return agreed

    @property
    def exit_code(self) -> int:
        """With which the process ends."""
        return exit_code(self.agreed or self.caught)

    def __str__(self) -> str:
        return "interrupted" if self.exit_code else "preempted"

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Note a signal; raises Stop where it ends the run."""
        first, now = self.caught is None, time.monotonic()
        if first or now - self._since > APART:
            self.caught, self._since = signal.Signals(number), now
            if not (first and self.patient):
                raise Stop(self.exit_code)


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """While it lasts, SIGTERM, SIGUSR1 and Ctrl-C end the block, as if it were done.

    Once the run is patient they are noted instead, and a second one ends the block: if need be the process with it,
    when the main thread is busy outside Python, where it hears of no signal.
    """
    state = Interrupts()
    before = {number: signal.signal(number, state.handle) for number in STOPPING}
    try:
        with _insisting():
            yield state
    except Stop:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _insisting() -> Iterator[None]:
    """End the process some seconds after a second signal, if it has not ended by then."""
    told, tell = socket.socketpair()
    tell.setblocking(False)
    done = threading.Event()

    def listen() -> None:
        since: float | None = None
        while number := told.recv(1):  # a byte for each signal, written by Python as soon as it comes
            if number[0] not in STOPPING:
                continue
            now = time.monotonic()
            if since is not None and now - since > APART and not done.wait(PATIENCE):
                end_process(exit_code(number[0]))
            since = since or now

    before = signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(before)
        tell.close()
        thread.join()
        told.close()


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
