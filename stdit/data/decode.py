"""From a file to frames: look at the header, seek, choose frames by presentation time, resize and crop.

Letters: T frames, H height, W width. Files are untrusted: only the demuxers of `FORMATS` may open them (a
text file that names other files is not one of them), only local files are read, and sizes are checked in the
header before a frame is decoded.
"""

import contextlib
import errno
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import av
import av.container
import numpy as np
import torch
import torch.nn.functional as F
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from stdit.data.config import LARGEST
from stdit.data.media import Media, MediaError

FORMATS = "mov,mp4,matroska,webm,avi,gif,mpegts,mpeg,flv,ogg,asf,ivf"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".ts", ".mpg", ".mpeg", ".flv"}
)
MAX_PIXELS = 8192 * 8192

# A frame counts as shown at a target time that it misses by less than this share of the target interval:
# containers round times to milliseconds, and 29.97 fps is meant to serve a target of 30.
TOLERANCE = 0.1

INSTANT = 1e-4
"""Seconds by which the times of one frame may differ, once rounded to what a manifest holds."""

# The first packets of a stream, in decoding order, that may hold its earliest frame.
REORDER_DEPTH = 16


class DecodeError(ValueError):
    """A file that cannot be used; the message is the path and the reason."""

    def __init__(self, path: Media | Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return DecodeError, (self.path, self.reason)


class VideoInfo(NamedTuple):
    """What a file holds. Sizes are those shown: after rotation, with square pixels."""

    num_frames: int
    fps: float
    """Mean rate in frames per second, so that num_frames / fps is the duration; 1.0 for an image."""
    height: int
    width: int


def is_image(media: Media) -> bool:
    return media.suffix in IMAGE_SUFFIXES


def probe(file: Media | Path) -> VideoInfo:
    """Frames, rate and size of a video or image, from its packets and its first frame.

    Counts packets instead of believing the header, which promises too much for a truncated file.
    Raises DecodeError.
    """
    media = Media.of(file)
    if is_image(media):
        with _open_image(media) as image:
            return VideoInfo(1, 1.0, image.height, image.width)
    with _open_video(media) as (container, stream):
        packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
        ticks = sorted(tick for p in packets if (tick := p.dts if p.pts is None else p.pts) is not None)
        nominal = float(stream.average_rate or 0) or 1.0
        seconds = float((ticks[-1] - ticks[0]) * stream.time_base) if ticks and stream.time_base else 0.0
        last = next((p.duration for p in packets if p.pts == ticks[-1] and p.duration), 0) if ticks else 0
        if last and stream.time_base:
            seconds += float(last * stream.time_base)
        elif len(packets) > 1:
            seconds *= len(packets) / (len(packets) - 1)
        fps = len(packets) / seconds if seconds > 0 else nominal
    with _open_video(media) as (container, stream):
        frame = next((frame for _, frame in _decode(media, container, stream, start=0.0)), None)
        if frame is None:
            raise DecodeError(media, "holds no frame that can be decoded")
        height, width = frame.height, round(frame.width * _pixel_aspect(stream))
        if frame.rotation % 180:
            height, width = width, height
    return VideoInfo(len(packets), fps, height, width)


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
) -> torch.Tensor:
    """Frames at start, start + 1/fps, ... of one file, resized and cropped to fill height x width
    undistorted.

    Frame k is the one on screen at ``start + k / fps`` seconds after the first: the latest that is not later,
    by presentation time. An image is a video of one frame.

    Args:
        start: seconds; the decoder seeks to the key frame before it.
        crop: where the part lies in what is cut off, down and across from 0 to 1; "center" is (0.5, 0.5), and
            "random" draws one place for all frames from `generator` (CPU).
        threads: of the decoder; 1 is right inside loader workers.

    Returns: uint8 [T 3 H W].
    Raises DecodeError when the file is damaged, too large, or ends before the last frame asked for.
    """
    media = Media.of(file)
    drawn = torch.rand(2, generator=generator).tolist() if crop == "random" else [0.5, 0.5]
    place = drawn if isinstance(crop, str) else list(crop)
    if is_image(media):
        if num_frames != 1:
            raise DecodeError(media, f"an image has one frame, not {num_frames}")
        with _open_image(media) as image:
            pixels = np.array(image)
        return _fill(pixels, 1.0, height, width, place)[None]  # [1 3 H W]

    times = [start + k / fps for k in range(num_frames)]
    for seek in (True, False) if start > 0 else (False,):
        with _open_video(media, threads) as (container, stream):
            frames = _decode(media, container, stream, start=start if seek else 0.0)
            chosen = _choose(media, frames, times, TOLERANCE / fps, must_precede=seek, stream=stream)
            aspect, clip, previous, reformatter = _pixel_aspect(stream), [], None, VideoReformatter()
            for frame in chosen:
                if frame is not previous:
                    pixels, sideways = _upright(frame, reformatter, threads), frame.rotation % 180
                    fitted = _fill(pixels, 1 / aspect if sideways else aspect, height, width, place)
                    previous = frame
                clip.append(fitted)
        if clip:
            return torch.stack(clip)
    raise DecodeError(media, "holds no frame that can be decoded")


def walk(
    file: Media | Path, start: float = 0.0, end: float = math.inf, side: int | None = None
) -> Iterator[tuple[float, np.ndarray]]:
    """Every frame of a video from `start` on and before `end`, in seconds after the first, one at a time.

    Yields: (seconds, RGB uint8 [H W 3]), as shown but for the shape of pixels; the longer side is at most `side`.
    Raises DecodeError.
    """
    media, reformatter = Media.of(file), VideoReformatter()
    for seek in (True, False) if start > 0 else (False,):
        with _open_video(media) as (container, stream):
            frames = _decode(media, container, stream, start=start if seek else 0.0)
            first = next(frames, None)
            if seek and (first is None or first[0] > start):
                continue  # seeking went too far
            for time, frame in frames if first is None else itertools.chain([first], frames):
                if time >= end - INSTANT:
                    return
                if time >= start - INSTANT:
                    scale = min(1.0, (side or math.inf) / max(frame.height, frame.width))
                    size = {n: max(1, round(getattr(frame, n) * scale)) for n in ("height", "width")}
                    yield time, _upright(frame, reformatter, 1, **size)
            return


def _choose(
    media: Media,
    frames: Iterator[tuple[float, av.VideoFrame]],
    times: list[float],
    tolerance: float,
    must_precede: bool,
    stream: VideoStream,
) -> Iterator[av.VideoFrame]:
    """For each time the latest frame not after it. Yields nothing if `must_precede` and seeking went too
    far."""
    shown, shown_at, count, k = None, 0.0, 0, 0
    for time, frame in frames:
        if shown is None and must_precede and time > times[0] + tolerance:
            return
        while shown is not None and k < len(times) and times[k] + tolerance < time:
            yield shown
            k += 1
        if k == len(times):
            return
        shown, shown_at, count = frame, time, count + 1
    if shown is None:
        return
    rate = float(stream.average_rate or 0)
    length = float((shown.duration or 0) * (shown.time_base or 0)) or (1 / rate if rate else 0.0)
    for time in times[k:]:
        if time > shown_at + tolerance and time > shown_at + length - tolerance:
            raise DecodeError(
                media, f"lasts {shown_at + length:.3f} s, but a frame is needed at {times[-1]:.3f} s"
            )
        yield shown


@contextlib.contextmanager
def _open_video(media: Media, threads: int = 1) -> Iterator[tuple[av.container.InputContainer, VideoStream]]:
    """The file and its first video stream, checked; turns every error of FFmpeg inside the block into
    DecodeError."""
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    try:
        with media.opened() as file, av.open(file, options=options) as container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise DecodeError(media, "has no video stream")
            stream = streams[0]
            _check_size(media, stream.width, stream.height)
            context = stream.codec_context
            context.options = {"max_pixels": str(MAX_PIXELS)}
            context.thread_count, context.thread_type = threads, "AUTO" if threads > 1 else "NONE"
            yield container, stream
    except av.FFmpegError as error:
        if error.errno == errno.EINVAL:  # what the whitelist of formats answers
            raise DecodeError(media, "not a video in a format that is read here, or damaged") from error
        raise DecodeError(media, f"not a readable video, or damaged ({error.strerror})") from error
    except OSError as error:
        raise DecodeError(media, error.strerror or str(error)) from error


@contextlib.contextmanager
def _open_image(media: Media) -> Iterator[Image.Image]:
    """The image in RGB, upright; its size is checked before its pixels are read."""
    try:
        with media.opened() as file, Image.open(file, formats=["PNG", "JPEG", "WEBP", "BMP"]) as image:
            _check_size(media, image.width, image.height)
            yield upright_rgb(image)
    except MediaError as error:
        raise DecodeError(media, str(error)) from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DecodeError(media, f"not a readable image, or damaged ({error})") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture as it is shown. Of 16 bits of grey the upper 8 count, where Pillow would cut values off at 255."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _check_size(media: Media, width: int, height: int) -> None:
    if not (0 < width <= LARGEST and 0 < height <= LARGEST and width * height <= MAX_PIXELS):
        raise DecodeError(
            media,
            f"frames of {width}x{height} pixels; at most {LARGEST} a side and {MAX_PIXELS} in all are read",
        )


def _decode(
    media: Media, container: av.container.InputContainer, stream: VideoStream, start: float
) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds since the first frame, frame) in order of presentation, from the key frame before `start`."""
    packets = container.demux(stream)
    head = list(itertools.islice(packets, REORDER_DEPTH))
    ticks = [p.pts for p in head if p.pts is not None and not p.is_discard]
    origin = min(ticks) if ticks else stream.start_time or 0
    tick = float(stream.time_base or 0)
    rate = float(stream.average_rate or 0) or 1.0
    counted = (
        container.format.name == "avi" or not tick
    )  # AVI has a constant rate, and wrong times for B-frames
    if start > 0 and not counted:
        with contextlib.suppress(av.FFmpegError):
            container.seek(origin + int(start / tick), stream=stream)
            packets, head = container.demux(stream), []
    time = 0.0
    for index, frame in enumerate(f for packet in itertools.chain(head, packets) for f in packet.decode()):
        assert isinstance(frame, av.VideoFrame)
        _check_size(media, frame.width, frame.height)
        if counted:
            time = index / rate
        else:
            time = (frame.pts - origin) * tick if frame.pts is not None else time + (index > 0) / rate
        yield time, frame


def _pixel_aspect(stream: VideoStream) -> float:
    """Width of a pixel over its height; 1.0 unless the file states a believable other one."""
    aspect = float(stream.sample_aspect_ratio or 0)
    return aspect if 0.1 < aspect < 10 else 1.0


def _upright(frame: av.VideoFrame, reformatter: VideoReformatter, threads: int, **size: int) -> np.ndarray:
    """RGB [H W 3] as shown: the display matrix states a rotation counter-clockwise, in degrees.

    `size` is the height and width before it.
    """
    # From 17 on PyAV starts threads for each frame unless told otherwise: most of the time of a small clip.
    options = {"threads": threads} if int(av.__version__.split(".")[0]) >= 17 else {}
    pixels = reformatter.reformat(frame, format="rgb24", **size, **options).to_ndarray()
    return np.rot90(pixels, round(frame.rotation / 90))


def _fill(
    pixels: np.ndarray, pixel_aspect: float, height: int, width: int, place: list[float]
) -> torch.Tensor:
    """Cut the largest region of the target's aspect out of [H W 3] and resize it, antialiased: uint8 [3 H W].

    `place` is where the region lies in what is left over, down and across, from 0 to 1.
    """
    source_height, source_width = pixels.shape[:2]
    aspect = width / height / pixel_aspect
    crop_height = min(source_height, max(1, round(source_width / aspect)))
    crop_width = min(source_width, max(1, round(source_height * aspect)))
    top = round(place[0] * (source_height - crop_height))
    left = round(place[1] * (source_width - crop_width))
    region = torch.from_numpy(np.ascontiguousarray(pixels[top : top + crop_height, left : left + crop_width]))
    image = region.permute(2, 0, 1)[None]  # [1 3 H W]
    if image.shape[2:] != (height, width):
        image = F.interpolate(image, size=(height, width), mode="bicubic", antialias=True)
    return image[0].contiguous()
