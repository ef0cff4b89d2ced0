"""Convert decoded frames and pictures to uint8 RGB of one size: upright, opaque, cropped, without distortion."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.filter import Graph
from av.sidedata.sidedata import Type
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from stdit.data.decoding.colors import BT2020, SDR, color_of, to_sdr, white_of

WHITE = 255
"""Grey level behind transparent pixels, as on most web pages."""

# Options of FFmpeg's scaler: an antialiasing bicubic kernel, the same as that of `fill`.
SCALE_FLAGS = "flags=bicubic:param0=0:param1=0.5"
MAX_REDUCTION = 64
"""Largest reduction for which the scaler's coefficients are fine enough."""

MAX_GRAPHS = 8

UNSPECIFIED = 2
"""FFmpeg's number for colour matrices, transfers and primaries that are not stated."""
MATRICES = {0: 0, 1: 1, 4: 4, 5: 5, 6: 6, 7: 7, 8: 8, 9: 9, 10: 9}
"""Colour matrices that the scaler supports (it refuses 8, YCgCo); reserved numbers count as not stated."""

PLANES = (2, 0, 1)
"""Planes of red, green and blue in the format gbrp."""


class Region(NamedTuple):
    """A part of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int


class _Graphs(threading.local):
    """Recently used FFmpeg filter graphs of this thread, since a new one takes as long as some small frames."""

    def __init__(self) -> None:
        self.graphs: OrderedDict[tuple, Graph] = OrderedDict()

    def of(self, kind: tuple, set_up: Callable[[], Graph]) -> Graph:
        graph = self.graphs.pop(kind, None) or set_up()
        self.graphs[kind] = graph
        if len(self.graphs) > MAX_GRAPHS:
            self.graphs.popitem(last=False)
        return graph


_GRAPHS = _Graphs()


class FrameFitter:
    """Converts decoded frames to uint8 [3 H W] of one size; holds the filter graph for the current kind of frame."""

    def __init__(
        self, height: int, width: int, place: Sequence[float], threads: int = 1, opaque: bool = False
    ) -> None:
        """
        Args:
            place: see `fill`.
            opaque: ignore alpha, since transparent pixels are white already.
        """
        self.height, self.width, self.place, self.threads, self.opaque = height, width, place, threads, opaque
        self._kind: tuple | None = None
        self._graph: Graph | None = None

    def fit(self, frame: av.VideoFrame, aspect: float, out: np.ndarray) -> None:
        """Write the frame to `out`, uint8 [3 H W]: by one pass of FFmpeg's scaler if possible, otherwise by `fill`.

        Compared with exact colours, scaled in floating point, pixels of real clips are off by 0.5 to 1.1 levels of
        255 on average; those of `fill` by 0.6 to 1.3, since it takes colours from the nearest chroma sample.
        """
        plain = self.opaque or not has_alpha(frame.format.name)
        if not (plain and self.scale(frame, aspect, *orientation(frame), out)):
            out[:] = fill(rgb(frame, self.threads), aspect, self.height, self.width, self.place).numpy()

    def scale(self, frame: av.VideoFrame, aspect: float, turns: int, mirrored: bool, out: np.ndarray) -> bool:
        """Scale in one pass for this `orientation`; return False, and write nothing, if `fill` is better."""
        color, primaries = color_of(frame), frame.color_primaries
        kind = (frame.format.name, frame.height, frame.width, aspect, turns, mirrored, color == SDR)
        if kind != self._kind:
            self._kind, self._graph = kind, self._set_up(frame, aspect, turns, mirrored)
        if self._graph is None:
            return False
        try:
            self._graph.vpush(with_known_colours(frame))
            scaled = self._graph.vpull()
        except BaseException:
            _GRAPHS.graphs.clear()  # a graph may still hold a frame
            raise
        planes = scaled.planes  # a new tuple at each access
        if color == SDR:
            picture = [_rows(planes[plane])[:, : scaled.width] for plane in PLANES]
        else:
            codes = [_rows(planes[plane]).view(np.uint16)[:, : scaled.width] for plane in PLANES]
            picture = list(to_sdr(np.stack(codes), color, primaries, white_of(frame)))
        for pixels, rows in zip(out, picture, strict=True):
            pixels[:] = np.rot90(rows[:, ::-1] if mirrored else rows, turns) if turns or mirrored else rows
        return True

    def _set_up(self, frame: av.VideoFrame, aspect: float, turns: int, mirrored: bool) -> Graph | None:
        down, across = self.place
        for _ in range(turns):
            down, across = across, 1 - down
        across = 1 - across if mirrored else across
        height, width = (self.width, self.height) if turns % 2 else (self.height, self.width)
        pixel_aspect = 1 / aspect if turns % 2 else aspect
        region = largest_region(frame.height, frame.width, width / height / pixel_aspect, (down, across))
        if max(region.height / height, region.width / width) > MAX_REDUCTION:
            return None
        form = "gbrp" if color_of(frame) == SDR else "gbrp16le"
        kind = (frame.format.name, frame.height, frame.width, region, height, width, form, self.threads)
        return _GRAPHS.of(kind, lambda: self._new_graph(frame, region, height, width, form))

    def _new_graph(self, frame: av.VideoFrame, region: Region, height: int, width: int, form: str) -> Graph:
        graph = Graph()
        if hasattr(graph, "threads"):  # a newer PyAV
            graph.threads = self.threads
        nodes = [
            graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
            )
        ]
        if (region.height, region.width) != (frame.height, frame.width):
            # A crop between two chroma samples would shift the colours.
            grid_x, grid_y = 4 // frame.format.chroma_width(4), 4 // frame.format.chroma_height(4)
            top, left = region.top // grid_y * grid_y, region.left // grid_x * grid_x
            nodes.append(graph.add("crop", f"{region.width}:{region.height}:{left}:{top}:exact=1"))
        nodes.append(graph.add("scale", f"{width}:{height}:{SCALE_FLAGS}"))
        nodes += [graph.add("format", form), graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        return graph


@cache
def has_alpha(pixel_format: str) -> bool:
    """Whether a pixel format of FFmpeg has alpha."""
    return any(component.is_alpha for component in av.VideoFormat(pixel_format).components)


def rgb(frame: av.VideoFrame, threads: int = 1, side: int | None = None) -> np.ndarray:
    """Convert a frame to upright RGB uint8 [H W 3], the longer side at most `side`; rows may be strided."""
    alpha, color, primaries = has_alpha(frame.format.name), color_of(frame), frame.color_primaries
    layout, channels = ("rgba", 4) if alpha else ("rgb24", 3)
    kind: np.dtype[Any] = np.dtype(np.uint8)
    if color != SDR:
        layout, kind = ("rgba64le", np.dtype("<u2")) if alpha else ("rgb48le", np.dtype("<u2"))
    height, width = _at_most(frame.height, frame.width, side)
    # Unless told otherwise, PyAV starts threads for each frame: most of the time of a small clip.
    converted = VideoReformatter().reformat(
        with_known_colours(frame), format=layout, height=height, width=width, threads=threads
    )
    rows = _rows(converted.planes[0]).view(kind)[:, : converted.width * channels]
    pixels = rows.reshape(converted.height, converted.width, channels)
    if color != SDR:
        sdr = to_sdr(pixels[..., :3].transpose(2, 0, 1), color, primaries, white_of(frame)).transpose(1, 2, 0)
        pixels = np.concatenate([sdr, (pixels[..., 3:] >> 8).astype(np.uint8)], axis=2)
    turns, mirrored = orientation(frame)
    opaque = _over_white(pixels) if alpha else pixels
    return np.rot90(opaque[:, ::-1] if mirrored else opaque, turns)


def orientation(frame: av.VideoFrame) -> tuple[int, bool]:
    """Return (quarter turns counter-clockwise, whether to mirror first) that make a frame upright."""
    turns = round(frame.rotation / 90)
    matrix = frame.side_data.get(Type.DISPLAYMATRIX) if frame.side_data else None  # rare
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
        if a * d < b * c:  # mirroring reverses the first row, which gives the angle
            return (turns + 2) % 4, True
    return turns % 4, False


def with_known_colours(frame: av.VideoFrame) -> av.VideoFrame:
    """Replace colour properties that the scaler refuses, in place; it ignores transfer curves (see `colors`)."""
    unstated = BT2020 if color_of(frame) != SDR else UNSPECIFIED
    frame.colorspace = MATRICES.get(frame.colorspace, unstated)
    frame.color_trc = frame.color_primaries = UNSPECIFIED
    return frame


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to upright RGB. 16-bit grey keeps its upper 8 bits; Pillow would clip values at 255."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, (WHITE, WHITE, WHITE, 255))
        image = Image.alpha_composite(opaque, image.convert("RGBA"))
    return image.convert("RGB")


def largest_region(height: int, width: int, aspect: float, place: Sequence[float]) -> Region:
    """Return the largest region with an aspect (width / height, in pixels) of a frame; `place` as in `fill`."""
    cut_height = min(height, max(1, round(width / aspect)))
    cut_width = min(width, max(1, round(height * aspect)))
    return Region(
        round(place[0] * (height - cut_height)), round(place[1] * (width - cut_width)), cut_height, cut_width
    )


def fill(
    pixels: np.ndarray, pixel_aspect: float, height: int, width: int, place: Sequence[float]
) -> torch.Tensor:
    """Crop the largest region of the target's aspect from [H W 3] and resize it, antialiased: uint8 [3 H W].

    Args:
        place: (vertical, horizontal) place of the crop, from 0 to 1.
    """
    source_height, source_width = pixels.shape[:2]
    top, left, cut_height, cut_width = largest_region(
        source_height, source_width, width / height / pixel_aspect, place
    )
    region = torch.from_numpy(np.ascontiguousarray(pixels[top : top + cut_height, left : left + cut_width]))
    image = region.permute(2, 0, 1)[None]  # [1 3 H W]
    if image.shape[2:] != (height, width):
        image = F.interpolate(image, size=(height, width), mode="bicubic", antialias=True)
    return image[0]


def shrink(pixels: np.ndarray, side: int | None) -> np.ndarray:
    """Resize [H W 3] to a longer side of at most `side`."""
    height, width = _at_most(pixels.shape[0], pixels.shape[1], side)
    if (height, width) == pixels.shape[:2]:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def _at_most(height: int, width: int, side: int | None) -> tuple[int, int]:
    scale = min(1.0, (side or max(height, width)) / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _rows(plane: Any) -> np.ndarray:
    """View a plane as uint8 [H, bytes per row], whose last bytes may be padding."""
    return np.ndarray((plane.height, plane.line_size), np.uint8, plane)


def _over_white(pixels: np.ndarray) -> np.ndarray:
    """Blend RGBA [H W 4] over white: [H W 3]."""
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    if alpha.min() == 255:
        return colour
    share = alpha.astype(np.uint16)
    return ((colour * share + WHITE * (255 - share) + 127) // 255).astype(np.uint8)
