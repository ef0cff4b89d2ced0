"""Stop a run on a signal: after its step, or at once. Imports no torch, so that the first seconds count, too."""

import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from stdit.errors import interrupt_behind, raise_between_imports
from stdit.parallel.processes.exit import end_process

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
"""Signals that stop a run: those of schedulers, launchers and keyboards."""
REPEAT_SECONDS = 1.0
"""Signals within this time are one request: launchers forward what their processes have received already."""
EXIT_SECONDS = 3.0
"""Seconds after a second request in which the process must end by itself, before it is killed."""


class Stop(KeyboardInterrupt):
    """Raised by a signal that ends the process where it is.

    Args:
        code: exit code of the process.
    """

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


class StopSignals:
    """The signals that this process received, and the one that stops all ranks."""

    received: signal.Signals | None = None
    """The latest signal to this process."""
    stop_signal: signal.Signals | None = None
    """The signal that any rank received, the same on all ranks: they stop after the same step."""
    finish_step = False
    """Whether a first signal lets the run finish its step; otherwise it ends the process where it is."""

    def __init__(self) -> None:
        self._received_at = 0.0

    def flags(self, stop: bool = False) -> list[bool]:
        """Return for each of `STOP_SIGNALS` whether this process received it.

        Args:
            stop: the run is asked to stop by other means than a signal; counts as SIGTERM.
        """
        received = signal.SIGTERM if stop else self.received
        return [received == number for number in STOP_SIGNALS]

    def agree(self, counts: Sequence[int]) -> None:
        """Set `stop_signal`, given how many processes received each of `STOP_SIGNALS`."""
        received = [number for number, count in zip(STOP_SIGNALS, counts, strict=True) if count]
        self.stop_signal = max(received, default=None)

    @property
    def exit_code(self) -> int:
        """Exit code of the process: 130 after Ctrl-C, as shells expect; else 0, since the run can resume."""
        return _exit_code(self.stop_signal or self.received)

    def __str__(self) -> str:
        return "interrupted" if self.exit_code else "preempted"

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal. Raises Stop if it is a second one, or if there is no step to finish."""
        first, now = self.received is None, time.monotonic()
        if first or now - self._received_at > REPEAT_SECONDS:
            self.received, self._received_at = signal.Signals(number), now
            if not (first and self.finish_step):
                raise_between_imports(Stop(self.exit_code), frame)


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Handle SIGTERM, SIGUSR1 and Ctrl-C in a block: they leave it, and the code after it runs.

    With ``finish_step`` the first signal is recorded instead, and a second one leaves the block; if the main thread
    does not return to Python, where it could handle the signal, the process ends.
    """
    signals = StopSignals()
    before = {number: signal.signal(number, signals.handle) for number in STOP_SIGNALS}
    try:
        with _end_process_after_second_signal():
            yield signals
    except (Exception, Stop) as error:
        if not isinstance(interrupt_behind(error), Stop):
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(number: int | None) -> int:
    return 130 if number == signal.SIGINT else 0


@contextmanager
def _end_process_after_second_signal() -> Iterator[None]:
    """End the process `EXIT_SECONDS` after a second signal, if it has not ended by then."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    done = threading.Event()

    def listen() -> None:
        since: float | None = None
        while number := receiver.recv(1):  # Python writes a byte for each signal, as soon as it comes
            if number[0] not in STOP_SIGNALS:
                continue
            now = time.monotonic()
            if since is not None and now - since > REPEAT_SECONDS and not done.wait(EXIT_SECONDS):
                end_process(_exit_code(number[0]))
            since = since or now

    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(before)
        sender.close()
        thread.join()
        receiver.close()
