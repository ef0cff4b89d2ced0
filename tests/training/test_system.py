import torch
from accelerate.state import AcceleratorState

from stdit.training.config import TrainerConfig
from stdit.training.system import prepare_process


def test_autocast_does_not_cache_weights() -> None:
    AcceleratorState._reset_state(True)
    config = TrainerConfig(precision="bf16", device="cpu", keep_freed_memory=False)
    with prepare_process(config, timeout=60.0).autocast():
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()
