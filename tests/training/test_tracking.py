import json
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState

from stdit.errors import UserError
from stdit.pipelines.contact_sheet import sheet_row, write_rows
from stdit.pipelines.video_io import write_mp4
from stdit.training.config import TrackerConfig
from stdit.training.tracking import TRACKERS, MetricsFile, Tracker, build_tracker


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_of_steps_that_are_done_again_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in range(4):
        first.write({"step": step, "loss": 0.1 * step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # a killed process
    second = MetricsFile(path, 2)
    second.write({"step": 2, "loss": 7.0})
    second.close()
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(0, 0.0), (1, 0.1), (2, 7.0)]


def test_damaged_lines_are_removed_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": \xb1}\n{"step": "2"}\n{"stop": 3}\n{"step": 4}\n{"st')
    MetricsFile(path, 5).close()
    assert [line["step"] for line in lines(path)] == [0, 4]
    assert f"{path}: 3 lines are damaged and were removed" in capsys.readouterr().out


def test_a_full_disk_is_reported() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    metrics = MetricsFile.__new__(MetricsFile)
    metrics.file = open("/dev/full", "w")
    with pytest.raises(UserError, match="/dev/full could not be written"):
        metrics.write({"step": 0})


def test_a_removed_file_is_reported(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.write({"step": 0})
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"removed or moved during the run\): check that the folder exists"):
        metrics.write({"step": 1})


def test_a_failing_tracker_stops_nothing_and_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when a network goes down in the middle."""

    class Down(Tracker):
        calls = 0

        def log(self, values: dict[str, object], step: int) -> None:
            Down.calls += 1
            if step:
                raise ConnectionError("network is unreachable")

        def finish(self) -> None:
            raise TimeoutError("still down")

    monkeypatch.setitem(TRACKERS, "wandb", lambda *_: Down())
    tracker = build_tracker(TrackerConfig(name="wandb"), tmp_path, {})
    for step in range(4):
        tracker.log({}, step)
    tracker.finish()
    assert Down.calls == 4
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1 and "wandb cannot log measurements (network is unreach" in said


def track(name: str, run: Path, config: TrackerConfig) -> None:
    PartialState(cpu=True)  # a run has an Accelerator by then
    video = np.zeros((4, 16, 16, 3), dtype=np.uint8)
    write_mp4(run / "a.mp4", video, 8)
    write_rows(run / "sheet.png", [sheet_row(video, "a prompt")])
    tracker = TRACKERS[name](config, run, {"model": {"depth": 2}, "seed": 0})
    assert isinstance(tracker, Tracker)
    tracker.log({"train/loss": 0.5, "train/skipped": False}, step=0)
    tracker.log_videos([run / "a.mp4"], ["a prompt"], run / "sheet.png", step=1)
    tracker.log({"train/loss": 0.25}, step=2)
    tracker.finish()


def test_tracker_none_writes_nothing(tmp_path: Path) -> None:
    track("none", tmp_path, TrackerConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "sheet.png"]


def test_tensorboard_has_numbers_and_pictures(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    track("tensorboard", tmp_path, TrackerConfig(name="tensorboard"))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(0, 0.5), (2, 0.25)]
    assert events.Tags()["images"]


def test_wandb_without_a_key_writes_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    track("wandb", tmp_path, TrackerConfig(name="wandb"))
    wandb.teardown()  # as at the end of a process: waits until all is on disk
    assert capsys.readouterr().out.count("wandb has no key") == 1
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = written.read_bytes()
    assert b"train/loss" in content and b"samples" in content
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/videos/**/*.mp4"))
    identity = json.loads((tmp_path / "wandb_id.json").read_text())["id"]
    assert identity in written.name
    assert wandb.run is None
