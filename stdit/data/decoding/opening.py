"""Open videos and images, and check them before a frame is decoded.

Files are untrusted: only the demuxers of `FORMATS` may open them (none that follows names of other files), only local
files are read, and sizes are checked in the header.
"""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import av.container
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image

from stdit.data.decoding.limits import MAX_DIMENSION
from stdit.data.decoding.media import Media, MediaError

FORMATS = "mov,mp4,matroska,webm,avi,gif,mpegts,mpeg,flv,ogg,asf,ivf"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".ts", ".mpg", ".mpeg", ".flv", ".wmv", ".ogv"}
)
MAX_PIXELS = 8192 * 8192
HEAD_BYTES = 12
"""Number of bytes at the start of a file that determine its type."""

# For containers that state sizes and times: av.open would decode one to twenty frames to find them. Without a decoder
# it only reads packets, up to the probe size, here the smallest allowed.
QUICK = {"codec_whitelist": "none", "probesize": "2048"}


class DecodeError(ValueError):
    """A file that cannot be decoded; the message is path and reason."""

    def __init__(self, path: Media | Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return DecodeError, (self.path, self.reason)


class NeedsSlowerRead(Exception):
    """A fast way of reading does not work for this file; a slower one may."""


class Video(NamedTuple):
    """An open file and its first video stream."""

    media: Media
    container: av.container.InputContainer
    stream: VideoStream


@contextlib.contextmanager
def open_clip(media: Media, threads: int = 1, quick: bool = True) -> Iterator[Video | Image.Image]:
    """Open a video, or a still or animated picture that Pillow reads; the content decides, not the name.

    Turns all errors of FFmpeg and Pillow inside the block into DecodeError.

    Args:
        quick: do not decode frames to find what the container does not state.
    """
    try:
        with media.opened() as file:
            head = _head(file)
            opening = (
                _open_picture(media, file)
                if _is_picture(head)
                else _open_video(media, file, head, threads, quick)
            )
            with opening as opened:
                yield opened
    except MediaError as error:
        raise DecodeError(media, str(error)) from error
    except OSError as error:  # errors of FFmpeg and Pillow are handled below
        raise DecodeError(media, error.strerror or str(error)) from error


@contextlib.contextmanager
def _open_picture(media: Media, file: str | BinaryIO) -> Iterator[Image.Image]:
    try:
        with Image.open(file, formats=["PNG", "JPEG", "WEBP", "BMP"]) as image:
            check_frame_size(media, image.width, image.height)
            yield image
    except (MediaError, DecodeError):
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(media, f"not a readable image, or damaged ({error})") from error


@contextlib.contextmanager
def _open_video(
    media: Media, file: str | BinaryIO, head: bytes, threads: int, quick: bool
) -> Iterator[Video]:
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    try:
        with contextlib.ExitStack() as stack:
            container = _open_container(stack, file, options, quick and _states_sizes_and_times(head))
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise DecodeError(media, "has no video stream" + _instead(container))
            stream = streams[0]
            context = stream.codec_context
            if context is None:
                raise DecodeError(media, "its video has a codec that is not supported")
            check_frame_size(media, stream.width, stream.height)
            context.options = {"max_pixels": str(MAX_PIXELS)}
            if context.name == "hevc":  # the only decoder that does not mark damaged frames
                context.options["err_detect"] = "explode"
            context.thread_count, context.thread_type = threads, "AUTO" if threads > 1 else "NONE"
            yield Video(media, container, stream)
    except av.FFmpegError as error:
        if media.suffix in IMAGE_SUFFIXES:
            raise DecodeError(media, f"not a readable image, or damaged ({error.strerror})") from error
        if error.errno == errno.EINVAL:  # the format is not in the whitelist
            raise DecodeError(media, "not a video in a supported format, or damaged") from error
        raise DecodeError(media, f"not a readable video, or damaged ({error.strerror})") from error


def _open_container(
    stack: contextlib.ExitStack, file: str | BinaryIO, options: dict[str, str], quick: bool
) -> av.container.InputContainer:
    if quick:
        container = stack.enter_context(_open(file, options | QUICK))
        if all(stream.codec_context and stream.width for stream in container.streams.video):
            return container
        stack.close()
        if not isinstance(file, str):
            file.seek(0)
    return stack.enter_context(_open(file, options))


def _open(file: str | BinaryIO, options: dict[str, str]) -> av.container.InputContainer:
    # titles and comments are in any encoding, and nothing here reads them
    return av.open(file, container_options=options, metadata_errors="replace")


def pixel_aspect(video: Video) -> float:
    """Return width / height of a pixel, as stated by the container, or by the decoder after its first frame.

    1.0 if it is missing or implausible.
    """
    stated = video.stream.sample_aspect_ratio or video.stream.codec_context.sample_aspect_ratio
    aspect = float(stated or 0)
    return aspect if 0.1 < aspect < 10 else 1.0


def check_frame_size(media: Media, width: int, height: int) -> None:
    """Raise DecodeError if frames of this size are too large."""
    if not (0 < width <= MAX_DIMENSION and 0 < height <= MAX_DIMENSION and width * height <= MAX_PIXELS):
        raise DecodeError(
            media,
            f"frames of {width}x{height} pixels; at most {MAX_DIMENSION} a side and {MAX_PIXELS} in all are read",
        )


def _head(file: str | BinaryIO) -> bytes:
    if isinstance(file, str):
        with open(file, "rb", buffering=0) as opened:
            return opened.read(HEAD_BYTES)
    head = file.read(HEAD_BYTES)
    file.seek(0)
    return head


def _is_picture(head: bytes) -> bool:
    return head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"BM")) or (
        head[:4] == b"RIFF" and head[8:] == b"WEBP"
    )


def _states_sizes_and_times(head: bytes) -> bool:
    return head[4:8] == b"ftyp" or head.startswith((b"\x1a\x45\xdf\xa3", b"GIF8"))


def _instead(container: av.container.InputContainer) -> str:
    covers = {s.index for s in container.streams.video if s.disposition & Disposition.attached_pic}
    kinds = sorted(
        {"a cover picture" if s.index in covers else s.type for s in container.streams if s.type},
        reverse=True,
    )
    return f", only {' and '.join(kinds)}" if kinds else ""
