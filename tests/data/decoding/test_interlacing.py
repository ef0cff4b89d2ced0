"""Interlaced videos are found by content and flags, and deinterlaced; others stay as they are, byte by byte."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from stdit.data.build import build_assignment
from stdit.data.clip_tensors import middle_window
from stdit.data.config import BucketConfig, DataConfig
from stdit.data.decoding import decode
from stdit.data.decoding.decode import decode_clip, iter_frames, probe_kind
from stdit.data.decoding.interlacing import find_field_order, is_combed
from stdit.data.decoding.media import Media
from tests.data.awkward import combed, moving, write

FLAGS = {"qp": "4", "g": "8", "flags": "+ildct+ilme"}
PLAIN = {"qp": "4", "g": "8"}


def error(video: torch.Tensor, speed: float = 6) -> float:
    """Return the mean difference in luma to the progressive frames of the same moments."""
    whole = moving(len(video), *video.shape[2:], speed=speed)
    weights = np.array([0.299, 0.587, 0.114])
    return float(np.abs(video.permute(0, 2, 3, 1).numpy() @ weights - whole @ weights).mean())


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
@pytest.mark.parametrize("bottom", [False, True])
@pytest.mark.parametrize("options", [PLAIN, FLAGS])
def test_a_combed_video_is_found_and_deinterlaced(tmp_path: Path, name: str, bottom: bool, options) -> None:
    options = options | {"x264-params": f"{'b' if bottom else 't'}ff=1"} if options is FLAGS else options
    path = write(tmp_path / name, combed(24, bottom_first=bottom), options=options)
    assert find_field_order(Media.of(path)) == ("bff" if bottom else "tff")
    assert probe_kind(path)[2]
    video = decode_clip(path, 24, 8, 48, 64)
    left = decode_clip(path, 24, 8, 48, 64, field_order="progressive")
    assert error(video) < 0.6 * error(left)
    assert torch.equal(video, decode_clip(path, 24, 8, 48, 64, field_order="bff" if bottom else "tff"))
    # A window that is sought has the same frames, and so has the walk through all of them.
    assert torch.equal(decode_clip(path, 5, 8, 48, 64, start=1.25), video[10:15])
    assert torch.equal(decode_clip(path, 4, 4, 48, 64, start=0.5), video[4:12:2])
    walked = [pixels for _, pixels in iter_frames(path, 0.5, 1.0)]
    assert len(walked) == 4
    assert np.abs(walked[0].astype(int) - video[4].permute(1, 2, 0).numpy()).mean() < 3


def test_flags_decide_where_nothing_moves_and_content_where_something_does(tmp_path: Path) -> None:
    still = moving(1).repeat(12, 0)
    flagged = FLAGS | {"x264-params": "bff=1"}
    assert find_field_order(Media.of(write(tmp_path / "a.mkv", still, options=flagged))) == "bff"
    assert find_field_order(Media.of(write(tmp_path / "b.mkv", still, options=PLAIN))) == "progressive"
    moves = write(tmp_path / "c.mkv", moving(24), options=flagged)
    assert find_field_order(Media.of(moves)) == "progressive"
    assert torch.equal(
        decode_clip(moves, 8, 8, 24, 32), decode_clip(moves, 8, 8, 24, 32, field_order="progressive")
    )


def test_progressive_videos_are_read_as_before(tmp_path: Path, real_clips: list[Path]) -> None:
    stripes = np.zeros((24, 48, 64, 3), np.uint8)
    for k in range(24):
        stripes[k, ::2, 2 * k : 2 * k + 16] = 255  # every other line: combed, but not interlaced
    vertical = np.stack([np.roll(moving(1)[0], 2 * k, axis=0) for k in range(24)])
    paths = [
        write(tmp_path / "a.mp4", stripes, options=PLAIN),
        write(tmp_path / "b.mp4", vertical, options=PLAIN),
    ]
    for path in [*paths, *real_clips]:
        assert find_field_order(Media.of(path)) == "progressive", path
        one = decode_clip(path, 8, 8, 48, 64)
        assert torch.equal(one, decode_clip(path, 8, 8, 48, 64, field_order="progressive"))


def test_progressive_videos_are_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mp4", moving(24), options=PLAIN)
    monkeypatch.setattr(decode, "find_field_order", lambda media: pytest.fail("nothing looks interlaced"))
    decode_clip(path, 8, 8, 48, 64)


def test_manifests_with_and_without_the_column_give_the_same_frames(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", combed(24), options=PLAIN)
    bucket = BucketConfig(num_frames=8, fps=8, height=48, width=64)
    seen = {}
    for name, order in (("none", ""), ("tff", "tff"), ("tt", "tt"), ("progressive", "progressive")):
        manifest = tmp_path / f"{name}.csv"
        row = f"a.mp4,words,24,8,48,64,{order}"
        manifest.write_text(f"path,text,num_frames,fps,height,width,field_order\n{row}\n")
        assignment = build_assignment(DataConfig(manifest=str(manifest), buckets=[bucket]))
        seen[name] = middle_window(assignment.clips[0], assignment.buckets[0])
        said = "1 clips are interlaced, and deinterlaced by bwdif: 1 tff" in assignment.table()
        assert said == (name in ("tff", "tt"))
    assert torch.equal(seen["none"], seen["tff"]) and torch.equal(seen["tt"], seen["tff"])
    assert not torch.equal(seen["tff"], seen["progressive"])
    assert path.exists()


def test_a_wrong_field_order_is_skipped_with_the_reason(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4")
    manifest = tmp_path / "m.csv"
    head = "path,text,num_frames,fps,height,width,field_order"
    manifest.write_text(f"{head}\na.mp4,words,16,8,48,64,sideways\na.mp4,words,16,8,48,64,\n")
    bucket = BucketConfig(num_frames=8, fps=8, height=48, width=64)
    assignment = build_assignment(DataConfig(manifest=str(manifest), buckets=[bucket]))
    assert [reason for _, reason in assignment.skipped] == [
        "field_order is not progressive, tff or bff: 'sideways'"
    ]


@pytest.mark.parametrize("height", [2, 15, 16, 17, 18, 33, 49, 50, 65])
def test_frames_of_any_height_are_looked_at(height: int) -> None:
    for level, found in ((0, False), (90, height >= 18)):  # a frame without content; lines of two fields
        picture = np.full((height, 32, 3), 100, np.uint8)
        picture[::2] += level
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv444p")
        assert is_combed(frame) == found
