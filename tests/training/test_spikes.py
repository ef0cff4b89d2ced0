import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from stdit.data.batch import EncodedBatch
from stdit.diffusion.config import FlowConfig
from stdit.diffusion.draws import draw_batch, sample_generator
from stdit.diffusion.flow import FlowObjective
from stdit.errors import UserError
from stdit.training.config import OptimizerConfig, SpikeConfig
from stdit.training.spikes import SpikeGuard, mean_level
from stdit.training.trainer import Trainer
from tests.training.tiny import tiny_batch, tiny_model, tiny_trainer


def guard(**settings: Any) -> SpikeGuard:
    return SpikeGuard(SpikeConfig(**{"factor": 2.0, "window": 8, **settings}))


def fill(one: SpikeGuard, losses: list[float]) -> None:
    """Losses at noise levels 0.1, 0.2, ..."""
    for place, loss in enumerate(losses):
        assert not one.is_spike(0.1 * (place + 1), loss)


def test_a_loss_is_compared_with_those_at_similar_levels() -> None:
    one = guard()
    fill(one, [1, 1, 1, 1, 5, 5, 5, 5])
    assert one.is_spike(0.1, 2.1) and not one.is_spike(0.8, 9.9)
    assert len(one.history) == 8, "a spike is not what later losses are compared with"
    assert not guard(factor=None).is_spike(0.5, 1e9)


def test_no_loss_is_a_spike_before_the_window_is_full() -> None:
    one = guard()
    fill(one, [1, 1, 1, 1, 1, 1, 1])
    assert not one.is_spike(0.5, 100.0)


def test_excluded_steps_are_remembered() -> None:
    one, other = guard(exclude_batches=3), guard(exclude_batches=3)
    fill(one, [1.0] * 8)
    one.exclude(20)
    one.exclude(1)
    other.excluded_steps = {40}
    other.load(one.state())
    assert (
        other.excluded_steps == {0, 1, 18, 19, 20, 40} and other.history == one.history and other.spikes == 2
    )


def test_too_many_spikes_stop_the_run() -> None:
    one = guard(max_spikes=2)
    one.exclude(5)
    with pytest.raises(
        UserError, match="trainer.spike.max_spikes = 2 losses were spikes, the last in step 9: lower"
    ):
        one.exclude(9)


def test_the_mean_level_is_that_of_the_draws() -> None:
    for config in (
        FlowConfig(),
        FlowConfig(timestep_sampling="uniform", shift=3.0, conditioning={"first": 0.5}),
    ):
        flow = FlowObjective(config)
        draws = draw_batch(flow, 3, 7, range(5), (2, 4, 2, 2), 8, 8)
        levels = draws.t.max(dim=1).values  # conditioning frames have level 0
        drawn = [float(flow.sample_t(sample_generator(3, 7, index), 4, 8, 8)) for index in range(5)]
        assert drawn == levels.tolist()
        assert mean_level(drawn) == pytest.approx(float(levels.mean()), rel=1e-6)


@pytest.mark.parametrize("factor", [None, 3.0])
def test_a_step_draws_each_sample_once(factor: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    one, seeds, original = trainer(spike=SpikeConfig(factor=factor, window=8)), [], np.random.SeedSequence
    monkeypatch.setattr(np.random, "SeedSequence", lambda seed: seeds.append(seed) or original(seed))
    one.step(tiny_batch(0))
    assert seeds == [[1, 0, index] for index in range(4)]
    assert len(one.spikes.history) == (factor is not None)


@pytest.mark.parametrize(
    "settings",
    [{"factor": 1.0}, {"factor": math.inf}, {"window": 7}, {"exclude_batches": 0}, {"max_spikes": 0}],
)
def test_impossible_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"trainer.spike.{next(iter(settings))} = "):
        SpikeConfig(**settings)


def trainer(**settings: Any) -> Trainer:
    return tiny_trainer(tiny_model(in_channels=3), OptimizerConfig(lr=1e-4), **settings)


def loud(step: int) -> EncodedBatch:
    batch = tiny_batch(step)
    return replace(batch, latents=100 * batch.latents)


def test_a_spike_is_not_applied_and_its_batch_is_never_trained_on() -> None:
    one, other = (trainer(spike=SpikeConfig(factor=3.0, window=8)) for _ in range(2))
    for step in range(8):
        one.step(tiny_batch(step))
        other.step(tiny_batch(step))
    values = one.step(loud(8))
    assert values["loss"] is None and values["skipped"] and values["excluded"] and values["spike"] > 1000
    other.spikes.excluded_steps.add(8)  # as a resumed run has it
    assert other.step(loud(8)) == {
        name: values[name] for name in ("loss", "lr", "grad_norm", "skipped", "excluded")
    }
    assert one.step(tiny_batch(9)) == other.step(tiny_batch(9))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, other.parameters, strict=True))
