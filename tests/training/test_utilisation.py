from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stdit.models.config import STDiTConfig
from stdit.models.stdit import STDiT
from stdit.training.utilisation import Utilisation
from tests.training.tiny import tiny_batch

SIZES: dict[str, Any] = dict(
    depth=3,
    hidden_size=32,
    num_heads=2,
    in_channels=3,
    caption_channels=16,
    model_max_length=8,
    pooled_text=True,
)


@pytest.mark.parametrize("frame_timesteps", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"cross_attention": "spatial", "frame_positions": True, "mlp_conv": True, "pred_sigma": False}],
)
def test_the_arithmetic_is_what_torch_counts_in_a_real_pass(
    options: dict[str, Any], frame_timesteps: bool
) -> None:
    batch = tiny_batch(0, frames=3)
    sizes = SIZES | options
    model = STDiT(**sizes)
    with FlopCounterMode(display=False) as counter:
        model(
            hidden_states=batch.latents,
            timestep=torch.full((4, 3 if frame_timesteps else 1), 500.0),
            encoder_hidden_states=batch.text_states,
            encoder_attention_mask=batch.text_mask,
            fps=batch.fps,
            height=batch.height,
            width=batch.width,
            drop_caption=torch.tensor([True, False, False, True]),
        ).sample.sum().backward()
    utilisation = Utilisation(STDiTConfig(**sizes), frame_timesteps, processes=2)
    assert utilisation.flops(batch) == counter.get_total_flops() > 0
    expected = counter.get_total_flops() / (0.5 * 2 * 1e9)
    assert utilisation.mfu(batch, seconds=0.5, rate=1e9) == pytest.approx(expected)


def test_the_arithmetic_is_counted_once_per_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    monkeypatch.setattr(
        "stdit.training.utilisation.training_flops", lambda *case: counted.append(case) or 100 * case[3]
    )
    utilisation = Utilisation(STDiTConfig(**SIZES), False, processes=1)
    assert [utilisation.flops(tiny_batch(step)) for step in range(3)] == [500, 500, 500]
    assert len(counted) == 2
    utilisation.flops(tiny_batch(0, frames=1))
    assert len(counted) == 4
