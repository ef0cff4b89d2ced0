"""Mask strategies at every length."""

import pytest
import torch

from stdit.diffusion.conditioning import MASK_STRATEGIES


def draw(name: str, frames: int, seed: int) -> torch.Tensor:
    return MASK_STRATEGIES.get(name)(frames, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MASK_STRATEGIES.names())
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 8, 17])
def test_one_frame_is_generated_and_draws_repeat(name: str, frames: int) -> None:
    for seed in range(20):
        condition_mask = draw(name, frames, seed)
        assert condition_mask.shape == (frames,) and condition_mask.dtype == torch.bool
        assert not condition_mask.all()
        assert condition_mask.equal(draw(name, frames, seed))


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("none", {""}),
        ("first", {"0"}),
        ("last", {"7"}),
        ("image", set("01234567")),
        ("first_last", {"07"}),
        ("head", {"0", "01"}),
        ("tail", {"7", "67"}),
        ("interpolate", {"0246", "1357"}),
        ("head_tail", {"07", "017", "067", "0167"}),
    ],
)
def test_which_frames_are_conditioning_frames(name: str, allowed: set[str]) -> None:
    found = {"".join(str(int(i)) for i in draw(name, 8, seed).nonzero()) for seed in range(60)}
    assert found == allowed


def test_random_and_quarter_vary() -> None:
    assert len({tuple(draw("random", 8, seed).tolist()) for seed in range(30)}) > 15
    runs = {tuple(draw("quarter", 8, seed).nonzero().flatten().tolist()) for seed in range(100)}
    assert (0,) in runs and (6, 7) in runs and all(len(run) <= 2 for run in runs)
