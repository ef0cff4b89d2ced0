"""Steps that a sampler skips, each video by itself, and the model calls that are counted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stdit.errors import UserError
from stdit.models.stdit import STDiT
from stdit.parallel.config import SamplingParallelConfig
from stdit.parallel.processes.mesh import Mesh, build_mesh
from stdit.parallel.sequence.group import Group
from stdit.pipelines.conditions import FrameCondition
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.output_cache import History
from stdit.pipelines.pipeline import STDiTPipeline, STDiTPipelineOutput
from stdit.pipelines.sampling import sample_to_files
from tests.parallel.ranks import run_on_ranks
from tests.pipelines.tiny import tiny_model, tiny_pipeline, write_run

CLIP = torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(7)) * 2 - 1
PROMPTS = ["a red circle", "a blue square", "a green cross"]
STEPS, THRESHOLD = 12, 0.2
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without guidance": {"guidance_scale": 1.0},
    "guided now and then": {"guidance_schedule": "oscillating", "guidance_scale": 3.0},
    "guided in the middle": {"guidance_schedule": "interval", "guidance_interval": (0.2, 0.8)},
    "heun": {"solver": "heun"},
    "unipc": {"solver": "unipc"},
    "dpm++": {"solver": "dpm++"},
    "conditioning frames": {
        "conditions": [
            [FrameCondition(CLIP[:, :1], 0)],
            [FrameCondition(CLIP[:, 3:], 3, strength=0.5)],
            [],
        ]
    },
    "refined": {"refine_pairs": 1},
}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> STDiTPipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("tiny"))


def sample(pipe: STDiTPipeline, videos: slice = slice(3), **settings: Any) -> STDiTPipelineOutput:
    """Some of three videos, with more differences in their speed than in their prompts."""
    settings = {"num_inference_steps": STEPS, "cache": THRESHOLD, "output_type": "latent", **settings}
    if "conditions" in settings:
        settings["conditions"] = settings["conditions"][videos]
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)[videos]]
    result = pipe(PROMPTS[videos], generator=generators, **settings)
    assert isinstance(result, STDiTPipelineOutput)
    return result


class Counted:
    """Count the rows that a model gets."""

    def __init__(self, pipe: STDiTPipeline) -> None:
        self.rows: list[int] = []
        self.hook = pipe.transformer.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, module: Any, args: Any, options: Any) -> None:
        self.rows.append(len(options["hidden_states"]))

    def __enter__(self) -> "Counted":
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("cache", ["off", THRESHOLD])
def test_calls_that_are_stated_are_those_that_ran(name: str, cache: Any, pipe: STDiTPipeline) -> None:
    with Counted(pipe) as counted:
        calls = sample(pipe, **CALLS[name], cache=cache).calls
    assert sum(counted.rows) == sum(one.run for one in calls)
    every = sample(pipe, **CALLS[name], cache="off").calls
    assert [one.run + one.skipped for one in calls] == [one.run for one in every]
    assert any(one.skipped_steps for one in calls) == (cache != "off")
    assert all(one.skipped <= 2 * one.skipped_steps for one in calls)


@pytest.mark.parametrize("name", CALLS)
def test_a_video_skips_the_same_steps_alone(name: str, pipe: STDiTPipeline) -> None:
    together = sample(pipe, **CALLS[name])
    for place in range(3):
        alone = sample(pipe, slice(place, place + 1), **CALLS[name])
        assert alone.calls == together.calls[place : place + 1]
        torch.testing.assert_close(alone.frames[0], together.frames[place], atol=1e-5, rtol=1e-5)


def test_videos_of_a_batch_skip_steps_of_their_own(pipe: STDiTPipeline) -> None:
    skipped = [one.skipped_steps for one in sample(pipe, cache=0.15, solver="heun").calls]
    assert len(set(skipped)) > 1


def test_larger_thresholds_skip_more_and_differ_more(pipe: STDiTPipeline) -> None:
    whole = sample(pipe, cache="off").frames
    results = [sample(pipe, cache=cache) for cache in (1e-9, 0.12, 0.3, 0.9)]
    skipped = [sum(one.skipped_steps for one in result.calls) for result in results]
    errors = [float((result.frames - whole).norm() / whole.norm()) for result in results]
    assert skipped == sorted(skipped) and skipped[0] == 0 < skipped[1] < skipped[-1]
    assert errors[0] == 0 < min(errors[1:]) and errors[1] < errors[-1] < 0.3
    fewer = sample(pipe, cache="off", num_inference_steps=STEPS - skipped[2] // 3).frames
    assert errors[2] < float((fewer - whole).norm() / whole.norm()), "no better than fewer steps"


def test_first_and_last_steps_are_computed(pipe: STDiTPipeline) -> None:
    ran: list[list[float]] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, options: ran.append(options["timestep"].flatten().tolist()), with_kwargs=True
    )
    sample(pipe, cache=0.9)
    hook.remove()
    levels = [round(each[0]) for each in ran]
    assert levels[:3] == [1000, 917, 833] and levels[-1] == 83 and len(levels) < 8
    assert len(ran[0]) == len(ran[-1]) == 6


def test_a_frame_that_is_generated_from_half_way_is_computed_there(pipe: STDiTPipeline) -> None:
    levels: list[list[float]] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, options: levels.append(options["timestep"].tolist()), with_kwargs=True
    )
    settings = {"conditions": [[], [FrameCondition(CLIP[:, 3:], 3, strength=0.5)], []], "cache": 0.9}
    sample(pipe, slice(1, 2), **settings)
    hook.remove()
    joined = [of_call for of_call in levels if of_call[0][0] == of_call[0][3] and of_call[0][0] < 501]
    assert [round(of_call[0][0]) for of_call in joined][:3] == [500, 417, 333]


def test_a_student_begins_anew_where_its_scale_changes(pipe: STDiTPipeline) -> None:
    student = tiny_pipeline_of(pipe, tiny_model(guidance_range=(1.0, 4.0)))
    settings = {"guidance_schedule": "interval", "guidance_interval": (0.3, 0.7), "guidance_scale": 4.0}
    scales: list[float] = []
    hook = student.transformer.register_forward_pre_hook(
        lambda module, args, options: scales.append(float(options["guidance"])), with_kwargs=True
    )
    calls = sample(student, slice(1), **settings, cache=0.9).calls
    hook.remove()
    assert calls[0].skipped_steps > 0
    assert scales[:3] == [1, 1, 1] and scales.count(4) >= 3 and scales[-2:] == [1, 1]


def tiny_pipeline_of(pipe: STDiTPipeline, model: STDiT) -> STDiTPipeline:
    """A pipeline with another model."""
    other = STDiTPipeline(**{**pipe.components, "transformer": model}, num_frames=4, height=8, width=8)
    other.set_progress_bar_config(disable=True)
    return other


def test_a_callback_that_changes_latents_begins_anew(pipe: STDiTPipeline) -> None:
    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": 1.01 * tensors["latents"]}

    assert all(not one.skipped_steps for one in sample(pipe, callback_on_step_end=change).calls)
    assert any(one.skipped_steps for one in sample(pipe, callback_on_step_end=lambda *_: None).calls)


def test_what_is_foreseen_is_a_straight_line_and_its_error_that_of_a_parabola() -> None:
    def velocity(sigma: float) -> Tensor:
        return torch.tensor([2 + 3 * sigma, 1 - sigma + 4 * sigma**2])[:, None, None, None, None].double()

    history = History(velocity(1))
    for sigma in (1.0, 0.9, 0.7):
        found = velocity(sigma)
        error = ((history.extrapolate(sigma) - found) / found).abs().flatten()
        assert history.error(sigma).isinf().all()
        history.record([0, 1], found, sigma, error)
    foreseen = history.extrapolate(0.4)
    torch.testing.assert_close(foreseen[0], velocity(0.4)[0])
    expected = (foreseen[1] - velocity(0.4)[1]).abs() / velocity(0.7)[1]
    torch.testing.assert_close(
        history.error(0.4), torch.tensor([0.0, float(expected)]).double(), atol=1e-6, rtol=1e-6
    )
    history.forget(torch.tensor([True, False]))
    assert history.error(0.4).isinf().tolist() == [True, False]


def test_files_say_what_was_skipped(
    pipe: STDiTPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,cache\na red circle,0.3\na blue square,off\na green cross,\n")
    settings = {"num_inference_steps": STEPS, "solver": "unipc", "cache": "fast", "format": ["mp4"]}
    config = SampleConfig(
        checkpoint=str(write_run(tmp_path / "run", pipe)),
        prompts=str(prompts),
        output=str(tmp_path / "out"),
        **settings,
    )
    sample_to_files(config)
    facts = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*.json"))]
    assert [one["cache"] for one in facts] == [0.3, "off", "fast"] and facts[0]["solver"] == "unipc"
    for one in facts:
        run = one["model_calls"]
        assert run + 2 * one["skipped_steps"] == 2 * STEPS and one["saved_share"] == round(
            1 - run / 2 / STEPS, 4
        )
    assert facts[0]["skipped_steps"] > 3 and facts[1]["skipped_steps"] == 0
    calls = [one["model_calls"] for one in facts]
    saved = 1 - sum(calls) / (6 * STEPS)
    assert f"model calls of a video: {sum(calls) / 3:.4g} of 24, {saved:.0%} saved" in capsys.readouterr().out
    sample_to_files(config)
    assert "all 3 videos are finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": -0.1}, "cache = -0.1: must be off, slow, fast, or a threshold between 0 and 1"),
        ({"cache": 0.0}, "cache = 0.0: must be"),
        ({"cache": float("nan")}, "cache = nan: must be"),
        ({"cache": "quick"}, "cache = quick: must be off"),
        ({"cache": True}, "cache = True: has a wrong type: must be a word or a number"),
        ({"cache": "fast", "num_inference_steps": 4}, "cache = fast would have no effect in 4 steps"),
        ({"solver": "ddim"}, r"solver = ddim: must be one of euler, heun, dpm\+\+, unipc"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str, pipe: STDiTPipeline) -> None:
    with pytest.raises(UserError, match=message):
        sample(pipe, **settings)


def test_a_cache_of_diffusers_beside_it_is_refused(pipe: STDiTPipeline) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    try:
        with pytest.raises(UserError, match="cache = 0.2: a cache of diffusers is enabled.*disable_cache"):
            sample(pipe)
        with pytest.raises(UserError, match=r"pab = \[2, 2, 2\]: a cache of diffusers is enabled"):
            sample(pipe, cache="off", pab=[2, 2, 2])
    finally:
        pipe.transformer.disable_cache()


def compare(group: Group, grid: tuple[int, int], cfg: int, folder: Path) -> None:
    mesh = build_mesh(SamplingParallelConfig(grid=grid, cfg=cfg), torch.device("cpu"))
    pipe = STDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for name, settings in CALLS.items():
        pipe.share(Mesh())
        alone = sample(pipe, **settings)
        pipe.share(mesh)
        found = sample(pipe, **settings)
        assert found.calls == alone.calls, name
        torch.testing.assert_close(found.frames, alone.frames, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("grid", "cfg"),
    [
        ((2, 1), 2),
        pytest.param((2, 2), 1, marks=pytest.mark.slow),
        pytest.param((2, 1), 1, marks=pytest.mark.slow),
        pytest.param((1, 1), 2, marks=pytest.mark.slow),
        pytest.param((1, 2), 2, marks=pytest.mark.slow),
    ],
)
def test_ranks_skip_the_steps_of_one_process(tmp_path: Path, grid: tuple[int, int], cfg: int) -> None:
    tiny_pipeline(tmp_path).save_pretrained(tmp_path / "pipeline")
    run_on_ranks(grid[0] * grid[1] * cfg, compare, grid, cfg, tmp_path / "pipeline")


def count_traffic(group: Group, folder: Path) -> None:
    mesh = build_mesh(SamplingParallelConfig(sp=2), torch.device("cpu"))
    pipe = STDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.share(mesh)
    sent: list[int] = []
    ran: list[int] = []

    def after_step(*_: Any) -> None:
        sent.append(sum(mesh.sp.traffic.calls.values()))
        ran.append(len(counted.rows))

    with Counted(pipe) as counted:
        sample(pipe, slice(1), callback_on_step_end=after_step)
    skipped = [place for place in range(1, STEPS) if ran[place] == ran[place - 1]]
    assert len(skipped) > 3 and all((sent[p] == sent[p - 1]) == (p in skipped) for p in range(1, STEPS))


def test_a_skipped_step_sends_nothing(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path).save_pretrained(tmp_path / "pipeline")
    run_on_ranks(2, count_traffic, tmp_path / "pipeline")
