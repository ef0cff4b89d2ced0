import numpy as np
import pytest

from stdit.data.assignment import Assignment
from stdit.data.buckets import Bucket
from stdit.errors import UserError
from stdit.training.config import ValidationConfig
from stdit.training.validation import pipeline_settings_of


def test_default_sizes_are_those_of_the_bucket_with_the_most_clips() -> None:
    buckets = [Bucket(1, 64, 64, 8.0), Bucket(16, 32, 48, 8.0), Bucket(4, 8, 8, 8.0)]
    assignment = Assignment([], buckets, [np.arange(2), np.arange(5), np.arange(0)], [])
    config = ValidationConfig(num_inference_steps=7, guidance_scale=2.0, fps=4.0)
    assert pipeline_settings_of(config, assignment, "sks") == {
        "num_frames": 16, "height": 32, "width": 48, "fps": 4.0,
        "num_inference_steps": 7, "guidance_scale": 2.0,
        "trained_steps": None,
        "trigger": "sks",
        "trained_sizes": [
            {"num_frames": 1, "height": 64, "width": 64, "fps": 8.0, "clips": 2},
            {"num_frames": 16, "height": 32, "width": 48, "fps": 8.0, "clips": 5},
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "validation.every = 0"),
        ({"prompts": ["a", " "]}, "validation.prompts has an empty prompt"),
        ({"num_frames": 0}, "validation.num_frames = 0"),
        ({"height": 8}, "validation.width is missing"),
        ({"seed": -1}, "validation.seed = -1"),
    ],
)
def test_impossible_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ValidationConfig(**settings)  # type: ignore[arg-type]
