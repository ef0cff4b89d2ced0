"""Rendezvous of the processes of a run that works when each of them may have been restarted.

torchrun keeps its store when it restarts processes, and each machine restarts its own. With "env://" a restarted
process could find addresses of processes that are about to end, join them, and be lost with them. Counting restarts
does not help, since every machine has its own count. Here rank 0 announces the processes that it finds in the store,
and the rendezvous is complete when all of them have confirmed.
"""

import json
import secrets
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from typing import Any

from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from stdit.errors import LostRankError

_POLL_SECONDS = 0.1
"""Seconds between two reads of the store."""


@cache
def init_method() -> str:
    """Register this rendezvous, and return the ``init_method`` for `torch.distributed.init_process_group`."""
    register_rendezvous_handler("stdit", _rendezvous_handler)
    return "stdit://"


def _rendezvous_handler(url: str, timeout: timedelta, **options: Any) -> Iterator[tuple[Store, int, int]]:
    """Rendezvous as "env://" does, with the same environment variables, under a new prefix of the store each time."""
    for store, rank, size in rendezvous("env://", timeout=timeout, **options):
        name = agree_on_rendezvous(store, rank, size, timeout.total_seconds())
        yield PrefixStore(f"stdit/rendezvous/{name}", store), rank, size


def agree_on_rendezvous(store: Store, rank: int, size: int, timeout: float) -> str:
    """Wait until all ranks take part in one rendezvous, and return its name.

    Each process writes a token of its own. Rank 0 announces a rendezvous of the tokens that it finds, and a new one
    whenever a token has changed; a process joins a rendezvous that lists its own token.

    Args:
        timeout: seconds to wait for the other ranks.

    Raises:
        LostRankError: if a rank is missing at the end of that time.
    """
    token, deadline = secrets.token_hex(8), time.monotonic() + timeout
    ranks, name, announced = range(size), "", list[str]()
    present = [f"stdit/present/{other}" for other in ranks]
    store.set(present[rank], token)
    while time.monotonic() < deadline:
        if rank == 0 and store.check(present):
            found = [value.decode() for value in store.multi_get(present)]
            if found != announced:
                store.set("stdit/announced", json.dumps([secrets.token_hex(8), found]))
        if store.check(["stdit/announced"]):
            name, announced = json.loads(store.get("stdit/announced"))
        if announced[rank : rank + 1] == [token]:
            store.set(f"stdit/joined/{name}/{rank}", "")
            if rank == 0 and store.check([f"stdit/joined/{name}/{other}" for other in ranks]):
                store.set(f"stdit/complete/{name}", "")
            if store.check([f"stdit/complete/{name}"]):
                return name
        time.sleep(_POLL_SECONDS)

    def absent(keys: list[str]) -> list[int]:
        return [other for other in ranks if other != rank and not store.check([keys[other]])]

    missing = absent(present) or absent([f"stdit/joined/{name}/{other}" for other in ranks]) or [0]
    raise LostRankError(
        f"rank {', '.join(map(str, missing))} did not join the rendezvous within {timeout:.0f} s: it was not "
        "started, has failed, or does not reach the first machine; the same command tries again"
    )
