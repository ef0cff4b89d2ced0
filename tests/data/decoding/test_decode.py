import math

import numpy as np
import pytest
import torch
from PIL import Image

from stdit.data.decoding.decode import DecodeError, decode_clip, iter_frames, probe


def levels(video: torch.Tensor) -> list[int]:
    """Frame numbers of a grey clip: its level over 10."""
    return [round(float(level) / 10) for level in video.float().mean(dim=(1, 2, 3))]


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "libx264"), ("a.ts", "libx264"),
     ("a.webm", "libvpx-vp9"), ("a.gif", "gif"), ("b.avi", "mpeg4")],
)  # fmt: skip
def test_containers(tmp_path, write_video, name, codec):
    path = write_video(tmp_path / name, codec=codec, height=64, width=48)
    info = probe(path)
    assert (info.num_frames, info.height, info.width) == (16, 64, 48)
    assert info.fps == pytest.approx(8, rel=0.01)
    video = decode_clip(path, 16, 8, 64, 48)
    assert video.shape == (16, 3, 64, 48) and video.dtype == torch.uint8
    assert levels(video) == list(range(16))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts"])
@pytest.mark.parametrize("start", [0.125, 0.5, 0.7, 1.25])
def test_seeks_to_the_window(tmp_path, write_video, name, start):
    path = write_video(tmp_path / name, num_frames=20)
    first = int(start * 8 + 0.1)
    assert levels(decode_clip(path, 8, 8, 32, 32, start=start)) == list(range(first, first + 8))


def test_resamples_by_time(tmp_path, write_video):
    path = write_video(tmp_path / "a.mp4", num_frames=16, fps=8)
    assert levels(decode_clip(path, 8, 4, 32, 32)) == list(range(0, 16, 2))
    assert levels(decode_clip(path, 6, 16, 32, 32)) == [0, 0, 1, 1, 2, 2]


def test_ntsc_rate_gives_every_frame_once(tmp_path, write_video):
    path = write_video(tmp_path / "a.mp4", num_frames=24, fps=30000 / 1001)
    assert levels(decode_clip(path, 24, 30, 32, 32)) == list(range(24))


def test_variable_frame_rate_goes_by_presentation_time(tmp_path, write_video):
    times = [0, 0.1, 0.2, 1.0, 1.1, 2.0]
    path = write_video(tmp_path / "a.mp4", num_frames=6, times=times)
    assert levels(decode_clip(path, 5, 2, 32, 32)) == [0, 2, 3, 4, 5]
    assert levels(decode_clip(path, 3, 2, 32, 32, start=1.0)) == [3, 4, 5]


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.ts"])
def test_iterates_over_a_part_frame_by_frame(tmp_path, write_video, name):
    path = write_video(tmp_path / name, num_frames=20, height=32, width=64)
    for start, end, wanted in (
        (0.0, math.inf, range(20)),
        (0.625, 1.5, range(5, 12)),
        (2.0, 9.0, range(16, 20)),
    ):
        frames = list(iter_frames(path, start, end, side=32))
        assert [round(float(frame.mean()) / 10) for _, frame in frames] == list(wanted)
        assert [time for time, _ in frames] == pytest.approx([k / 8 for k in wanted])
        assert all(frame.shape == (16, 32, 3) for _, frame in frames)
    path.write_bytes(b"no video")
    with pytest.raises(DecodeError):
        next(iter_frames(path))


def test_a_clip_that_is_too_short_is_an_error_with_its_length(tmp_path, write_video):
    path = write_video(tmp_path / "a.mp4", num_frames=12)
    with pytest.raises(DecodeError, match=r"a\.mp4: lasts 1\.500 s, but a frame is needed at 1\.875 s"):
        decode_clip(path, 16, 8, 32, 32)
    with pytest.raises(DecodeError, match="lasts"):
        decode_clip(path, 4, 8, 32, 32, start=5.0)


def test_same_size_keeps_the_pixels_and_others_are_not_distorted(tmp_path, write_video):
    frames = np.zeros((2, 32, 64, 3), np.uint8)
    frames[:, :, 32:] = 200  # dark left, bright right
    path = write_video(tmp_path / "a.mp4", frames=frames)
    video = decode_clip(path, 2, 8, 16, 16)  # the middle square, halved
    assert video[0, 1, :, :7].float().mean() < 10 and video[0, 1, :, 9:].float().mean() > 190
    wide = decode_clip(path, 2, 8, 32, 64)[0, 1].int()
    assert (wide - torch.from_numpy(frames[0, :, :, 1]).int()).abs().max() <= 3


def test_random_crop_is_the_same_for_all_frames_and_drawn_from_the_generator(tmp_path, write_video):
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, None, :, None] * 3, (4, 32, 64, 3))
    path = write_video(tmp_path / "a.mp4", frames=ramp)

    def crop(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return decode_clip(path, 4, 8, 32, 32, crop="random", generator=generator)

    assert torch.equal(crop(1), crop(1))
    assert not torch.equal(crop(1), crop(2))
    assert (crop(1)[0].int() - crop(1)[3].int()).abs().max() <= 6


def test_rotation_metadata(tmp_path, write_video):
    frames = np.zeros((2, 32, 64, 3), np.uint8)
    frames[:, :, :32] = 200  # bright left
    path = write_video(tmp_path / "a.mp4", frames=frames)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    one = 0x10000
    turned = (0, one, 0, -one, 0, 0, 0, 0, 0x40000000)  # a quarter turn clockwise: left becomes top
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turned)
    path.write_bytes(data)
    info = probe(path)
    assert (info.height, info.width) == (64, 32)
    video = decode_clip(path, 2, 8, 64, 32)
    assert video[0, :, :30].float().mean() > 190 and video[0, :, 34:].float().mean() < 10


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), lambda x: x),
        ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
        ((1, 0, 0, -1), lambda x: x[::-1]),
        ((-1, 0, 0, -1), lambda x: x[::-1, ::-1]),
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
        ((0, -1, 1, 0), lambda x: np.rot90(x)),
        ((0, 1, 1, 0), lambda x: x.T),
        ((0, -1, -1, 0), lambda x: x[::-1, ::-1].T),
    ],
)
def test_turned_and_mirrored(tmp_path, write_video, matrix, shown):
    """(a, b, c, d): what is at (x, y) is shown at (a x + c y, b x + d y)."""
    grey = np.zeros((32, 64), np.uint8)
    grey[:16], grey[:, :32] = 80, grey[:, :32] + 120
    grey[:16, :32] = 240
    frames = np.broadcast_to(grey[None, ..., None], (2, 32, 64, 3))
    path = write_video(tmp_path / "a.mp4", frames=frames)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (0x10000 * value for value in matrix)
    rows = (a, b, 0, c, d, 0, 0, 0, 0x40000000)
    data[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in rows)
    path.write_bytes(data)
    expected = torch.from_numpy(shown(grey).copy()).int()
    assert probe(path)[2:] == tuple(expected.shape)
    for size in (expected.shape, [side // 2 for side in expected.shape]):
        video = decode_clip(path, 1, 8, *size)[0, 0].int()
        step = expected.shape[0] // size[0]
        quarters = [
            (i, j) for i in (size[0] // 4, size[0] * 3 // 4) for j in (size[1] // 4, size[1] * 3 // 4)
        ]
        for i, j in quarters:
            assert abs(video[i, j] - expected[i * step, j * step]) <= 3
    (walked,) = [pixels for time, pixels in iter_frames(path, 0.0, 0.1)]
    assert np.abs(walked[..., 0].astype(int) - expected.numpy()).mean() <= 3


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_image_is_a_video_of_one_frame(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (48, 32), (200, 100, 0)).save(path, quality=95)
    assert probe(path) == (1, 1.0, 32, 48)
    video = decode_clip(path, 1, 8, 16, 16)
    assert video.shape == (1, 3, 16, 16)
    assert (video[0, :, 8, 8].int() - torch.tensor([200, 100, 0])).abs().max() < 8
    with pytest.raises(DecodeError, match="an image has one frame, not 2"):
        decode_clip(path, 2, 8, 16, 16)


def bad_files(tmp_path, write_video):
    good = write_video(tmp_path / "good.mp4").read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    (tmp_path / "page.mp4").write_text("<html><body>404 Not Found</body></html>")
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
    (tmp_path / "truncated.mp4").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "folder.mp4").mkdir()
    names = ["empty.mp4", "text.mp4", "page.mp4", "concat.mp4", "truncated.mp4", "text.png", "folder.mp4"]
    return [tmp_path / name for name in [*names, "missing.mp4", "missing.png"]]


def test_bad_files_raise_with_path_and_reason(tmp_path, write_video):
    for path in bad_files(tmp_path, write_video):
        for read in (probe, lambda path: decode_clip(path, 1, 8, 16, 16)):
            with pytest.raises(DecodeError) as caught:
                read(path)
            assert str(caught.value).startswith(f"{path}: ") and caught.value.reason


def test_damage_in_the_middle_is_a_decode_error(tmp_path, write_video):
    noise = np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), np.uint8)
    path = write_video(tmp_path / "a.mkv", frames=noise)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert 0 < probe(path).num_frames < 16
    with pytest.raises(DecodeError):
        decode_clip(path, 16, 8, 32, 32)


def test_huge_frames_are_refused_by_the_header(tmp_path, write_video):
    path = write_video(tmp_path / "a.gif", codec="gif", num_frames=2)
    data = bytearray(path.read_bytes())
    data[6:8] = (20000).to_bytes(2, "little")
    path.write_bytes(data)
    Image.new("L", (20000, 1)).save(tmp_path / "a.png")
    for wide in (path, tmp_path / "a.png"):
        with pytest.raises(DecodeError, match="frames of 20000x"):
            probe(wide)
        with pytest.raises(DecodeError, match="frames of 20000x"):
            decode_clip(wide, 1, 8, 16, 16)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (72, 128)])
def test_real_clips(real_clips, height, width):
    for path in real_clips:
        info = probe(path)
        assert info.num_frames >= 120 and 24 < info.fps < 30
        whole = decode_clip(path, 16, 8, height, width)
        assert whole.shape == (16, 3, height, width) and whole.float().std() > 10
        later = decode_clip(path, 4, 8, height, width, start=1.0)
        assert torch.equal(later, whole[8:12])
