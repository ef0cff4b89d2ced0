"""Damaged and unusual files: each is read as far as possible, or skipped with the reason."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stdit.data.build import build_assignment
from stdit.data.config import BucketConfig, DataConfig
from stdit.data.decoding.decode import DecodeError, decode_clip, probe


def noise(num_frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), np.uint8)


def audio_only(path):
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def both_raise(path, reason):
    for read in (probe, lambda path: decode_clip(path, 1, 8, 16, 16)):
        with pytest.raises(DecodeError, match=reason) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: ")


def damaged(path, first, count, fill=b"\0"):
    """Overwrite the data of some packets."""
    with av.open(path) as container:
        places = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for position, size in places[first : first + count]:
        data[position : position + size] = fill * size
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"bf": "0"}),
        ("b.mp4", "libx265", {"preset": "ultrafast", "x265-params": "bframes=0:log-level=none"}),
        ("c.mp4", "libsvtav1", {"preset": "12", "svtav1-params": "pred-struct=1"}),
        ("d.avi", "mpeg4", {}),
    ],
)
def test_corrupt_in_the_middle(tmp_path, write_video, monkeypatch, name, codec, options):
    """Ten frames are whole: a window of them is read; one that reaches further is an error."""
    monkeypatch.setenv("SVT_LOG", "1")
    frames = noise(40, 64, 64)
    path = write_video(tmp_path / name, frames=frames, codec=codec, fps=8, gop=20, options=options)
    whole = decode_clip(path, 10, 8, 32, 32)
    later = decode_clip(path, 8, 8, 32, 32, start=3.5)
    damaged(path, 10, 6)
    assert probe(path).num_frames == 40
    assert torch.equal(decode_clip(path, 10, 8, 32, 32), whole)
    for start, count in ((0.0, 16), (1.0, 8)):
        with pytest.raises(DecodeError, match="damaged"):
            decode_clip(path, count, 8, 32, 32, start=start)
    assert torch.equal(decode_clip(path, 8, 8, 32, 32, start=3.5), later)


def test_zero_length(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    both_raise(tmp_path / "a.mp4", r"is empty \(0 bytes\)")


def test_only_audio(tmp_path):
    both_raise(audio_only(tmp_path / "a.mp4"), "has no video stream, only audio")
    both_raise(audio_only(tmp_path / "b.mkv"), "has no video stream, only audio")


def test_page_and_text(tmp_path):
    (tmp_path / "a.mp4").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20)
    (tmp_path / "b.png").write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20)
    both_raise(tmp_path / "a.mp4", "not a readable video, or damaged")
    both_raise(tmp_path / "b.png", "not a readable image, or damaged")


def test_wrong_extension_is_read_by_content(tmp_path, write_video):
    video = write_video(tmp_path / "a.mp4").read_bytes()
    Image.new("RGB", (48, 32), (200, 100, 0)).save(tmp_path / "a.png")
    picture = (tmp_path / "a.png").read_bytes()
    for name, data, expected in (
        ("b.avi", video, (16, 8.0, 32, 32)),
        ("b.png", video, (16, 8.0, 32, 32)),
        ("b.txt", video, (16, 8.0, 32, 32)),
        ("c.mp4", picture, (1, 1.0, 32, 48)),
        ("c.jpg", picture, (1, 1.0, 32, 48)),
    ):
        (tmp_path / name).write_bytes(data)
        assert probe(tmp_path / name) == expected
        assert decode_clip(tmp_path / name, 1, 8, 16, 16).shape == (1, 3, 16, 16)


def test_one_frame(tmp_path, write_video):
    for name, codec in (("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.gif", "gif")):
        path = write_video(tmp_path / name, codec=codec, num_frames=1)
        info = probe(path)
        assert info.num_frames == 1 and info.fps > 0
        assert decode_clip(path, 1, 8, 16, 16).shape == (1, 3, 16, 16)
        with pytest.raises(DecodeError, match="lasts"):
            decode_clip(path, 4, 1, 16, 16)


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (9, 99, 199)).save(tmp_path / "a.png")
    frames = [Image.new("P", (1, 1)) for _ in range(2)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    for name in ("a.png", "a.gif"):
        assert probe(tmp_path / name)[2:] == (1, 1)
        assert decode_clip(tmp_path / name, 1, 8, 16, 16).shape == (1, 3, 16, 16)


def test_twenty_thousand_pixels_wide(tmp_path, write_video):
    Image.new("L", (20000, 2)).save(tmp_path / "a.png")
    write_video(tmp_path / "a.mkv", codec="ffv1", num_frames=1, height=2, width=20000)
    for name in ("a.png", "a.mkv"):
        both_raise(tmp_path / name, "frames of 20000x2 pixels; at most 16384 a side")


def test_240_frames_a_second(tmp_path, write_video):
    path = write_video(tmp_path / "a.mp4", num_frames=24, fps=240)
    assert probe(path).fps == pytest.approx(240)
    video = decode_clip(path, 3, 30, 16, 16)
    assert [round(float(f.float().mean()) / 10) for f in video] == [0, 8, 16]


@pytest.mark.parametrize("name", ["a.mkv", "a.ts", "a.webm"])
def test_truncated(tmp_path, write_video, name):
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    path = write_video(tmp_path / name, codec=codec, frames=noise(24, 64, 64))
    whole = decode_clip(path, 6, 8, 32, 32)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 5 // 8])
    assert 8 <= probe(path).num_frames < 24
    assert torch.equal(decode_clip(path, 6, 8, 32, 32), whole)
    with pytest.raises(DecodeError, match="lasts|damaged"):
        decode_clip(path, 24, 8, 32, 32)


def test_truncated_before_its_index(tmp_path, write_video):
    path = write_video(tmp_path / "a.mp4", frames=noise(24))
    path.write_bytes(path.read_bytes()[:2000])
    both_raise(path, "damaged")


def test_truncated_pictures(tmp_path):
    pictures = [Image.fromarray(pixels) for pixels in noise(4)]
    for name in ("a.png", "a.jpg", "a.webp"):
        pictures[0].save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        both_raise(tmp_path / name, "not a readable image, or damaged")


@pytest.mark.parametrize("name", ["a.webp", "a.png"])
def test_animated_pictures(tmp_path, name):
    pictures = [Image.new("RGB", (48, 32), (20 * k, 20 * k, 20 * k)) for k in range(6)]
    durations = [100, 100, 300, 100, 100, 100]
    options = {"lossless": True} if name.endswith("webp") else {}
    path = tmp_path / name
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, **options)
    assert probe(path) == (6, pytest.approx(6 / 0.8), 32, 48)
    video = decode_clip(path, 4, 10, 16, 16, start=0.2)
    assert [round(float(f.float().mean()) / 20) for f in video] == [2, 2, 2, 3]
    with pytest.raises(DecodeError, match=r"lasts 0\.800 s"):
        decode_clip(path, 12, 10, 16, 16)


def test_skipped_files_are_reported_with_the_reason(tmp_path, write_video):
    good = write_video(tmp_path / "good.mp4", frames=noise(24, 64, 64))
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "page.mp4").write_text("<html>")
    audio_only(tmp_path / "audio.mp4")
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:2000])
    write_video(tmp_path / "one.mp4", num_frames=1, height=64, width=64)
    write_video(tmp_path / "wide.mkv", codec="ffv1", num_frames=1, height=2, width=20000)
    Image.new("RGB", (1, 1)).save(tmp_path / "pixel.png")
    names = sorted(path.name for path in tmp_path.iterdir())
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("path,text\n" + "".join(f"{name},words\n" for name in names))
    bucket = BucketConfig(num_frames=16, fps=8, height=32, width=32)
    assignment = build_assignment(DataConfig(manifest=str(manifest), buckets=[bucket]))
    assert assignment.kept == 1
    said = {path.name: reason for path, reason in reasons(assignment)}
    assert said.keys() == set(names) - {"good.mp4"}
    for name, reason in (
        ("empty.mp4", "is empty"),
        ("page.mp4", "not a readable video"),
        ("audio.mp4", "no video stream, only audio"),
        ("cut.mp4", "damaged"),
        ("wide.mkv", "20000x2"),
        ("one.mp4", "short"),
        ("pixel.png", "short"),
    ):
        assert reason in said[name]
    assert "8 x" not in "\n".join(assignment.exclusions())


def reasons(assignment):
    for path, reason in assignment.skipped:
        yield Path(path), reason
    for clip, reason in assignment.dropped:
        yield Path(clip.media.location), reason
