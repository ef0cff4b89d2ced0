"""Randomness is a function of (seed, step, index) alone."""

import torch

from stdit.diffusion.config import FlowConfig
from stdit.diffusion.draws import TrainingDraws, draw_batch
from stdit.diffusion.flow import FlowObjective

SHAPE = (2, 3, 4, 4)


def draw(indices, seed: int = 0, step: int = 5, **settings) -> TrainingDraws:
    flow = FlowObjective(FlowConfig(caption_dropout=0.5, **settings))
    return draw_batch(flow, seed, step, indices, SHAPE, 32, 32)


def test_any_split_of_the_batch_draws_the_same() -> None:
    whole = draw(range(6), conditioning={"first": 0.5, "random": 0.3})
    parts = [draw(indices, conditioning={"first": 0.5, "random": 0.3}) for indices in (range(4), range(4, 6))]
    for name in ("t", "noise", "condition_mask", "drop_caption"):
        assert getattr(whole, name).equal(torch.cat([getattr(part, name) for part in parts])), name


def test_seed_step_and_index_all_matter() -> None:
    noises = [draw([0]).noise, draw([1]).noise, draw([0], step=6).noise, draw([0], seed=1).noise]
    for i, a in enumerate(noises):
        assert all((a - b).abs().max() > 0.1 for b in noises[:i])


def test_conditioning_frames_have_noise_level_zero() -> None:
    draws = draw(range(40), conditioning={"first": 0.5})
    assert draws.t.shape == (40, 3)
    assert (draws.t[draws.condition_mask] == 0).all() and (draws.t[~draws.condition_mask] > 0).all()
    assert 5 < draws.condition_mask[:, 0].sum() < 35
    assert not draws.condition_mask[:, 1:].any()


def test_one_noise_level_for_all_frames_without_conditioning() -> None:
    draws = draw(range(40))
    assert draws.t.shape == (40, 1)
    assert 5 < draws.drop_caption.sum() < 35
