"""train.py with a teacher: what is saved, resumed, exported and sampled, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stdit.checkpoint_files import read_meta
from stdit.errors import UserError
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.loading import load_pipeline
from stdit.pipelines.sampling import sample_to_files
from tests.test_resume_changed import kill_in
from tests.test_train import do, same_state, settings_like, train_two
from tests.training.tiny import tiny_settings

DISTILL = ["--name", "student", "--distill.guidance_scale", "[1, 4]", "--trainer.steps", "4"]
LAST = "step-00000004"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips, a run of two steps, and one of its student of four."""
    return train_two(tmp_path_factory.mktemp("trained"), DISTILL)


@pytest.fixture
def again(trained: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Settings of another run like it, in a folder of its own."""
    return settings_like(trained, tmp_path, DISTILL)


def test_a_student_needs_half_the_calls_and_no_flag(trained: Path, tmp_path: Path) -> None:
    run = trained / "outputs" / "student"
    meta = read_meta(run / "checkpoints" / LAST)
    assert meta["teacher"]["path"].endswith("step-00000002") or meta["teacher"]["path"].endswith(
        "transformer"
    )
    assert list(run.glob("samples/*/*.mp4"))
    for source in (run, run / "pipeline"):
        calls = []
        for scale in (1.5, 3.0):
            folder = tmp_path / f"{source.name}{scale}"
            files = sample_to_files(
                SampleConfig(
                    checkpoint=str(source), prompt=["a red square"], guidance_scale=scale, output=str(folder)
                )
            )
            metadata = next(path for path in files if path.suffix == ".json")
            calls.append(json.loads(metadata.read_text())["model_calls"])
        assert calls == [30, 30]
    first, second = (load_pipeline(source)[0] for source in (run, run / "pipeline"))
    make = lambda pipe, scale: pipe(  # noqa: E731
        "a red square",
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        num_inference_steps=2,
        solver="heun",
    )
    assert torch.equal(make(first, 3.0).frames, make(second, 3.0).frames)
    assert not torch.equal(make(first, 3.0).frames, make(first, 2.0).frames)
    assert make(first, 3.0).calls[0].run == 3


def test_a_run_that_is_killed_resumes_to_the_same_bits(
    trained: Path, again: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        kill_in(patch, 3)
        do(again())
    assert do(again()) == 0
    one, other = (folder / "outputs" / "student" / "checkpoints" / LAST for folder in (trained, tmp_path))
    assert same_state(one, other)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--distill.guidance_scale", "[4, 1]"],
            r"distill.guidance_scale = \[4.*, 1.*\]: must be two rising",
        ),
        (
            ["--lora.rank", "2", "--optimizer.name", "adamw"],
            "distill.guidance_scale and lora.rank = 2: a student has a new input",
        ),
        (
            ["--model.depth", "3"],
            "model.depth = 3: the teacher in init_from = .* has 1, and a student has its",
        ),
        (["--flow.prediction", "sample"], "flow.prediction = sample: .* was trained with velocity"),
        (["--text_encoder.max_length", "9"], "was trained with another text encoder"),
    ],
)
def test_bad_settings_are_refused(flags: list[str], message: str, again: Callable[..., list[str]]) -> None:
    with pytest.raises(UserError, match=message):
        do(again(*flags))


def test_teachers_that_cannot_teach_are_refused(trained: Path, again: Callable[..., list[str]]) -> None:
    with pytest.raises(UserError, match="a student needs a teacher: add init_from"):
        do([flag for flag in again() if "outputs/tiny" not in flag and flag != "--init_from"])
    student = str(trained / "outputs" / "student")
    for flags in ([], ["--distill.guidance_scale", "null", "--lora.rank", "2", "--optimizer.name", "adamw"]):
        with pytest.raises(
            UserError, match="takes the guidance scale as an input, which training does not give"
        ):
            do(again("--init_from", student, *flags))
    with pytest.raises(UserError, match=r"model.guidance_range = .*: only a teacher shows"):
        do([*tiny_settings(trained), "--model.guidance_range", "[1, 4]"])


def test_a_run_cannot_become_a_student_or_end_as_one(trained: Path) -> None:
    base = str(trained / "outputs" / "tiny")
    plain = [*tiny_settings(trained), "--trainer.steps", "6"]
    with pytest.raises(UserError, match="holds no student, but distill.guidance_scale is set"):
        do([*plain, "--distill.guidance_scale", "[1, 4]", "--init_from", base])
    with pytest.raises(UserError, match="holds a student, but distill.guidance_scale is not set"):
        do([*plain, "--name", "student"])
    with pytest.raises(UserError, match="distill.guidance_scale .* -> .*it learned something else"):
        do([*plain, *DISTILL, "--distill.guidance_scale", "[1, 5]", "--init_from", base])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"guidance_scale": 9.0},
            "guidance_scale = 9: this model takes the scale as an input, and learned 1 to 4",
        ),
        (
            {"guidance_scale": 3.5, "guidance_schedule": "linear"},
            "guidance_schedule = linear has guidance_scale = 6: this model takes",
        ),
        (
            {"negative_prompt": "grey", "guidance_scale": 2.0},
            "negative_prompt cannot be followed: this model takes",
        ),
        ({"guidance_scale": 2.0, "guidance_rescale": 0.5}, "guidance_rescale cannot be followed"),
        ({"refine_pairs": 1, "refine_guidance_scale": 5.0}, "refine_guidance_scale = 5: this model takes"),
    ],
)
def test_what_a_student_did_not_learn_is_refused(
    settings: dict, message: str, trained: Path, tmp_path: Path
) -> None:
    checkpoint = str(trained / "outputs" / "student")
    with pytest.raises(UserError, match=message):
        sample_to_files(
            SampleConfig(checkpoint=checkpoint, prompt=["a"], output=str(tmp_path / "out"), **settings)
        )
    assert not (tmp_path / "out").exists()
