"""RectifiedFlow, and the schedulers of diffusers that can take its place."""

import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from stdit.diffusion.flow import shift_t
from stdit.diffusion.scheduler import RectifiedFlow, check_flow_scheduler, set_flow_timesteps
from stdit.errors import UserError

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SOLVERS: dict[str, dict[str, Any]] = {
    "RectifiedFlow": {},
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
    "UniPCMultistepScheduler": FLOW,
    "DPMSolverMultistepScheduler": FLOW,
}


def solver(name: str, from_ours: bool = True) -> Any:
    """A scheduler, made from the config of ours or with its own defaults."""
    kind = RectifiedFlow if name == "RectifiedFlow" else getattr(diffusers, name)
    return kind.from_config(RectifiedFlow().config, **SOLVERS[name]) if from_ours else kind(**SOLVERS[name])


def test_steps_are_equal_in_noise_level_and_shifted() -> None:
    scheduler = RectifiedFlow()
    set_flow_timesteps(scheduler, 4, 3.0)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000.0, 900, 750, 500]))
    for r in range(1, 500):
        set_flow_timesteps(scheduler, 1, r / 97)
        assert scheduler.sigmas.tolist() == [1, 0]
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    assert scheduler.sigmas.tolist() == [1, 0.5, 0]
    scheduler.set_timesteps(5)
    assert scheduler.sigmas.tolist() == torch.linspace(1, 0, 6).tolist()


def test_a_step_begins_where_it_is_told() -> None:
    scheduler, sample = RectifiedFlow(), torch.ones(2, 3)
    scheduler.set_timesteps(4)
    assert scheduler.step(sample, scheduler.timesteps[2], sample).prev_sample.tolist() == [[0.75] * 3] * 2
    assert scheduler.step_index == 3
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(1)
    scheduler.step(sample, scheduler.timesteps[1], sample)
    assert scheduler.step_index == 2


def test_noise_is_added_along_the_straight_path() -> None:
    data, noise = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    noisy = RectifiedFlow().scale_noise(data, torch.tensor([250.0, 1000.0]), noise)
    assert torch.equal(noisy[0], 0.25 * noise[0]) and torch.equal(noisy[1], noise[1])
    assert torch.equal(RectifiedFlow().scale_noise(data, torch.tensor(500.0), noise), 0.5 * noise)


def test_save_and_load(tmp_path: Path) -> None:
    RectifiedFlow(num_train_timesteps=500).save_pretrained(tmp_path)
    assert RectifiedFlow.from_pretrained(tmp_path).config.num_train_timesteps == 500
    file = tmp_path / "scheduler_config.json"
    file.write_text(file.read_text().replace("500", "400"))
    with pytest.raises(UserError, match="has changed since it was written"):
        RectifiedFlow.from_pretrained(tmp_path)


@pytest.mark.parametrize("from_ours", [True, False])
@pytest.mark.parametrize("name", SOLVERS)
def test_flow_schedulers_are_accepted(name: str, from_ours: bool) -> None:
    check_flow_scheduler(solver(name, from_ours))


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "FlowMatchHeunDiscreteScheduler"])
def test_their_noise_levels_are_shifted_as_ours(name: str) -> None:
    scheduler = solver(name)
    set_flow_timesteps(scheduler, 8, 2.5)
    expected = shift_t(torch.linspace(1, 0, 9), 2.5)
    tolerance = 0.003 if name.startswith("DPM") else 1e-5  # that ends at 1/1000 before the shift
    torch.testing.assert_close(scheduler.sigmas, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_scheduler_with_its_own_defaults_gets_the_shift_too(name: str) -> None:
    scheduler = solver(name, from_ours=False)
    set_flow_timesteps(scheduler, 8, 2.5)
    torch.testing.assert_close(scheduler.sigmas, shift_t(torch.linspace(1, 0, 9), 2.5), atol=1e-5, rtol=0)


def test_a_shift_that_a_scheduler_cannot_take_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        set_flow_timesteps(diffusers.FlowMatchHeunDiscreteScheduler(), 8, 1.0)
        assert not caplog.records
        set_flow_timesteps(diffusers.FlowMatchHeunDiscreteScheduler(), 8, 2.5)
    assert "FlowMatchHeunDiscreteScheduler takes no shift" in caplog.text and "2.5" in caplog.text


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(),
        diffusers.EulerDiscreteScheduler(),
        diffusers.UniPCMultistepScheduler(),
        diffusers.UniPCMultistepScheduler(use_flow_sigmas=True),
        diffusers.DPMSolverMultistepScheduler(),
        diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True),
        diffusers.DDPMScheduler(),
        "euler",
        None,
    ],
    ids=lambda one: type(one).__name__,
)
def test_schedulers_that_cannot_do_flow_matching_are_refused(scheduler: Any) -> None:
    with pytest.raises(UserError, match=f"scheduler {type(scheduler).__name__}: .*cannot do flow matching"):
        set_flow_timesteps(scheduler, 4, 1.0)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        diffusers.FlowMatchLCMScheduler(),
        diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", algorithm_type="sde-dpmsolver++"
        ),
    ],
    ids=lambda one: type(one).__name__,
)
def test_schedulers_that_draw_noise_are_refused_for_that(scheduler: Any) -> None:
    state = torch.get_rng_state()
    with pytest.raises(
        UserError, match=f"scheduler {type(scheduler).__name__}: .*draws new noise in each step"
    ):
        set_flow_timesteps(scheduler, 4, 1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_call_lacks_is_said() -> None:
    with pytest.raises(ValueError, match="set_timesteps needs num_inference_steps or sigmas"):
        RectifiedFlow().set_timesteps()
    with pytest.raises(ValueError, match="scale_noise needs noise"):
        RectifiedFlow().scale_noise(torch.zeros(1), torch.zeros(1))


def test_what_a_scheduler_finds_wrong_is_in_the_message() -> None:
    scheduler = diffusers.EulerDiscreteScheduler.from_config(
        RectifiedFlow().config, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    with pytest.raises(
        UserError, match=r"EulerDiscreteScheduler: .*cannot do flow matching \(.*\): use RectifiedFlow"
    ):
        set_flow_timesteps(scheduler, 4, 1.0)
