"""Pixels: formats, colours, transparency, sizes; the two ways to RGB agree."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from stdit.data.decoding.decode import decode_clip, probe
from stdit.data.decoding.pixels import FrameFitter, fill, largest_region, rgb


def smooth(height: int, width: int) -> np.ndarray:
    """A picture without fine detail, in all colours: uint8 [H W 3]."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [np.sin(x / 17 + 1), np.cos(y / 13), np.sin((x + 2 * y) / 29)]
    return (127.5 + 110 * np.stack(channels, -1)).astype(np.uint8)


def exact(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resized in floating point, antialiased: [3 H W]."""
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
    return F.interpolate(image, size=(height, width), mode="bicubic", antialias=True)[0].clamp(0, 255).numpy()


def fitted(size: tuple[int, int], frame: av.VideoFrame, aspect: float = 1.0) -> np.ndarray:
    out = np.empty((3, *size), np.uint8)
    FrameFitter(*size, (0.5, 0.5)).fit(frame, aspect, out)
    return out


def off(a: torch.Tensor | np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(np.asarray(a, np.float32) - b).mean())


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("b.mp4", "libx264", "yuv420p10le"),
        ("c.mp4", "libx264", "yuv444p"),
        ("d.mp4", "libx264", "yuv422p10le"),
        ("e.mp4", "libx265", "yuv420p10le"),
        ("f.mkv", "ffv1", "gray"),
        ("g.mkv", "ffv1", "bgr0"),
        ("h.mkv", "ffv1", "yuva420p"),
        ("i.mkv", "ffv1", "gbrp10le"),
        ("j.mov", "prores_ks", "yuva444p10le"),
        ("k.mkv", "mjpeg", "yuvj420p"),
        ("l.webm", "libvpx-vp9", "yuv444p"),
        ("m.mkv", "ffv1", "yuv411p"),
        ("n.mkv", "ffv1", "gray16le"),
        ("o.avi", "huffyuv", "yuv422p"),
    ],
)
def test_pixel_formats(tmp_path, write_video, name, codec, pix_fmt):
    picture = smooth(96, 128)
    options = {
        "libx264": {"crf": "4"},
        "libx265": {"crf": "4", "x265-params": "log-level=none"},
        "libvpx-vp9": {"crf": "4", "b": "0", "deadline": "realtime", "cpu-used": "8"},
        "mjpeg": {"qmax": "2"},
    }.get(codec, {})
    # Eight frames: of two, x265 now and then makes a stream that cannot be written.
    path = write_video(
        tmp_path / name, frames=picture[None].repeat(8, 0), codec=codec, options=options, pix_fmt=pix_fmt
    )
    video = decode_clip(path, 1, 8, 48, 64)[0]
    expected = exact(picture, 48, 64)
    if pix_fmt.startswith("gray"):
        expected = np.broadcast_to(np.tensordot([0.299, 0.587, 0.114], expected, 1), expected.shape)
    assert off(video, expected) < 3


@pytest.mark.parametrize("size", [(240, 426), (144, 256), (90, 90), (720, 300), (36, 54)])
def test_scaling_in_one_step_is_as_good_as_the_antialiased_resize(real_clips, size):
    """Against exact colours scaled in floating point: about a level off on average, about as `fill`."""
    for clip in real_clips:
        with av.open(clip) as container:
            frame = next(container.decode(video=0))
        colours = frame.reformat(format="gbrpf32le", interpolation="BICUBIC")
        planes = [np.frombuffer(colours.planes[k], np.float32).reshape(frame.height, -1) for k in (2, 0, 1)]
        truth = 255 * np.stack([plane[:, : frame.width] for plane in planes], -1)
        top, left, height, width = largest_region(frame.height, frame.width, size[1] / size[0], (0.5, 0.5))
        if size[0] > height or size[1] > width:
            continue
        # In whole pixels of colour, of which there are half as many
        even = exact(truth[top // 2 * 2 :, left // 2 * 2 :][:height, :width], *size)
        one_step = off(fitted(size, frame), even)
        two_steps = off(
            fill(rgb(frame), 1.0, *size, (0.5, 0.5)),
            exact(truth[top : top + height, left : left + width], *size),
        )
        assert one_step < (1.2 if size[0] < height else 1.5) and one_step < two_steps + 0.25


LUMA = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}
"""Shares of red and blue in the brightness, by colour matrix (ITU-R BT.709, BT.601 twice, BT.2020)."""


def coded(picture: np.ndarray, matrix: int, full: bool) -> av.VideoFrame:
    """A picture in YCbCr by the definition, without FFmpeg: PyAV 17 does not encode BT.2020."""
    red, green, blue = np.moveaxis(picture.astype(np.float64), -1, 0)
    kr, kb = LUMA[matrix]
    y = kr * red + (1 - kr - kb) * green + kb * blue
    cb, cr = (blue - y) / (2 - 2 * kb), (red - y) / (2 - 2 * kr)
    planes = (
        [y, 128 + cb, 128 + cr] if full else [16 + y * 219 / 255, 128 + cb * 224 / 255, 128 + cr * 224 / 255]
    )
    frame = av.VideoFrame.from_ndarray(
        np.stack(planes).round().clip(0, 255).astype(np.uint8), format="yuv444p"
    )
    frame.colorspace, frame.color_range = matrix, 2 if full else 1
    return frame


@pytest.mark.parametrize("matrix", [1, 5, 6, 9])
@pytest.mark.parametrize("full", [False, True])
def test_colour_matrix_and_range_are_those_stated(matrix, full):
    frame = coded(smooth(64, 96), matrix, full)
    assert off(fitted((32, 48), frame), exact(smooth(64, 96), 32, 48)) < 1.5


def test_reserved_colours_count_as_not_stated():
    frame = av.VideoFrame.from_ndarray(smooth(64, 96), format="rgb24").reformat(format="yuv444p")
    frame.colorspace = frame.color_trc = frame.color_primaries = 3
    for pixels in (
        fitted((64, 96), frame),
        fill(rgb(frame), 1.0, 64, 96, (0.5, 0.5)),
    ):
        assert off(pixels, exact(smooth(64, 96), 64, 96)) < 1.5


def test_transparent_pixels_show_white(tmp_path):
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, 16:] = (200, 100, 0, 255)
    pixels[:8, 16:, 3] = 128
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "a.webp", lossless=True)
    with av.open(tmp_path / "a.mkv", "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "bgra"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        container.mux(stream.encode())
    for name in ("a.png", "a.webp", "a.mkv"):
        frame = decode_clip(tmp_path / name, 1, 8, 32, 32)[0]
        assert (frame[:, 20, 4] == 255).all()
        assert (frame[:, 20, 24] - torch.tensor([200, 100, 0])).abs().max() <= 1
        assert (frame[:, 4, 24].int() - torch.tensor([227, 177, 127])).abs().max() <= 2


def test_transparent_gif_shows_white(tmp_path):
    frames = [Image.new("P", (32, 32), 0) for _ in range(3)]
    for index, frame in enumerate(frames):
        frame.putpalette([0, 255, 0, 255, 0, 0] + [0] * 762)
        frame.paste(1, (8 * index, 0, 8 * index + 8, 32))
    frames[0].save(
        tmp_path / "a.gif", save_all=True, append_images=frames[1:], transparency=0, disposal=2, duration=100
    )
    video = decode_clip(tmp_path / "a.gif", 3, 10, 32, 32)
    for index in range(3):
        assert (video[index, :, 16, 8 * index + 4] == torch.tensor([255, 0, 0])).all()
        assert (video[index, :, 16, 30] == 255).all()


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_rotated_crops_lie_where_upright_ones_would(turns):
    """The one-step way crops before it turns; `fill` turns first. Places count in the upright picture."""
    frame = av.VideoFrame.from_ndarray(smooth(80, 120), format="rgb24").reformat(format="yuv444p")
    upright = np.rot90(rgb(frame), turns)
    for place in ((0.0, 0.0), (1.0, 0.2), (0.25, 1.0)):
        for size in ((40, 40), (30, 80), (80, 24)):
            turned = np.empty((3, *size), np.uint8)
            assert FrameFitter(*size, place).scale(frame, 1.0, turns, False, turned)
            assert off(turned, fill(upright, 1.0, *size, place).numpy()) < 2.5


def test_pixels_that_are_not_square(tmp_path):
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[16:48, 16:48] = 255  # a square of samples: twice as wide as high when shown
    path = tmp_path / "a.mkv"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    info = probe(path)
    assert (info.height, info.width) == (64, 128)
    shown = decode_clip(path, 1, 8, 64, 128)[0, 0] > 128
    assert (int(shown.any(1).sum()), int(shown.any(0).sum())) == (32, 64)
    middle = decode_clip(path, 1, 8, 64, 64)[0, 0] > 128
    assert (int(middle.any(1).sum()), int(middle.any(0).sum())) == (32, 64)


@pytest.mark.parametrize("size", [(1, 1), (33, 47), (2, 301), (16, 5)])
def test_odd_sizes(tmp_path, write_video, size):
    picture = np.broadcast_to(np.array([200, 100, 50], np.uint8), (2, *size, 3))
    path = write_video(tmp_path / "a.mkv", frames=picture, codec="ffv1")
    assert probe(path)[2:] == size
    for target in ((32, 32), (7, 9), (1, 1)):
        video = decode_clip(path, 2, 8, *target)
        assert video.shape == (2, 3, *target)
        assert off(video[1], np.broadcast_to([[[200.0]], [[100.0]], [[50.0]]], (3, *target))) < 3


def test_a_frame_much_larger_than_its_target():
    frame = av.VideoFrame.from_ndarray(np.full((64, 8192, 3), 77, np.uint8), format="rgb24")
    frame = frame.reformat(format="yuv420p")
    assert off(fitted((1, 32), frame, 4.0), np.full((3, 1, 32), 77.0)) <= 1
