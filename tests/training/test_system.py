import pytest
import torch
from accelerate.state import AcceleratorState
from torch.distributed import Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from stdit.training.system import prepare_process
from stdit.training.trainer import TrainerConfig


def test_rounded_weights_are_not_kept_until_a_pass_ends() -> None:
    AcceleratorState._reset_state(True)
    config = TrainerConfig(precision="bf16", device="cpu", keep_freed_memory=False)
    with prepare_process(config, timeout=60.0).autocast():
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()


def test_processes_that_start_again_find_nothing_of_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts them keeps the store, as torchrun does."""
    kept = TCPStore("localhost", 0, is_master=True)
    own = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": kept.port}
    for name, value in own.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    def store(attempt: int) -> Store:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        found, rank, size = next(rendezvous("stdit://"))
        assert (rank, size) == (0, 1)
        return found

    store(0).set("address", "of the first")
    assert store(0).check(["address"]) and not store(1).check(["address"])
