"""The validation loss on one process; test_trainer_on_ranks.py compares it across splits."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from stdit.data.batch import EncodedBatch
from stdit.diffusion.config import FlowConfig
from stdit.diffusion.flow import FlowObjective
from stdit.parallel.processes.mesh import Mesh
from stdit.training.config import OptimizerConfig
from stdit.training.trainer import Trainer
from stdit.training.validation_loss import (
    ValidationRow,
    fixed_draws,
    level_quantiles,
    losses_by_level,
    validation_rows,
)
from tests.training.tiny import ALONE, tiny_batch, tiny_model, tiny_trainer

LEVELS = 3


def batches(mesh: Mesh = ALONE, size: int = 4) -> list[tuple[tuple[ValidationRow, ...], EncodedBatch]]:
    """Return the validation loss of three clips."""
    clips = tiny_batch(0, 3)
    found = []
    for rows in validation_rows(3, LEVELS, size):
        mine = [rows[row].clip for row in mesh.sample_range(size)]
        found.append((rows, replace(clips.rows(mine), batch_size=size)))
    return found


def measured(one: Trainer, size: int = 4) -> list[float]:
    with one.ema.applied(one.model):
        return losses_by_level(one, batches(one.mesh, size), LEVELS)


def trainer(mesh: Mesh = ALONE, sharded: bool = False, **settings: Any) -> Trainer:
    return tiny_trainer(tiny_model(in_channels=3), OptimizerConfig(lr=1e-2), mesh, sharded, **settings)


def test_every_clip_has_every_level_once() -> None:
    rows = [row for batch in validation_rows(3, 4, 5) for row in batch]
    assert len(rows) == 15 and {len(batch) for batch in validation_rows(3, 4, 5)} == {5}
    counted = [(row.clip, row.level) for row in rows if row.weight]
    assert sorted(counted) == [(clip, level) for clip in range(3) for level in range(4)]


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_levels_are_quantiles_of_those_that_are_trained(sampling: Any) -> None:
    flow = FlowObjective(FlowConfig(timestep_sampling=sampling, logit_mean=0.7, shift=2.0))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([flow.sample_t(generator, 4, 8, 8) for _ in range(20000)])
    for quantile in level_quantiles(4):
        assert float((drawn < flow.t_at_quantile(quantile, 4, 8, 8)).float().mean()) == pytest.approx(
            quantile, abs=0.01
        )


def test_noise_depends_on_the_clip_alone() -> None:
    flow = FlowObjective(FlowConfig())
    rows = [ValidationRow(0, 0), ValidationRow(0, 2), ValidationRow(1, 2)]
    draws = fixed_draws(flow, 5, rows, LEVELS, (2, 3, 4, 4), 8, 8)
    again = fixed_draws(flow, 5, rows[1:2], LEVELS, (2, 3, 4, 4), 8, 8)
    assert torch.equal(draws.noise[0], draws.noise[1]) and not torch.equal(draws.noise[1], draws.noise[2])
    assert torch.equal(draws.noise[1:2], again.noise) and draws.t[0] < draws.t[1] == draws.t[2]
    assert not draws.condition_mask.any() and not draws.drop_caption.any()


def test_it_uses_averaged_weights_and_changes_no_state() -> None:
    one, other = trainer(), trainer()
    for step in range(2):
        one.step(tiny_batch(step))
        other.step(tiny_batch(step))
    first = measured(one)
    assert first == measured(one), "fixed"
    assert measured(one, 2) == pytest.approx(first, rel=1e-5), "whatever the batches"
    averaged = trainer()
    averaged.model.load_state_dict(one.ema.average)
    averaged.ema.average = {name: tensor.clone() for name, tensor in one.ema.average.items()}
    assert losses_by_level(averaged, batches(), LEVELS) == first
    assert losses_by_level(one, batches(), LEVELS) != first
    assert one.step(tiny_batch(2)) == other.step(tiny_batch(2))
    assert all(torch.equal(one.ema.average[name], tensor) for name, tensor in other.ema.average.items())
