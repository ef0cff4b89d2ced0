"""Settings that have no effect beside the others."""

from typing import Any

import pytest

from stdit.training.config import TrainConfig, TrainerConfig, ValidationConfig
from stdit.training.memory_config import MemoryConfig
from stdit.training.unused import unused_settings


@pytest.mark.parametrize(
    ("settings", "unused"),
    [
        (
            {"refine_level": 0.3},
            "validation.refine_level = 0.3 has no effect: it is for validation.refine_pairs",
        ),
        ({"refine_guidance_scale": 2.0, "refine_pairs": 0}, "validation.refine_guidance_scale = 2.0 has no"),
        ({"refine_pairs": 4, "refine_level": 0.3, "refine_guidance_scale": 2.0}, ""),
        ({"guidance_scale": 1.0, "guidance_rescale": 0.5, "refine_pairs": 4}, "validation.guidance_rescale"),
        (
            {
                "guidance_scale": 1.0,
                "guidance_rescale": 0.5,
                "refine_pairs": 4,
                "refine_guidance_scale": 2.0,
            },
            "",
        ),
    ],
)
def test_settings_of_the_refinement_need_pairs(settings: dict[str, Any], unused: str) -> None:
    lines = unused_settings(TrainConfig(validation=ValidationConfig(**settings)))
    assert len(lines) == bool(unused) and all(line.startswith(unused) for line in lines)


def test_nothing_is_offloaded_to_a_cpu_from_itself() -> None:
    memory = MemoryConfig(offload_optimizer=True, activations="recompute 0, offload 1")
    lines = unused_settings(TrainConfig(trainer=TrainerConfig(device="cpu"), memory=memory))
    assert [line.split(" = ")[0] for line in lines] == ["memory.offload_optimizer", "memory.activations"]
    assert not unused_settings(TrainConfig(memory=MemoryConfig(activations="recompute")))
