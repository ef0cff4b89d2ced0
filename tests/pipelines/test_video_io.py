import json
import resource
import signal
import subprocess
import sys

import av
import numpy as np
import PIL.Image
import pytest

from stdit.errors import UserError
from stdit.pipelines.contact_sheet import sheet_row, write_rows
from stdit.pipelines.video_io import (
    is_whole_video,
    read_frames,
    read_metadata,
    to_uint8,
    write_gif,
    write_mp4,
)

METADATA = {"prompt": 'ein "grüner" Ball; = # \\ 圆\nzweite Zeile', "seed": 7, "shift": None, "fps": 8.0}


def clip(frames=5, height=32, width=32):
    """A bright square that moves over a dark ground: smooth enough for h264 to keep."""
    video = np.full((frames, height, width, 3), (20, 40, 90), dtype=np.uint8)
    for index, frame in enumerate(video):
        frame[4:16, 4 + 2 * index : 16 + 2 * index] = (220, 60, 30)
    return video


def decode(path):
    """(codec, pixel format, width, height), frames a second, and the frames."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        facts = (stream.codec.name, stream.pix_fmt, stream.width, stream.height)
        rate = float(stream.average_rate)
        return facts, rate, [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_mp4_keeps_frames_rate_size_and_colours(tmp_path):
    written = write_mp4(tmp_path / "a.mp4", clip(), 8, METADATA)
    facts, rate, frames = decode(tmp_path / "a.mp4")
    assert facts == ("h264", "yuv420p", 32, 32)
    assert len(frames) == 5 and rate == 8
    assert np.abs(np.stack(frames)[:, 6:14, 20:] - clip().astype(float)[:, 6:14, 20:]).max() < 60
    assert np.abs(frames[0][8, 8] - np.array([220, 60, 30])).max() < 12
    assert written == METADATA == read_metadata(tmp_path / "a.mp4")
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.find(b"moov") < content.find(b"mdat")  # a browser can start before it has the whole file
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("fps", [1, 23.976, 29.97, 60, 0.5])
def test_rates(tmp_path, fps):
    write_mp4(tmp_path / "a.mp4", clip(3), fps)
    _, rate, frames = decode(tmp_path / "a.mp4")
    assert len(frames) == 3
    assert rate == pytest.approx(fps, rel=1e-4)


def test_odd_sizes_are_padded_and_recorded(tmp_path):
    written = write_mp4(tmp_path / "a.mp4", clip(1, 33, 47), 8, METADATA | {"height": 33, "width": 47})
    facts, _, frames = decode(tmp_path / "a.mp4")
    assert facts[2:] == (48, 34) and frames[0].shape == (34, 48, 3)
    size = {"height": 34, "width": 48, "padded_from": {"height": 33, "width": 47}}
    assert written == read_metadata(tmp_path / "a.mp4") == {**METADATA, **size}
    assert read_frames(tmp_path / "a.mp4").shape == (1, 33, 47, 3)


@pytest.mark.parametrize("kind, write", [("mp4", write_mp4), ("gif", write_gif)])
def test_frames_are_read_back_and_a_file_that_is_cut_short_is_known(tmp_path, kind, write):
    path = tmp_path / f"a.{kind}"
    write(path, clip(5), 8, METADATA)
    assert is_whole_video(path)
    frames = read_frames(path, columns=3)
    assert np.abs(frames[:, 6:14, 20:].astype(int) - clip()[[0, 2, 4], 6:14, 20:]).max() < 60
    assert np.abs(frames[0, 8, 8] - np.array([220.0, 60, 30])).max() < 12
    path.write_bytes(path.read_bytes()[:-20])
    assert not is_whole_video(path)


def test_gif(tmp_path):
    write_gif(tmp_path / "a.gif", clip(), 8, METADATA)
    with PIL.Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 5 and image.size == (32, 32) and image.info["duration"] == 120
    assert read_metadata(tmp_path / "a.gif") == METADATA


def test_sheet_enlarges_small_videos(tmp_path):
    shown = ((clip(16), "one"), (clip(3), "two " * 80), (clip(2, 300, 500), "圆"))
    write_rows(tmp_path / "sheet.png", [sheet_row(*one) for one in shown])
    with PIL.Image.open(tmp_path / "sheet.png") as image:
        assert image.width >= 8 * 4 * 32
        assert image.height >= 4 * 32 * 2
        colours = [colour for _, colour in image.getcolors(1 << 20)]
        assert (220, 60, 30) in colours and (255, 255, 255) in colours


@pytest.mark.parametrize(
    "frames", [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3)), np.zeros((2, 3, 8, 8), np.uint8)]
)
def test_what_is_no_video_is_refused(tmp_path, frames):
    with pytest.raises(ValueError, match="uint8"):
        write_mp4(tmp_path / "a.mp4", frames, 8)
    assert not list(tmp_path.iterdir())


def test_files_without_settings_are_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    write_gif(tmp_path / "a.gif", clip(), 8.0, ["the comment of another program"])
    for name in ("a.mp4", "a.gif", "absent.gif"):
        with pytest.raises(UserError, match=name):
            read_metadata(tmp_path / name)


def test_to_uint8_rounds():
    assert to_uint8(np.array([-1, 0, 0.5, 0.999, 2])).tolist() == [0, 0, 128, 255, 255]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from stdit import atomic_files
from stdit.pipelines import contact_sheet, video_io
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
noise = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
folder = Path(sys.argv[1])
for write in (
    lambda: video_io.write_mp4(folder / "a.mp4", noise, 8),
    lambda: video_io.write_gif(folder / "a.gif", noise, 8),
    lambda: contact_sheet.write_rows(folder / "a.png", [contact_sheet.sheet_row(noise, "noise")]),
    lambda: atomic_files.write_json_atomic(folder / "a.json", {"a": "x" * 5000}),
):
    try:
        write()
    except OSError:
        continue
    sys.exit("no error")
"""


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    assert hasattr(signal, "SIGXFSZ") and hasattr(resource, "RLIMIT_FSIZE")
    result = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())


def test_an_existing_file_survives_a_failure(tmp_path):
    (tmp_path / "a.mp4").write_text(json.dumps("old"))
    with pytest.raises(ValueError):
        write_mp4(tmp_path / "a.mp4", clip(), float("nan"))
    assert (tmp_path / "a.mp4").read_text() == '"old"'
