"""The objective against its definitions."""

import json

import pytest
import torch
from torch import Tensor

from stdit.diffusion.config import FlowConfig, flow_config, flow_settings
from stdit.diffusion.flow import FlowObjective, frame_weights, shift_t
from stdit.errors import UserError

VARIANCE = torch.tensor([4.0, 1.0, 0.01])


def make(prediction: str, **settings) -> FlowObjective:
    return FlowObjective(FlowConfig(prediction=prediction, **settings), VARIANCE)


def sample(frames: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, frames, 2, 2) * VARIANCE.sqrt()[:, None, None, None]
    return x, torch.randn_like(x), torch.rand(2, frames) * 0.8 + 0.1


def perfect_output(prediction: str, x: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """What a model that knows the data would give."""
    level, spread = t[:, None, :, None, None], VARIANCE[None, :, None, None, None]
    total = (1 - level) ** 2 * spread + level**2
    return {
        "velocity": x - noise,
        "sample": x,
        "residual": (x - noise - ((1 - level) * spread - level) / total * x_t) / (spread / total).sqrt(),
    }[prediction]


@pytest.mark.parametrize("prediction", ["velocity", "sample", "residual"])
def test_perfect_output_has_no_loss(prediction: str) -> None:
    flow, (x, noise, t) = make(prediction), sample()
    x_t = flow.add_noise(x, noise, t)
    torch.testing.assert_close(x_t, (1 - t[:, None, :, None, None]) * x + t[:, None, :, None, None] * noise)
    output = perfect_output(prediction, x, noise, x_t, t)
    weight = frame_weights(torch.zeros(2, 4, dtype=torch.bool))
    assert flow.loss(output, x - noise, x_t, t, weight).max() < 1e-9
    assert flow.loss(output + 0.1, x - noise, x_t, t, weight).min() > 1e-4


@pytest.mark.parametrize("prediction", ["velocity", "sample", "residual"])
def test_euler_steps_with_the_true_velocity_reach_the_data(prediction: str) -> None:
    flow, (x, noise, _) = make(prediction), sample()
    x_t = noise.clone()
    sigmas = shift_t(torch.linspace(1, 0, 6), 3.0)
    for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        t = now.expand(2, 1)
        velocity = flow.velocity(perfect_output(prediction, x, noise, x_t, t), x_t, t)
        x_t = x_t + (now - after) * velocity
    torch.testing.assert_close(x_t, x, atol=1e-5, rtol=1e-5)


def test_conditioning_frames_have_no_loss() -> None:
    flow, (x, noise, t) = make("velocity"), sample()
    condition_mask = torch.tensor([[True, False, False, False], [False, False, True, True]])
    x_t = flow.add_noise(x, noise, t * ~condition_mask)
    torch.testing.assert_close(x_t[0, :, 0], x[0, :, 0])
    output = x - noise
    expected = flow.loss(output, x - noise, x_t, t, frame_weights(condition_mask))
    output[0, :, 0] += 100
    output[1, :, 2:] += 100
    torch.testing.assert_close(flow.loss(output, x - noise, x_t, t, frame_weights(condition_mask)), expected)


def test_residual_is_the_best_linear_estimate() -> None:
    """With a zero output the error is that of least squares on many samples."""
    flow = make("residual")
    torch.manual_seed(0)
    x = torch.randn(1, 3, 1, 200, 200) * VARIANCE.sqrt()[:, None, None, None]
    noise, t = torch.randn_like(x), torch.tensor([[0.4]])
    x_t = flow.add_noise(x, noise, t)
    estimate = flow.velocity(torch.zeros_like(x), x_t, t)
    best = ((x - noise) * x_t).sum((0, 2, 3, 4)) / x_t.square().sum((0, 2, 3, 4))
    torch.testing.assert_close((estimate / x_t).mean((0, 2, 3, 4)), best, atol=0.03, rtol=0.03)
    assert (flow.scale_model_input(x_t, t).std((0, 2, 3, 4)) - 1).abs().max() < 0.02


def test_shift() -> None:
    flow = make("velocity", shift_by_size=True)
    assert flow.size_shift(15, 512, 512) == pytest.approx(15**0.5)
    assert flow.size_shift(1, 256, 256) == pytest.approx(0.5)
    assert make("velocity", shift=3.0).size_shift(15, 512, 512) == 3


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_distribution_of_levels(sampling: str) -> None:
    flow = make("velocity", timestep_sampling=sampling, logit_mean=1.3, logit_std=0.5)
    generator = torch.Generator().manual_seed(0)
    levels = torch.stack([flow.sample_t(generator, 1, 32, 32) for _ in range(4000)])
    assert 0 < levels.min() and levels.max() < 1
    expected = 0.5 if sampling == "uniform" else torch.sigmoid(torch.tensor(1.3))
    assert abs(levels.median() - expected) < 0.03


def test_settings_give_the_same_config_again() -> None:
    flow = make("residual", shift=2.0, conditioning={"first": 0.25})
    assert flow_config(json.loads(json.dumps(flow_settings(flow.config)))) == flow.config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": 0.0}, "shift"),
        ({"logit_std": -1.0}, "logit_std"),
        ({"caption_dropout": 1.5}, "caption_dropout = 1.5"),
        ({"conditioning": {"frist": 0.1}}, "frist: must be one of.*did you mean first"),
        ({"conditioning": {"first": 0.7, "last": 0.7}}, "adds up"),
        ({"conditioning": {"first": -0.1}}, "negative"),
    ],
)
def test_impossible_settings(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FlowConfig(**settings)


def test_residual_needs_variances() -> None:
    with pytest.raises(UserError, match="pca"):
        FlowObjective(FlowConfig(prediction="residual"))
