"""How the processes of a run find each other, however often each of them was started.

torchrun keeps its store when it starts processes anew, and each machine does so by itself. With "env://" a process
that comes back would find the addresses of others that are about to end, join them, and be lost with them. Counting
the restarts does not help: every machine has a count of its own. So the first rank calls those that it finds, and the
meeting begins once all of them have answered.
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

PAUSE = 0.1
"""Seconds between two looks at the store."""


@cache
def init_method() -> str:
    """What `torch.distributed.init_process_group` takes as `init_method` to meet in this way."""
    register_rendezvous_handler("stdit", rendezvous_handler)
    return "stdit://"


def rendezvous_handler(url: str, timeout: timedelta, **options: Any) -> Iterator[tuple[Store, int, int]]:
    """As "env://", by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of the environment, in a store that is this
    meeting's alone."""
    for store, rank, size in rendezvous("env://", timeout=timeout, **options):
        name = agree_on_rendezvous(store, rank, size, timeout.total_seconds())
        yield PrefixStore(f"stdit/meeting/{name}", store), rank, size


def agree_on_rendezvous(store: Store, rank: int, size: int, patience: float) -> str:
    """The name of a meeting to which all ranks have come, none of which has ended before.

    Each lays down a token. The first rank calls a meeting of the tokens that it finds, and another whenever one has
    changed; a process comes to a meeting that has its own token.

    Args:
        patience: seconds to wait for the others.

    Raises:
        LostRankError: if not all have come by then.
    """
    token, deadline = secrets.token_hex(8), time.monotonic() + patience
    ranks, name, called = range(size), "", list[str]()
    here = [f"stdit/here/{other}" for other in ranks]
    store.set(here[rank], token)
    while time.monotonic() < deadline:
        if rank == 0 and store.check(here):
            found = [value.decode() for value in store.multi_get(here)]
            if found != called:
                store.set("stdit/call", json.dumps([secrets.token_hex(8), found]))
        if store.check(["stdit/call"]):
            name, called = json.loads(store.get("stdit/call"))
        if called[rank : rank + 1] == [token]:
            store.set(f"stdit/came/{name}/{rank}", "")
            if rank == 0 and store.check([f"stdit/came/{name}/{other}" for other in ranks]):
                store.set(f"stdit/begun/{name}", "")
            if store.check([f"stdit/begun/{name}"]):
                return name
        time.sleep(PAUSE)

    def absent(keys: list[str]) -> list[int]:
        return [other for other in ranks if other != rank and not store.check([keys[other]])]

    missing = absent(here) or absent([f"stdit/came/{name}/{other}" for other in ranks]) or [0]
    raise LostRankError(
        f"rank {', '.join(map(str, missing))} did not come to the start of the run within {patience:.0f} s: it was "
        "not started, has failed, or does not reach the first machine; the same command tries again"
    )
