"""HDR and wide-gamut frames become SDR of BT.709: against formulas written out pixel by pixel, in floats."""

import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from stdit.data.decoding import colors
from stdit.data.decoding.colors import HLG, PQ, SDR, WIDE
from stdit.data.decoding.decode import DecodeError, decode_clip, iter_frames, probe_kind
from stdit.data.decoding.pixels import FrameFitter, rgb

TOLERANCE = 1
"""Grey levels of 255 by which a pixel may differ from the reference."""
WHITE = 65280


def pq(light: float) -> float:
    """ST 2084, equation 5.2: cd/m2 to a value from 0 to 1."""
    y = (light / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def un_pq(value: float) -> float:
    v = value ** (1 / 78.84375)
    return 10000 * (max(v - 0.8359375, 0) / (18.8515625 - 18.6875 * v)) ** (1 / 0.1593017578125)


def un_hlg(value: float) -> float:
    return value**2 / 3 if value <= 0.5 else (math.exp((value - 0.55991073) / 0.17883277) + 0.28466892) / 12


def reference(pixel: list[float], color: str) -> list[float]:
    """Convert R'G'B' of BT.2020 from 0 to 1 to grey levels of BT.709."""
    if color == WIDE:
        linear = [value**2.4 for value in pixel]
    else:
        if color == PQ:
            light = [un_pq(value) for value in pixel]
        else:
            scene = [un_hlg(value) for value in pixel]
            luminance = 0.2627 * scene[0] + 0.6780 * scene[1] + 0.0593 * scene[2]
            light = [1000 * luminance**0.2 * value if luminance else 0.0 for value in scene]
        brightest = max(light)
        if brightest == 0:
            return [0.0, 0.0, 0.0]
        whole, top = pq(1000), pq(203) / pq(1000)
        knee, value = 1.5 * top - 0.5, min(1.0, pq(brightest) / pq(1000))
        if value > knee:  # BT.2390-8, the Hermite spline
            t = (value - knee) / (1 - knee)
            p = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee)
            value = p + (-2 * t**3 + 3 * t**2) * top
        linear = [one * un_pq(value * whole) / brightest / 203 for one in light]
    matrix = [  # BT.2407
        [1.660491, -0.587641, -0.072850],
        [-0.124550, 1.132900, -0.008349],
        [-0.018151, -0.100579, 1.118730],
    ]
    mixed = [sum(a * b for a, b in zip(row, linear, strict=True)) for row in matrix]
    return [255 * min(1.0, max(0.0, value)) ** (1 / 2.4) for value in mixed]


@pytest.mark.parametrize("color", [PQ, HLG, WIDE])
def test_pixels_are_those_of_the_reference(color: str) -> None:
    codes = np.random.default_rng(0).integers(0, WHITE + 1, (3, 20, 30)).astype(np.uint16)
    codes[:, 0] = codes[:1, 0]  # a row of greys
    codes[:, 1, :2] = [0, WHITE]
    if color != WIDE:
        codes[:, 2:6] //= 2  # dark colours, most of a picture
    made = colors.to_sdr(codes, color, colors.BT2020, WHITE)
    pixels = codes.reshape(3, -1).T / WHITE
    expected = np.array([reference(pixel, color) for pixel in pixels.tolist()]).T.reshape(codes.shape)
    assert np.abs(made - expected).max() <= TOLERANCE
    assert made[:, 1, :2].tolist() == [[0, 255]] * 3


def test_curves_have_the_published_values() -> None:
    """ST 2084 and BT.2408, tables 1 and 2: signal levels of 100, 203 and 1000 cd/m2."""
    for light, percent in ((100, 51), (203, 58), (1000, 75)):
        assert 100 * colors.light_to_pq(np.float64(light)) == pytest.approx(percent, abs=0.5)
        assert colors.pq_to_light(colors.light_to_pq(np.float64(light))) == pytest.approx(light)
    scene = colors.hlg_to_scene(np.array([[0.75]] * 3))[..., None]
    assert 1000 * (scene * scene.sum(0) ** 0.2)[0, 0] != 0
    grey = float(colors.hlg_to_scene(np.array(0.75)))
    assert 1000 * grey**1.2 == pytest.approx(203, rel=0.01)


def steps(color: str) -> tuple[np.ndarray, list[int]]:
    """Return 10-bit luma of grey steps, [48 64], and the grey levels that are expected."""
    values = [0.1, 0.3, 0.5, pq(203) if color == PQ else 0.75]
    luma = np.repeat(np.array([round(64 + 876 * value) for value in values], np.uint16), 16)
    levels = [round(reference([(round(64 + 876 * value) - 64) / 876] * 3, color)[0]) for value in values]
    return np.tile(luma, (48, 1)), levels


def hdr_video(path: Path, color: str, matrix: int = 9, count: int = 4) -> list[int]:
    """Write grey steps in 10 bits; return their grey levels in SDR."""
    luma, levels = steps(color)
    transfer = {PQ: 16, HLG: 18, WIDE: 1}[color]
    with av.open(path, "w") as container:
        stream = container.add_stream(
            "libx265", rate=8, options={"preset": "ultrafast", "x265-params": "log-level=none:lossless=1"}
        )
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p10le"
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace = 9, transfer, matrix
        for index in range(count):
            chroma = np.full(48 * 64 // 2, 512, np.uint16)
            frame = av.VideoFrame.from_ndarray(
                np.concatenate([luma.ravel(), chroma]).reshape(72, 64), format="yuv420p10le"
            )
            frame.colorspace, frame.color_trc, frame.color_primaries = matrix, transfer, 9
            frame.pts, frame.time_base = index, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return levels


@pytest.mark.parametrize("color", [PQ, HLG, WIDE])
def test_a_video_is_tone_mapped_whoever_reads_it(tmp_path: Path, color: str) -> None:
    levels = hdr_video(tmp_path / "a.mp4", color)
    assert probe_kind(tmp_path / "a.mp4")[1] == color
    clip = decode_clip(tmp_path / "a.mp4", 2, 8, 24, 32)
    for row in clip[1, :, 12, 4::8].tolist():
        assert np.abs(np.array(row) - levels).max() <= TOLERANCE
    (walked,) = [pixels for _, pixels in iter_frames(tmp_path / "a.mp4", 0.0, 0.1)]
    assert np.abs(walked[24, 8::16, 1].astype(int) - levels).max() <= TOLERANCE
    if color != WIDE:  # white of a page is white enough: it was 134 before
        assert levels[-1] == pytest.approx(230, abs=1)


def test_hdr_in_a_matrix_that_cannot_be_converted_says_so(tmp_path: Path) -> None:
    hdr_video(tmp_path / "a.mp4", PQ, matrix=14)
    for read in (probe_kind, lambda path: decode_clip(path, 1, 8, 24, 32)):
        with pytest.raises(DecodeError, match="its HDR is coded as ICtCp"):
            read(tmp_path / "a.mp4")


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p10le", "gbrp10le", "nv12"])
def test_any_format_of_hdr(pix_fmt: str) -> None:
    grey = np.full((32, 32, 3), round(65535 * 0.5), np.uint16)

    def frame() -> av.VideoFrame:
        made = av.VideoFrame.from_ndarray(grey, format="rgb48le").reformat(format=pix_fmt, dst_colorspace=9)
        made.color_trc, made.color_primaries = 16, 9
        made.colorspace = 0 if pix_fmt.startswith("gbr") else 9
        return made

    (level, *_) = reference([0.5] * 3, PQ)
    fitted = np.empty((3, 16, 16), np.uint8)
    FrameFitter(16, 16, (0.5, 0.5)).fit(frame(), 1.0, fitted)
    for pixels in (fitted, rgb(frame())):
        assert abs(pixels.mean() - level) <= 3  # 8 bits of PQ are coarse


def test_sdr_is_left_alone(real_clips: list[Path]) -> None:
    for path in real_clips:
        assert probe_kind(path)[1:] == (SDR, False)
