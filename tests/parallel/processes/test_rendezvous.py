"""Processes meet those that run, and not what others have left in the store."""

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
def kept() -> TCPStore:
    """What torchrun keeps, whoever starts again."""
    return TCPStore("localhost", 0, is_master=True)


class Life(threading.Thread):
    """A process of a rank, which waits for the others."""

    def __init__(self, kept: TCPStore, rank: int, size: int, patience: float = 30.0) -> None:
        super().__init__(daemon=True)
        self.store = TCPStore("localhost", kept.port, is_master=False, timeout=timedelta(seconds=30))
        self.rank, self.size, self.patience = rank, size, patience
        self.name, self.error = "", ""
        self.start()

    def run(self) -> None:
        try:
            self.name = agree_on_rendezvous(self.store, self.rank, self.size, self.patience)
        except LostRankError as error:
            self.error = str(error)


def met(lives: list[Life]) -> str:
    for life in lives:
        life.join(30)
    (name,) = {life.name for life in lives}
    assert name
    return name


def test_all_come_to_one_meeting_and_next_time_to_another(kept: TCPStore) -> None:
    first = met([Life(kept, rank, 3) for rank in range(3)])
    later = [Life(kept, rank, 3) for rank in (1, 2)]
    time.sleep(0.5)
    assert all(life.is_alive() for life in later)  # and not in the meeting of before
    assert met([*later, Life(kept, 0, 3)]) != first


@pytest.mark.parametrize("twice", [0, 1])
def test_one_that_started_twice_before_the_others_came(kept: TCPStore, twice: int) -> None:
    gone = Life(kept, twice, 3, patience=0.5)
    gone.join()
    early = Life(kept, 2, 3)
    time.sleep(0.3)
    met([early, Life(kept, twice, 3), Life(kept, 1 - twice, 3)])


def test_one_that_never_comes_is_named(kept: TCPStore) -> None:
    lives = [Life(kept, rank, 3, patience=1.0) for rank in (0, 2)]
    for life in lives:
        life.join()
    assert all(life.error.startswith("rank 1 did not join the rendezvous within 1 s") for life in lives)
    again = [Life(kept, rank, 3, patience=1.0) for rank in (0, 1)]
    for life in again:
        life.join()
    assert again[0].error.startswith("rank 2 did not join")  # it was there, and has ended


def test_the_process_group_is_made_so(kept: TCPStore) -> None:
    """The second rank is killed while it waits, and starts again."""
    own = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(kept.port),
    }
    own |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}

    def start(rank: int, restarts: int) -> "subprocess.Popen[str]":
        number = {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(restarts)}
        command = [sys.executable, "-c", PROCESS]
        return subprocess.Popen(command, env=os.environ | own | number, stdout=subprocess.PIPE, text=True)

    lost = start(1, 0)
    kept.wait(["stdit/present/1"], timedelta(seconds=120))
    lost.kill()
    processes = [start(0, 0), start(1, 1)]
    said, _ = [process.communicate(timeout=120)[0].strip() for process in processes]  # one speaks
    assert said == "met"
    assert [process.returncode for process in processes] == [0, 0]
    lost.wait()
