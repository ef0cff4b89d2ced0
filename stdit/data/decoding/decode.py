"""Probe and decode videos and images: frames of a temporal window, resized and cropped.

Letters: T frames, H height, W width. `opening` opens and checks files, `frames` selects the frames on screen at given
times (`pictures` those of images), `pixels` converts them to RGB of one size.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np
import torch
from PIL import Image

from stdit.data.decoding.colors import SDR, check_colors, color_of
from stdit.data.decoding.frames import ShownFrame, frames_through, select_by_frames, select_by_packets
from stdit.data.decoding.intact import is_hidden
from stdit.data.decoding.interlacing import (
    PROGRESSIVE,
    LooksInterlaced,
    deinterlaced,
    find_field_order,
    looks_interlaced,
)
from stdit.data.decoding.media import Media
from stdit.data.decoding.opening import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    DecodeError,
    NeedsSlowerRead,
    Video,
    check_frame_size,
    open_clip,
    pixel_aspect,
)
from stdit.data.decoding.packets import TimeOrderCheck, decodable_packets
from stdit.data.decoding.pictures import is_still, pictures_at, timed_pictures
from stdit.data.decoding.pixels import FrameFitter, fill, rgb, shrink, upright_rgb

__all__ = [
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "DecodeError",
    "VideoInfo",
    "decode_clip",
    "probe",
    "upright_rgb",
    "iter_frames",
]

# Share of the target interval by which a frame may come later than a target time and still count as shown then:
# containers round times to milliseconds, and clips of 29.97 fps may fill a bucket of 30 fps.
TOLERANCE = 0.1

CHECK_EVERY = 8
"""Of how many frames of a window one is checked for combing, if the field order of its file is not known."""

INSTANT = 1e-4
"""Seconds by which the time of a frame may differ after rounding in a manifest."""

_Select = Callable[[Video, list[float], float], Iterator[ShownFrame]]


class VideoInfo(NamedTuple):
    """Length, rate and size of a file; the size is after rotation, in square pixels."""

    num_frames: int
    fps: float
    """Mean rate in frames per second, so that num_frames / fps is the duration; 1.0 for an image."""
    height: int
    width: int


def probe(file: Media | Path) -> VideoInfo:
    """Return number of frames, rate and size of a video or image, from its packets and its first frame.

    Counts packets, since the header of a truncated file states too many frames. Raises DecodeError.
    """
    return probe_kind(file)[0]


def probe_kind(file: Media | Path) -> tuple[VideoInfo, str, bool]:
    """Return `probe`; and of the first frame its color (see `colors`), and whether it looks interlaced."""
    media = Media.of(file)
    for quick in (True, False):
        try:
            with open_clip(media, quick=quick) as opened:
                if isinstance(opened, Video):
                    return _probe_video(opened)
                return _probe_picture(opened), SDR, False
        except NeedsSlowerRead:
            continue
    raise AssertionError("the slow way raises no NeedsSlowerRead")


def decode_clip(
    file: Media | Path,
    num_frames: int,
    fps: float,
    height: int,
    width: int,
    start: float = 0.0,
    crop: Literal["center", "random"] | tuple[float, float] = "center",
    generator: torch.Generator | None = None,
    threads: int = 1,
    field_order: str = "",
) -> torch.Tensor:
    """Decode frames at start, start + 1/fps, ..., resized and cropped to height x width without distortion.

    Frame k is the one on screen at ``start + k / fps`` seconds after the first frame: the latest whose presentation
    time is not later. A still image is a video of one frame. HDR is tone-mapped, and interlaced video deinterlaced.

    Args:
        start: seconds; the decoder seeks to the key frame before it.
        crop: (vertical, horizontal) place of the crop, from 0 to 1; "center" is (0.5, 0.5), and "random" draws one
            place for all frames from `generator` (CPU).
        threads: decoder threads; use 1 inside loader workers.
        field_order: of the file, one of `interlacing.FIELD_ORDERS`; an empty string: find it if a frame looks
            interlaced.

    Returns: uint8 [T 3 H W].
    Raises DecodeError if the file is damaged, too large, or ends before the last frame.
    """
    media = Media.of(file)
    drawn = torch.rand(2, generator=generator).tolist() if crop == "random" else [0.5, 0.5]
    place = drawn if isinstance(crop, str) else list(crop)
    times, tolerance = [start + k / fps for k in range(num_frames)], TOLERANCE / fps
    clip = np.empty((num_frames, 3, height, width), np.uint8)  # copying small frames is faster with NumPy
    try:
        _decode_into(clip, media, times, tolerance, place, threads, field_order)
    except LooksInterlaced:
        _decode_into(clip, media, times, tolerance, place, threads, find_field_order(media))
    return torch.from_numpy(clip)


def _decode_into(
    clip: np.ndarray,
    media: Media,
    times: list[float],
    tolerance: float,
    place: list[float],
    threads: int,
    field_order: str,
) -> None:
    """Write the frames at `times` to `clip` [T 3 H W].

    Raises DecodeError; and LooksInterlaced, if no field order is given.
    """
    ways: tuple[_Select, ...] = (select_by_packets, select_by_frames, partial(select_by_frames, seek=False))
    if field_order not in ("", PROGRESSIVE):  # a deinterlaced frame needs its neighbours
        through = partial(deinterlaced, order=field_order)
        ways = tuple(partial(select_by_frames, seek=seek, through=through) for seek in (True, False))
    height, width = clip.shape[2:]
    for read in ways:
        try:
            with open_clip(media, threads, quick=read is select_by_packets) as opened:
                if isinstance(opened, Video):
                    opaque = opened.stream.codec_context.name == "gif"
                    fitter = FrameFitter(height, width, place, threads, opaque)
                    for number, (frame, places) in enumerate(read(opened, times, tolerance)):
                        if not field_order and number % CHECK_EVERY == 0 and looks_interlaced(frame):
                            raise LooksInterlaced
                        fitter.fit(frame, _shown_aspect(opened, frame), clip[places.start])
                        clip[places.start + 1 : places.stop] = clip[places.start]
                else:
                    for picture, places in pictures_at(media, opened, times, tolerance):
                        clip[places.start : places.stop] = fill(picture, 1.0, height, width, place).numpy()
            return
        except NeedsSlowerRead:
            continue
    raise AssertionError("reading from the start raises no NeedsSlowerRead")


def iter_frames(
    file: Media | Path,
    start: float = 0.0,
    end: float = math.inf,
    side: int | None = None,
    field_order: str = "",
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield all frames of a video from `start` to before `end` (seconds after the first frame).

    Args:
        field_order: as in `decode_clip`; it is found if it is not given.

    Yields: (seconds, RGB uint8 [H W 3]), upright, but pixels that are not square stay so; the longer side is at most
    `side` pixels. Raises DecodeError at the first damaged frame before `end`, after all frames before it.
    """
    media = Media.of(file)
    field_order = field_order or find_field_order(media)
    for seek in (True, False):
        passed = 0.0
        try:
            with open_clip(media, quick=False) as opened:
                for time, length, picture in _timed(opened, start if seek else 0.0, side, field_order):
                    if time >= end - INSTANT:
                        return
                    if time >= start - INSTANT:
                        yield time, picture()
                    passed = time + length
            return
        except NeedsSlowerRead:
            continue
        except DecodeError:
            if passed < end - INSTANT:
                raise
            return  # what is damaged comes after the end


def _timed(
    opened: Video | Image.Image, start: float, side: int | None, field_order: str
) -> Iterator[tuple[float, float, Callable[[], np.ndarray]]]:
    """Yield (seconds, duration, function that makes the picture) of all frames from `start`, or from before it."""
    if isinstance(opened, Video):
        through = None if field_order == PROGRESSIVE else partial(deinterlaced, order=field_order)
        for time, length, frame in frames_through(opened, start, through):
            yield time, length, partial(rgb, frame, side=side)
    else:
        for time, length, pixels in timed_pictures(opened):
            yield time, length, partial(shrink, pixels, side)


def _probe_video(video: Video) -> tuple[VideoInfo, str, bool]:
    tick, rate = float(video.stream.time_base or 0), float(video.stream.average_rate or 0) or 1.0
    count, untimed, first, frame = 0, 0, None, None
    last, length, forward = None, 0, TimeOrderCheck(video.media)
    for packet in decodable_packets(video.container.demux(video.stream)):
        if frame is None:
            frame = next(iter(packet.decode()), None)
        if is_hidden(packet) or packet.is_corrupt:  # cut off by the end of the file
            continue
        count += 1
        pts = packet.dts if packet.pts is None else packet.pts
        if pts is None:
            untimed += 1
        else:
            forward.check(pts * tick)
            first = pts if first is None else min(first, pts)
            if last is None or pts >= last:
                last, length = pts, packet.duration or 0
    frame = frame or next(iter(video.stream.codec_context.decode(None)), None)
    if frame is None:
        raise DecodeError(video.media, "holds no frame that can be decoded")
    check_frame_size(video.media, frame.width, frame.height)
    check_colors(video.media, frame)
    if 0 < untimed < count:
        raise DecodeError(video.media, f"{untimed} of its {count} frames have no time")
    seconds = (last - first) * tick if first is not None and last is not None else 0.0
    if length:
        seconds += length * tick
    elif count > 1:
        seconds *= count / (count - 1)
    height, width = frame.height, max(1, round(frame.width * pixel_aspect(video)))
    if frame.rotation % 180:
        height, width = width, height
    info = VideoInfo(count, count / seconds if seconds > 0 else rate, height, width)
    return info, color_of(frame), looks_interlaced(frame)


def _probe_picture(image: Image.Image) -> VideoInfo:
    if is_still(image):
        upright = upright_rgb(image)
        return VideoInfo(1, 1.0, upright.height, upright.width)
    count, seconds, shape = 0, 0.0, (0, 0)
    for time, length, pixels in timed_pictures(image):
        count, seconds, shape = count + 1, time + length, pixels.shape[:2]
    return VideoInfo(count, count / seconds, *shape)


def _shown_aspect(video: Video, frame: av.VideoFrame) -> float:
    """Return width / height of a pixel after rotation."""
    aspect = pixel_aspect(video)
    return 1 / aspect if frame.rotation % 180 else aspect
