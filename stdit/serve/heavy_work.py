"""Threads of their own for what decodes or computes for seconds, so that other requests are always answered."""

from collections.abc import Callable
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

T = TypeVar("T")


class HeavyWork:
    """A few threads for heavy work; further work waits without a thread."""

    def __init__(self, threads: int = 2) -> None:
        self._limiter = CapacityLimiter(threads)

    async def run(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns."""
        return await to_thread.run_sync(work, limiter=self._limiter)
