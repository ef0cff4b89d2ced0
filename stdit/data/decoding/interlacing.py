"""Find interlaced videos, by their content and their flags, and deinterlace them with FFmpeg's bwdif.

An interlaced frame holds two half pictures (fields), its even and its odd lines, of different moments, so that what
moves is combed. A file has one field order for all its windows: PROGRESSIVE, or which field is first in time.

Letters: H height, W width.
"""

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

import av
import numpy as np
from av.filter import Graph

from stdit.data.decoding.frames import TimedFrame, frames_in_order
from stdit.data.decoding.media import Media
from stdit.data.decoding.opening import DecodeError, NeedsSlowerRead, Video, open_clip

PROGRESSIVE, TOP_FIRST, BOTTOM_FIRST = "progressive", "tff", "bff"
FIELD_ORDERS = (PROGRESSIVE, TOP_FIRST, BOTTOM_FIRST)
"""Values of the column `field_order`."""

SAMPLES = (0.0, 0.2, 0.4, 0.6, 0.8)
"""Shares of a file's length at which its content is looked at."""
SAMPLE_FRAMES = 12
"""Consecutive frames of each sample."""
LEAST_FRAMES = 3
"""Interlaced frames that decide on a file."""
LEAST_SHARE = 0.1
"""Of the frames in which something moves: less than telecined films have (2 of 5)."""

TILE = 16
"""Lines and looked-at columns of a tile."""
CHECKED_COLUMNS = 96
"""About how many columns of a frame are looked at, for speed."""
COMBED = 1.5
"""How much more neighbouring lines differ in a combed tile than lines of the same field."""
NOISE = 3.0
"""Grey levels by which neighbouring lines of a combed tile differ at least, on average."""
PLANAR = ("yuv4", "yuvj4", "yuva4", "nv12")
"""How names of pixel formats begin whose first plane is luma."""
LEAST_TILES = 0.004
"""Share of combed tiles that makes a frame suspicious."""


class LooksInterlaced(Exception):
    """A frame looks interlaced: find the field order of its file."""


def looks_interlaced(frame: av.VideoFrame) -> bool:
    """Whether a frame is flagged as interlaced, or combed: then `find_field_order` decides."""
    return frame.interlaced_frame or is_combed(frame)


def is_combed(frame: av.VideoFrame) -> bool:
    """Whether lines resemble those of the same field more than their neighbours, somewhere in a frame of YCbCr.

    Also true for fine horizontal stripes, so that only `find_field_order`, which compares frames, decides.
    """
    luma = _luma(frame)
    if luma is None:
        return False
    height, width = (len(luma) - 2) // TILE * TILE, luma.shape[1] // TILE * TILE
    if height < TILE or not width:
        return False
    lines = luma[: height + 2, :width].astype(np.int16)
    near = _tiles(np.abs(lines[1:-1] - lines[:-2]))
    same_field = _tiles(np.abs(lines[2:] - lines[:-2]))
    return bool(np.mean((near > NOISE) & (near > COMBED * same_field)) >= LEAST_TILES)


def find_field_order(media: Media) -> str:
    """Return the field order of a file. Raises DecodeError if the file cannot be opened.

    The content decides if something moves in it: FFmpeg's idet compares the lines of neighbouring frames, of which
    those that look combed count as interlaced. Otherwise the flags of its frames decide.
    """
    try:
        return _find(media, media.state())
    except OSError as error:
        raise DecodeError(media, str(error)) from error


@lru_cache(maxsize=1024)
def _find(media: Media, state: tuple[int | str, ...]) -> str:
    kinds: Counter[str] = Counter()
    flagged = ""
    for share in SAMPLES:
        frames = _sample(media, share)
        kinds += Counter(_kinds(frames))
        flagged = flagged or next((order for frame in frames if (order := _flagged_order(frame))), "")
        if len(frames) < SAMPLE_FRAMES and share == 0:
            break  # the file is no longer than this
    first, second = sorted((TOP_FIRST, BOTTOM_FIRST), key=lambda order: -kinds[order])
    interlaced, moving = kinds[first] + kinds[second], sum(kinds.values())
    if kinds[first] >= LEAST_FRAMES and interlaced >= LEAST_SHARE * moving:
        return flagged if flagged and kinds[first] < 2 * kinds[second] else first
    return PROGRESSIVE if moving >= LEAST_FRAMES else flagged or PROGRESSIVE


def _sample(media: Media, share: float) -> list[av.VideoFrame]:
    """Return consecutive frames from a share of a video's length on; those that can be read."""
    frames: list[av.VideoFrame] = []
    try:
        with open_clip(media, quick=False) as opened:
            if isinstance(opened, Video):
                length = float((opened.stream.duration or 0) * (opened.stream.time_base or 0))
                length = length or (opened.container.duration or 0) / av.time_base
                for _, _, frame in frames_in_order(opened, share * length):
                    frames.append(frame)
                    if len(frames) == SAMPLE_FRAMES:
                        break
    except (NeedsSlowerRead, DecodeError):
        pass  # a place that cannot be sought or read says nothing; who needs its frames reports it
    return frames


def _kinds(frames: list[av.VideoFrame]) -> list[str]:
    """Return the field order of each frame in which something moves."""
    if len(frames) < 2 or frames[0].height % 2 or frames[0].height < TILE:
        return []
    graph = _graph(frames[0], ("idet",))
    judged = []
    form = frames[0].format.name
    for frame in [*(frame for frame in frames if frame.format.name == form), None]:
        for seen in _through(graph, frame):
            kind = seen.metadata.get("lavfi.idet.single.current_frame", "")
            if kind == PROGRESSIVE or (kind in FIELD_ORDERS and is_combed(seen)):
                judged.append(kind)
    return judged


def _flagged_order(frame: av.VideoFrame) -> str:
    """Return the field order that a frame's flags state; empty if it is not flagged as interlaced, or tiny."""
    if not frame.interlaced_frame or frame.height < TILE:
        return ""
    graph = _graph(frame, ("select", "eq(interlace_type\\,BOTTOMFIRST)"))
    bottom = [*_through(graph, frame), *_through(graph, None)]
    return BOTTOM_FIRST if bottom else TOP_FIRST


def deinterlaced(frames: Iterator[TimedFrame], order: str) -> Iterator[TimedFrame]:
    """Deinterlace consecutive (seconds, duration, frame), one frame for each.

    bwdif looks at the frame before and after; the first frame and the last lack one of them.
    """
    graph, kind, waiting = None, None, list[tuple[float, float]]()

    def finished(frame: av.VideoFrame | None) -> Iterator[TimedFrame]:
        assert graph is not None
        for made in _through(graph, frame):
            yield (*waiting.pop(0), made)

    for time, length, frame in frames:
        form = (frame.format.name, frame.width, frame.height)
        if form != kind:
            if graph is not None:
                yield from finished(None)
            graph, kind = _graph(frame, ("bwdif", f"mode=send_frame:parity={order}:deint=all")), form
        waiting.append((time, length))
        yield from finished(frame)
    if graph is not None:
        yield from finished(None)


def _graph(frame: av.VideoFrame, what: tuple[str, ...]) -> Graph:
    graph = Graph()
    if hasattr(graph, "threads"):
        graph.threads = 1
    nodes = [
        graph.add_buffer(
            width=frame.width,
            height=frame.height,
            format=frame.format,
            time_base=frame.time_base or Fraction(1, 1000),
        ),
        graph.add(*what),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*nodes).configure()
    return graph


def _through(graph: Graph, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
    """Put a frame, or the end of the video, into a graph, and yield the frames that come out."""
    graph.vpush(frame)
    while True:
        try:
            yield graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return


def _luma(frame: av.VideoFrame) -> np.ndarray | None:
    """View about CHECKED_COLUMNS columns of the luma plane, [H W]; None for other formats than YCbCr in planes."""
    form = frame.format
    if not form.name.startswith(PLANAR) or not form.is_planar:
        return None
    plane, depth = frame.planes[0], form.components[0].bits
    kind = np.dtype(np.uint8) if depth == 8 else np.dtype(">u2" if form.is_big_endian else "<u2")
    rows = np.ndarray((plane.height, plane.line_size // kind.itemsize), kind, plane)[:, : frame.width]
    rows = rows[:, :: max(1, frame.width // CHECKED_COLUMNS)]
    return rows if depth == 8 else rows >> (depth - 8)


def _tiles(values: np.ndarray) -> np.ndarray:
    """Return the mean of each tile of [H W], multiples of its size."""
    tiles = values.reshape(len(values) // TILE, TILE, -1, TILE)
    return tiles.mean(axis=(1, 3), dtype=np.float32)
