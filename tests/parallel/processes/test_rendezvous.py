"""Rendezvous of processes that run now, not of those that left tokens in the store."""

import os
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from stdit.errors import LostRankError
from stdit.parallel.processes.rendezvous import agree_on_rendezvous

PROCESS = """
from stdit.training.system import prepare_process
from stdit.training.config import TrainerConfig
import torch.distributed as dist
prepare_process(TrainerConfig(device="cpu"), 60)
dist.barrier()
print("met")
"""


@pytest.fixture
def store() -> TCPStore:
    """The store of torchrun, which survives restarts of processes."""
    return TCPStore("localhost", 0, is_master=True)


class Process(threading.Thread):
    """One process of a rank that joins the rendezvous, as a thread."""

    def __init__(self, store: TCPStore, rank: int, size: int, timeout: float = 30.0) -> None:
        super().__init__(daemon=True)
        self.store = TCPStore("localhost", store.port, is_master=False, timeout=timedelta(seconds=30))
        self.rank, self.size, self.timeout = rank, size, timeout
        self.name, self.error = "", ""
        self.start()

    def run(self) -> None:
        try:
            self.name = agree_on_rendezvous(self.store, self.rank, self.size, self.timeout)
        except LostRankError as error:
            self.error = str(error)


def joined(processes: list[Process]) -> str:
    for process in processes:
        process.join(30)
    (name,) = {process.name for process in processes}
    assert name
    return name


def test_all_join_one_rendezvous_and_later_another(store: TCPStore) -> None:
    first = joined([Process(store, rank, 3) for rank in range(3)])
    later = [Process(store, rank, 3) for rank in (1, 2)]
    time.sleep(0.5)
    assert all(process.is_alive() for process in later)  # not in the earlier rendezvous
    assert joined([*later, Process(store, 0, 3)]) != first


@pytest.mark.parametrize("twice", [0, 1])
def test_a_rank_that_restarts_before_the_others_start(store: TCPStore, twice: int) -> None:
    gone = Process(store, twice, 3, timeout=0.5)
    gone.join()
    early = Process(store, 2, 3)
    time.sleep(0.3)
    joined([early, Process(store, twice, 3), Process(store, 1 - twice, 3)])


def test_a_missing_rank_is_named(store: TCPStore) -> None:
    processes = [Process(store, rank, 3, timeout=1.0) for rank in (0, 2)]
    for process in processes:
        process.join()
    assert all(
        process.error.startswith("rank 1 did not join the rendezvous within 1 s") for process in processes
    )
    again = [Process(store, rank, 3, timeout=1.0) for rank in (0, 1)]
    for process in again:
        process.join()
    assert again[0].error.startswith("rank 2 did not join")  # it was there, and has ended


def test_a_process_group_forms_after_a_restart(store: TCPStore) -> None:
    """Rank 1 is killed while it waits, and is started again."""
    own = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
    }
    own |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}

    def start(rank: int, restarts: int) -> "subprocess.Popen[str]":
        number = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(restarts)}
        command = [sys.executable, "-c", PROCESS]
        return subprocess.Popen(command, env=os.environ | own | number, stdout=subprocess.PIPE, text=True)

    lost = start(1, 0)
    store.wait(["stdit/present/1"], timedelta(seconds=120))
    lost.kill()
    processes = [start(0, 0), start(1, 1)]
    said, _ = [process.communicate(timeout=120)[0].strip() for process in processes]  # only rank 0 prints
    assert said == "met"
    assert [process.returncode for process in processes] == [0, 0]
    lost.wait()
