import torch
from accelerate.state import AcceleratorState

from stdit.training.system import prepare_process
from stdit.training.trainer import TrainerConfig


def test_rounded_weights_are_not_kept_until_a_pass_ends() -> None:
    AcceleratorState._reset_state(True)
    config = TrainerConfig(precision="bf16", device="cpu", keep_freed_memory=False)
    with prepare_process(config, timeout=60.0).autocast():
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()


def test_products_are_as_exact_as_the_settings_say() -> None:
    try:
        for precision in ("medium", "highest"):
            AcceleratorState._reset_state(True)
            settings = TrainerConfig(matmul_precision=precision, device="cpu", keep_freed_memory=False)  # type: ignore[arg-type]
            prepare_process(settings, timeout=60.0)
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
