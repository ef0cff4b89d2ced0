"""Seeking and skipping give the same frames as decoding one by one."""

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from stdit.data.decoding import frames
from stdit.data.decoding.decode import decode_clip, probe
from stdit.data.decoding.frames import select_by_frames, select_by_packets
from stdit.data.decoding.media import Media
from stdit.data.decoding.opening import DecodeError, NeedsSlowerRead, Video, open_clip
from stdit.data.decoding.packets import REORDER_DEPTH
from stdit.data.decoding.pixels import rgb


def textured(num_frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames that differ everywhere, moving so that encoders find references."""
    noise = np.random.default_rng(0).integers(0, 256, (height + num_frames, width, 3), np.uint8)
    return np.stack([noise[k : k + height] for k in range(num_frames)])


def frames_in_order(path: Path, times: list[float], tolerance: float) -> list[np.ndarray]:
    """Every frame of the file decoded in turn, and for each time the latest that is not later."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type = "NONE"
        every = [
            (frame.pts * float(stream.time_base), rgb(frame).copy())
            for frame in container.decode(stream)
            if frame.pts is not None
        ]
    first = every[0][0]
    return [[pixels for at, pixels in every if at - first <= time + tolerance][-1] for time in times]


def read(way: Callable, path: Path, times: list[float], tolerance: float) -> list[np.ndarray]:
    found: dict[int, np.ndarray] = {}
    with open_clip(Media.of(path), quick=way is select_by_packets) as video:
        assert isinstance(video, Video)
        for frame, places in way(video, times, tolerance):
            pixels = rgb(frame).copy()
            assert not found.keys() & set(places)
            found |= dict.fromkeys(places, pixels)
    return [found[place] for place in range(len(times))]


def agree(path: Path, windows: list[tuple[float, float, int]], ways: tuple[Callable, ...]) -> None:
    for start, fps, count in windows:
        times = [start + k / fps for k in range(count)]
        expected = frames_in_order(path, times, 0.1 / fps)
        for way in ways:
            for place, (a, b) in enumerate(zip(read(way, path, times, 0.1 / fps), expected, strict=True)):
                assert np.array_equal(a, b), f"{path.name}: frame {place} of {start} s at {fps} fps by {way}"


BOTH = (select_by_packets, select_by_frames)
WINDOWS = [(0.0, 24.0, 40), (0.0, 8.0, 8), (0.35, 6.0, 6), (0.9, 24.0, 8), (1.2, 60.0, 20), (1.6, 10.0, 1)]


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"bf": "3", "x264-params": "b-pyramid=normal:ref=3"}),
        ("b.mp4", "libx264", {"bf": "0"}),
        ("c.mp4", "libx264", {"bf": "3", "x264-params": "open-gop=1:bframes=3:b-adapt=0"}),
        ("d.mkv", "libx264", {"bf": "5"}),
        ("e.ts", "libx264", {"bf": "2"}),
        ("f.mp4", "libx265", {"preset": "veryfast", "x265-params": "log-level=none"}),
        ("g.mkv", "libx265", {"preset": "veryfast", "x265-params": "open-gop=1:bframes=4:log-level=none"}),
        ("h.webm", "libvpx-vp9", {"deadline": "good", "cpu-used": "8", "lag-in-frames": "16"}),
        (
            "i.webm",
            "libvpx",
            {"deadline": "good", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"},
        ),
        ("j.mp4", "libsvtav1", {"preset": "12"}),
        ("k.avi", "mpeg4", {}),
        ("l.mp4", "mpeg4", {"bf": "2"}),
        ("m.mpg", "mpeg2video", {"bf": "2"}),
        ("n.mkv", "ffv1", {}),
    ],
)
def test_seeking_and_skipping_give_the_frames_of_decoding_one_by_one(
    tmp_path, write_video, monkeypatch, name, codec, options
):
    monkeypatch.setenv("SVT_LOG", "1")
    path = write_video(
        tmp_path / name,
        codec=codec,
        frames=textured(44),
        fps=24,
        gop=12,
        options=options,
        height=48,
        width=64,
    )
    agree(path, WINDOWS, BOTH)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_variable_rate_late_start_and_negative_times(tmp_path, write_video, name):
    steps = np.random.default_rng(1).choice([0.02, 0.04, 0.1, 0.3], 40)
    times = 2.5 + np.cumsum(steps) - steps[0]
    path = write_video(tmp_path / name, frames=textured(40), times=list(times), gop=7)
    length = float(times[-1] - times[0])
    agree(path, [(0.0, 5.0, 10), (length / 3, 7.0, 8), (length / 2, 30.0, 30), (length - 0.2, 20.0, 3)], BOTH)


def test_only_what_is_needed_is_decoded(tmp_path, write_video):
    path = write_video(tmp_path / "a.mp4", frames=textured(96), fps=24, gop=24, options={"bf": "3"})
    with open_clip(Media.of(path)) as video:
        assert isinstance(video, Video)
        packets: list = []
        decode = frames._pick

        def count(video, decoded, wanted):
            packets.extend(decoded)
            return decode(video, decoded, wanted)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(frames, "_pick", count)
            list(select_by_packets(video, [2.0 + k / 6 for k in range(4)], 0.01))
    assert 4 <= len(packets) < 13 + 1  # of the 13 frames of the window, and none before or after it


def test_without_times_of_packets_frames_are_read_one_by_one(tmp_path, write_video):
    path = write_video(
        tmp_path / "a.avi", num_frames=20, gop=8, options={"bf": "2", "x264-params": "b-adapt=0"}
    )
    with open_clip(Media.of(path)) as video, pytest.raises(NeedsSlowerRead):
        list(select_by_packets(video, [0.0], 0.01))
    video = decode_clip(path, 8, 8, 32, 32, start=1.0)
    assert [round(float(f.float().mean()) / 10) for f in video] == list(range(8, 16))


@pytest.fixture(scope="module")
def grey(write_video, tmp_path_factory) -> Path:
    """96 frames in four groups, with B-frames."""
    path = tmp_path_factory.mktemp("grey") / "a.mp4"
    options = {"bf": "3", "x264-params": "b-adapt=0"}
    return write_video(path, frames=textured(96), fps=24, gop=24, options=options)


def copied(source: Path, path: Path, options: dict[str, str], skip: int = 0, shift: int = 0) -> Path:
    """The packets in another container, without the first `skip`, later by `shift` ticks."""
    with av.open(source) as opened, av.open(path, "w", options=options) as target:
        stream = opened.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in [p for p in opened.demux(stream) if p.size][skip:]:
            packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, copy
            target.mux(packet)
    return path


@pytest.mark.parametrize(
    ("name", "options", "shift", "count"),
    [
        ("a.mp4", {"use_editlist": "0"}, 0, 96),
        ("b.mp4", {}, 50_000, 96),  # begins with an empty edit
        ("c.mp4", {"movflags": "frag_keyframe+empty_moov"}, 0, 96),
        ("d.flv", {}, 0, 96),
        ("e.ts", {}, 900_000, 96),
    ],
)
def test_any_start_of_time_stamps(tmp_path, grey, name, options, shift, count):
    path = copied(grey, tmp_path / name, options, shift=shift)
    info = probe(path)
    assert info.num_frames == count and info.fps == pytest.approx(24, rel=1e-3)
    agree(path, [(0.0, 12.0, 20), (1.4, 24.0, 6), (3.5, 8.0, 3)], BOTH)


@pytest.mark.parametrize("name", ["a.ts", "a.mkv"])
def test_cut_in_the_middle_of_a_group_begins_with_the_next(tmp_path, grey, name):
    path = copied(grey, tmp_path / name, {}, skip=29)
    info = probe(path)
    assert info.num_frames == 48 and info.fps == pytest.approx(24, rel=1e-3)
    agree(path, [(0.0, 12.0, 20), (0.7, 24.0, 6), (1.5, 8.0, 3)], BOTH)


def test_edit_list_that_begins_in_the_middle_of_a_group(tmp_path, grey):
    data = bytearray(grey.read_bytes())
    at = data.index(b"elst") + 16
    begin = int.from_bytes(data[at : at + 4], "big") + 30 * 512
    data[at : at + 4] = begin.to_bytes(4, "big")
    (tmp_path / "a.mp4").write_bytes(data)
    assert probe(tmp_path / "a.mp4").num_frames == 66
    agree(tmp_path / "a.mp4", [(0.0, 12.0, 20), (1.0, 24.0, 6), (2.0, 8.0, 3)], BOTH)


def test_times_that_jump_back_are_an_error(tmp_path, write_video):
    one = write_video(tmp_path / "a.ts", num_frames=40, fps=8).read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(one + one)
    for read_all in (probe, lambda path: decode_clip(path, 60, 8, 16, 16)):
        with pytest.raises(DecodeError, match="times jump back"):
            read_all(path)


def test_frames_of_a_long_gop_are_not_held(tmp_path, write_video, monkeypatch):
    path = write_video(tmp_path / "a.mp4", num_frames=200, gop=200, fps=24)
    held = []

    class Watched(frames.deque):
        def append(self, item):
            super().append(item)
            held.append(len(self))

    monkeypatch.setattr(frames, "deque", Watched)
    decode_clip(path, 100, 24, 16, 16, start=4.0)
    assert held and max(held) <= 2 * REORDER_DEPTH + 2


def test_threads_change_nothing(tmp_path, write_video):
    path = write_video(tmp_path / "a.mp4", frames=textured(44), fps=24, gop=12, options={"bf": "3"})
    one = decode_clip(path, 16, 10, 32, 32, start=0.2)
    assert torch.equal(one, decode_clip(path, 16, 10, 32, 32, start=0.2, threads=3))


def test_a_damaged_file_is_read_up_to_the_damage(tmp_path, write_video):
    """Ten frames are whole; a window inside of them is read, one that reaches further is an error."""
    path = write_video(tmp_path / "a.mp4", frames=textured(44), fps=24, gop=12, options={"bf": "0"})
    with av.open(path) as container:
        places = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for position, size in places[10:20]:
        data[position : position + size] = bytes(size)
    path.write_bytes(data)
    assert decode_clip(path, 10, 24, 16, 16).shape[0] == 10
    for start, count in ((0.0, 16), (0.45, 4)):
        with pytest.raises(DecodeError, match="damaged"):
            decode_clip(path, count, 24, 16, 16, start=start)
    assert decode_clip(path, 8, 24, 16, 16, start=1.1).shape[0] == 8  # from the next key frame but one on
