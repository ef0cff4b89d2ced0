from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stdit.data.decoding.decode import iter_frames, probe
from stdit.data.decoding.media import Media
from stdit.data.preparation import scenes as module
from stdit.data.preparation.cutting import copy_packets, cut_clip
from stdit.data.preparation.scenes import SceneConfig, split_clips
from stdit.errors import UserError
from tests.data.preparation.conftest import pattern, read_csv, task

SIZE = (48, 64)


@pytest.fixture
def film(tmp_path: Path, write_video: Callable[..., Path]) -> Path:
    """Four scenes of 16, 12, 5 and 24 frames, at 8 frames per second."""
    frames = np.concatenate([pattern(seed, length) for seed, length in enumerate((16, 12, 5, 24))])
    return write_video(tmp_path / "clips" / "film.mp4", frames=frames)


def windows(manifest: Path) -> list[tuple[float, float]]:
    return [(float(row["start"]), float(row["end"])) for row in read_csv(manifest)]


@pytest.mark.parametrize("detector", ["adaptive", "content"])
def test_scenes_are_spans_without_a_cut_inside(film: Path, detector: str) -> None:
    source = film.parent / "source.csv"
    source.write_text("path,text,mood\nfilm.mp4,four scenes,calm\n")
    output = film.parent / "scenes.csv"
    lines = split_clips(task(source, output), SceneConfig(detector))  # type: ignore[arg-type]
    assert windows(output) == [(0.0, 2.0), (2.0, 3.5), (4.125, 7.125)]
    first = read_csv(output)[0]
    assert (first["text"], first["mood"], first["fps"], first["num_frames"]) == (
        "four scenes",
        "calm",
        "8.0",
        "57",
    )
    assert windows(film.parent / "scenes.excluded.csv") == [(3.5, 4.125)]
    assert "1 x scene too short: film.mp4 (0.62 s, --min_seconds 1)" in lines[2]
    assert sorted(path.name for path in film.parent.iterdir()) == [
        "film.mp4", "scenes.csv", "scenes.excluded.csv", "source.csv",
    ]  # fmt: skip


def test_long_scenes_are_divided_within_the_span_of_the_row(film: Path) -> None:
    source, output = film.parent / "source.csv", film.parent / "scenes.csv"
    source.write_text("path,text,start,end\nfilm.mp4,x,1.0,6.125\n")
    split_clips(task(source, output), SceneConfig(min_seconds=0.5, max_seconds=1.1))
    assert windows(output) == [
        (1.0, 2.0), (2.0, 2.75), (2.75, 3.5), (3.5, 4.125), (4.125, 5.125), (5.125, 6.125),
    ]  # fmt: skip


def test_cut_scenes_have_the_same_frames_and_the_original_is_unchanged(film: Path) -> None:
    before = film.read_bytes()
    output, folder = film.parent / "scenes.csv", film.parent / "cut"
    lines = split_clips(task(film.parent, output), SceneConfig(min_seconds=0.5), folder)
    assert "scenes copied from a key frame on" in lines[-1] and film.read_bytes() == before
    rows = read_csv(output)
    assert [row["path"] for row in rows] == [
        f"cut/film.mp4/{ms:09d}.mp4" for ms in (0, 2000, 3500, 4125)
    ]  # fmt: skip
    assert "start" not in rows[0] and [int(row["num_frames"]) for row in rows] == [16, 12, 5, 24]
    whole = [frame for _, frame in iter_frames(film)]
    parts = [frame for row in rows for _, frame in iter_frames(film.parent / row["path"])]
    assert len(parts) == len(whole)
    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(whole, parts, strict=True)) < 4

    with pytest.raises(UserError, match="cut is not empty: choose another, or add --overwrite"):
        split_clips(task(film.parent / "scenes.csv", film.parent / "again.csv"), SceneConfig(), folder)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_a_span_that_begins_with_a_key_frame_is_copied_bit_for_bit(
    tmp_path: Path, write_video: Callable[..., Path], name: str
) -> None:
    path = write_video(tmp_path / name, frames=pattern(0, 24), gop=8)
    whole = [frame for _, frame in iter_frames(path)]
    for start, end, places in ((1.0, 2.0, range(8, 16)), (2.0, 9.0, range(16, 24))):
        way, info = cut_clip(Media.of(path), start, end, tmp_path / "cut.mp4", SIZE)
        assert way == "copied" and info == (len(places), 8.0, 48, 64)
        copied = list(iter_frames(tmp_path / "cut.mp4"))
        assert [time for time, _ in copied] == pytest.approx([k / 8 for k in range(len(places))])
        assert all(np.array_equal(frame, whole[k]) for (_, frame), k in zip(copied, places, strict=True))


def test_a_span_that_cannot_be_copied_is_reencoded(tmp_path: Path, write_video: Callable[..., Path]) -> None:
    media = Media.of(write_video(tmp_path / "a.mp4", frames=pattern(0, 24), gop=8))
    assert copy_packets(media, 0.5, 2.0, tmp_path / "cut.mp4") is None
    way, info = cut_clip(media, 0.5, 2.0, tmp_path / "cut.mp4", SIZE)
    assert way == "encoded" and info == (12, 8.0, 48, 64)
    for (time, frame), (other, same) in zip(
        iter_frames(tmp_path / "cut.mp4"), iter_frames(media, 0.5, 2.0), strict=True
    ):
        assert time == pytest.approx(other - 0.5) and np.abs(frame.astype(int) - same).mean() < 4

    times = [0, 0.1, 0.2, 1.0, 1.1, 2.0]
    varying = write_video(tmp_path / "b.avi", frames=pattern(0, 12, 33, 47)[:, :33, :47], codec="mpeg4")
    assert cut_clip(Media.of(varying), 0.0, 1.0, tmp_path / "cut.mp4", (33, 47))[1] == (8, 8.0, 33, 47)
    varying = write_video(tmp_path / "c.mp4", frames=pattern(0, 6), times=times, gop=9)
    assert cut_clip(Media.of(varying), 0.2, 1.5, tmp_path / "cut.mp4", SIZE)[0] == "encoded"
    assert [time for time, _ in iter_frames(tmp_path / "cut.mp4")] == pytest.approx([0, 0.8, 0.9], abs=1e-3)


def test_bad_settings_are_errors_before_the_work(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "split_clip", None)
    job = task(film.parent, film.parent / "scenes.csv")
    for config, message in (
        (SceneConfig(threshold=0.0), "--threshold 0: must be above 0"),
        (SceneConfig(min_seconds=-1), "--min_seconds -1"),
        (SceneConfig(min_seconds=2, max_seconds=3), "--max_seconds 3: must be above 0 and at least twice"),
    ):
        with pytest.raises(UserError, match=message):
            split_clips(job, config)
    with pytest.raises(UserError, match="--cut .* must lie in the folder of the output"):
        split_clips(job, SceneConfig(), tmp_path / "elsewhere")


def test_a_video_without_a_long_enough_scene_is_excluded(film: Path) -> None:
    with pytest.raises(
        UserError, match="1 x no scene is long enough: film.mp4 .the longest of 4 lasts 3.00 s"
    ):
        split_clips(task(film.parent, film.parent / "scenes.csv"), SceneConfig(min_seconds=5))
    assert probe(film).num_frames == 57
