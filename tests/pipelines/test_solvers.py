"""Sampling with the schedulers of diffusers in place of ours, also with conditioning frames."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from stdit.diffusion.config import FlowConfig
from stdit.diffusion.scheduler import RectifiedFlow
from stdit.errors import UserError
from stdit.pipelines.conditions import FrameCondition
from stdit.pipelines.pipeline import STDiTPipeline
from tests.diffusion.test_scheduler import SOLVERS, solver
from tests.pipelines.test_pipeline import fitted_pca
from tests.pipelines.tiny import assert_same, tiny_pipeline

CLIP = torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(7)) * 2 - 1
CONDITIONS: dict[str, list[FrameCondition]] = {
    "none": [],
    "first": [FrameCondition(CLIP[:, :1], 0)],
    "one kept, one begun half way": [
        FrameCondition(CLIP[:, :1], 0),
        FrameCondition(CLIP[:, 3:], 3, strength=0.5),
    ],
}


@pytest.fixture(scope="module", params=["velocity", "residual"])
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> STDiTPipeline:
    codec = fitted_pca() if request.param == "residual" else None
    return tiny_pipeline(tmp_path_factory.mktemp("tiny"), codec, FlowConfig(prediction=request.param))


@pytest.fixture(scope="module", params=["none", "one kept, one begun half way"])
def exact(request: pytest.FixtureRequest, pipe: STDiTPipeline) -> tuple[str, Tensor]:
    """Conditions, and a video of so many Euler steps that they hardly err."""
    return request.param, latents(
        pipe, shift=1.0, num_inference_steps=300, conditions=CONDITIONS[request.param]
    )


def latents(pipe: STDiTPipeline, scheduler: Any = None, **settings: Any) -> Tensor:
    pipe.scheduler = scheduler or RectifiedFlow()
    frames = pipe(
        "a red circle", generator=torch.Generator().manual_seed(1), output_type="latent", **settings
    ).frames
    assert isinstance(frames, Tensor)
    return frames


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "name", [name for name in SOLVERS if "Euler" not in name and name != "RectifiedFlow"]
)
def test_all_solvers_approach_the_same_video(
    name: str, exact: tuple[str, Tensor], pipe: STDiTPipeline
) -> None:
    conditions, expected = exact
    settings = {"shift": 1.0, "conditions": CONDITIONS[conditions]}
    few, many = (
        distance(latents(pipe, solver(name), num_inference_steps=steps, **settings), expected)
        for steps in (10, 60)
    )
    assert few < 0.15 and many < min(0.03, 0.7 * few)


@pytest.mark.parametrize("name", SOLVERS)
def test_conditioning_frames_come_out_unchanged(name: str, pipe: STDiTPipeline) -> None:
    kept = pipe.codec.encode(CLIP[None, :, :1])
    found = latents(pipe, solver(name), conditions=CONDITIONS["first"], num_inference_steps=5)
    assert torch.equal(found[:, :, :1], kept)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_video_does_not_depend_on_its_batch(name: str, pipe: STDiTPipeline) -> None:
    pipe.scheduler = solver(name)

    def sample(prompts: list[str], seeds: list[int], conditions: Any) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        frames = pipe(prompts, generator=generators, conditions=conditions, output_type="latent").frames
        assert isinstance(frames, Tensor)
        return frames

    both = sample(["a red circle", "a blue square"], [1, 2], [CONDITIONS["first"], []])
    for index, (prompt, conditions) in enumerate(
        [("a red circle", [CONDITIONS["first"]]), ("a blue square", [[]])]
    ):
        alone = sample([prompt], [index + 1], conditions)
        torch.testing.assert_close(both[index], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_pipeline_is_saved_with_its_scheduler(name: str, pipe: STDiTPipeline, tmp_path: Path) -> None:
    found = latents(pipe, solver(name))
    pipe.save_pretrained(tmp_path / "saved")
    again = STDiTPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler).__name__ == name and again.flow.config == pipe.flow.config
    assert_same(latents(again, again.scheduler), found)
    file = tmp_path / "saved" / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text().replace("1000", "1001"))
    with pytest.raises(UserError, match="scheduler_config.json has changed since it was written"):
        STDiTPipeline.from_pretrained(tmp_path / "saved")


def test_a_scheduler_that_cannot_do_flow_matching_is_refused(pipe: STDiTPipeline) -> None:
    with pytest.raises(UserError, match="scheduler DDIMScheduler: .* use_flow_sigmas=True"):
        latents(pipe, diffusers.DDIMScheduler())


def test_a_callback_changes_the_video_but_no_conditioning_frame(pipe: STDiTPipeline) -> None:
    def erase(
        pipe: STDiTPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return {"latents": torch.zeros_like(tensors["latents"])}

    found = latents(
        pipe, solver("UniPCMultistepScheduler"), conditions=CONDITIONS["first"], callback_on_step_end=erase
    )
    assert torch.equal(found[:, :, :1], pipe.codec.encode(CLIP[None, :, :1]))
    assert (found[:, :, 1:] == 0).all()
