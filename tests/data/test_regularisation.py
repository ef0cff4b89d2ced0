"""Regularisation clips: their share of an epoch, without the trigger word, and the same in every run."""

from collections import Counter
from pathlib import Path

import pytest

from stdit.data.build import build_plan
from stdit.data.config import BucketConfig, DataConfig
from stdit.data.dataset import batch_info
from stdit.data.manifest.config import RegularisationConfig
from stdit.data.plan import BatchPlan
from stdit.errors import UserError
from stdit.training.validation_loss import readable_clips
from tests.training.tiny import save_clips

OWN, OTHERS = 5, 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    save_clips(folder / "own", OWN)
    save_clips(folder / "others", OTHERS)
    save_clips(folder / "short", 2, frames=2)
    return folder


def config_of(folder: Path, share: float = 0.3, others: str = "others", frames: int = 4) -> DataConfig:
    return DataConfig(
        manifest=str(folder / "own" / "manifest.csv"),
        regularisation=RegularisationConfig(str(folder / others), None, share)
        if others == "absent"
        else RegularisationConfig(str(folder / others / "manifest.csv"), None, share),
        buckets=[BucketConfig(num_frames=frames, fps=8, height=8, width=8, batch_size=2, max_windows=2)],
        trigger="sks",
    )


def captions(plan: BatchPlan, steps: range) -> list[str]:
    batches = [plan.batch(step) for step in steps]
    return [text for batch in batches for text in batch_info(plan, batch, batch.indices).captions]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("frames", [4, 2], ids=["whole", "windows"])
def test_they_have_their_share_of_every_epoch(folder: Path, share: float, frames: int) -> None:
    plan = build_plan(config_of(folder, share, frames=frames))
    parts = 4 // frames
    assignment = plan.assignment
    assert assignment.regularisation is not None and assignment.regularisation.sum() == OTHERS * parts
    total = OWN * parts / (1 - share)
    assert assignment.draws_per_epoch(0) == round(total)
    for epoch in range(6):
        drawn = plan._drawn(epoch, 0)
        mixed = assignment.regularisation[drawn].sum()
        assert abs(mixed - share * len(drawn)) < 1, "rounded"
        counts = Counter(drawn.tolist())
        assert all(counts[place] <= 2 for place in range(OWN * parts))


def test_they_have_no_trigger_word_and_each_step_is_found_alone(folder: Path) -> None:
    config = config_of(folder)
    plan = build_plan(config, seed=3)
    steps = range(4 * plan.steps_per_epoch)
    found = captions(plan, steps)
    own = [text for text in found if text.startswith("sks ")]
    assert abs(len(own) / len(found) - 0.7) < 0.08
    assert {text.removeprefix("sks ") for text in own} == {text for text in found if text not in own}
    again = build_plan(config, seed=3)
    assert [captions(again, range(step, step + 1)) for step in reversed(steps)] == [
        captions(plan, range(step, step + 1)) for step in reversed(steps)
    ]
    assert "9 of them are of data.regularisation: 2.1 of 7.1 draws" in plan.report()


def test_the_validation_loss_is_not_measured_on_them(folder: Path) -> None:
    assert readable_clips(build_plan(config_of(folder)).assignment, 99) == [list(range(OWN))]


@pytest.mark.parametrize(
    ("share", "others", "message"),
    [
        (0.0, "others", "data.regularisation.share is 0.0; it must be above 0 and below 1"),
        (1.0, "others", "data.regularisation.share is 1.0; it must be above 0 and below 1"),
        (0.3, "absent", "absent"),
        (0.3, "short", "data.regularisation: no bucket takes one of its clips.*\n.*2 clips dropped"),
    ],
)
def test_what_cannot_be_mixed_in(folder: Path, share: float, others: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_plan(config_of(folder, share, others))


def test_a_place_for_the_trigger_word_is_an_error_there(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(f"path,text\n{folder}/others/clip-0.mp4,a {{trigger}}\n")
    config = config_of(folder)
    config.regularisation = RegularisationConfig(str(tmp_path / "m.csv"), str(folder))
    with pytest.raises(UserError, match="Captions of data.regularisation have no such places"):
        build_plan(config)
