"""A part of a video as a file of its own: copied where a key frame allows it, else encoded anew."""

import contextlib
import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import av.container
from av.packet import Packet
from av.video.stream import VideoStream

from stdit.data.decoding.decode import INSTANT, DecodeError, VideoInfo, iter_frames, probe
from stdit.data.decoding.frames import REORDER_DEPTH
from stdit.data.decoding.media import Media
from stdit.data.decoding.opening import Video, open_clip
from stdit.data.preparation.table import written_whole
from stdit.errors import UserError

COPIED = frozenset({"h264", "hevc", "av1", "vp9", "mpeg4"})
"""Codecs that are copied into an mp4."""
LOST = 3
"""Frames that a copy may lack at its end, where they cannot be shown without frames after them."""
CLOCK = Fraction(1, 90_000)
"""Seconds of a tick of what is encoded."""
QUALITY = {"crf": "14", "preset": "fast"}
"""Of libx264: hardly to be told from the original."""


def cut(
    media: Media, start: float, end: float, output: Path, size: tuple[int, int]
) -> tuple[Literal["copied", "encoded"], VideoInfo]:
    """Write the frames from `start` on and before `end` (seconds after the first) as an mp4 without sound.

    Args:
        size: height and width in square pixels, as shown, of what has to be encoded anew.

    Returns how it was made, and what it holds. Raises DecodeError, and UserError when it cannot be written.
    """
    with written_whole(output) as aside:
        copied = copy_part(media, start, end, aside)
        if copied is not None:
            return "copied", copied
        encode_part(media, start, end, aside, size)
        return "encoded", probe(aside)


def copy_part(media: Media, start: float, end: float, output: Path) -> VideoInfo | None:
    """Copy the packets of a part that begins with a key frame, and say what the copy holds; None where none does.

    Raises DecodeError for a source that cannot be read.
    """
    with open_clip(media, quick=False) as opened:
        if not isinstance(opened, Video):
            return None
        source, stream = opened.container, opened.stream
        if stream.codec_context.name not in COPIED or source.format.name == "avi":  # whose times are wrong
            return None
        packets = _part(source, stream, start, end)
        if not packets:
            return None
        first = packets[0].pts or 0
        try:
            with av.open(output, "w", format="mp4") as target:
                copy = target.add_stream_from_template(stream)
                for packet in packets:
                    packet.stream = copy
                    packet.pts, packet.dts = (packet.pts or 0) - first, (packet.dts or 0) - first
                    target.mux(packet)
        except (
            av.FFmpegError,
            ValueError,
        ):  # they do not fit into an mp4, or the disk refuses, as it will again
            return None
    with contextlib.suppress(DecodeError):
        info = probe(output)
        if info.num_frames == len(packets):
            return info
    return None


def _part(source: av.container.InputContainer, stream: VideoStream, start: float, end: float) -> list[Packet]:
    """Packets from the key frame at `start` on, in order of decoding, that show all frames up to the last of them.

    Empty when there is no such key frame, or more than LOST frames before `end` cannot be shown without later ones.
    """
    head = list(itertools.islice(source.demux(stream), REORDER_DEPTH))
    shown = [packet.pts for packet in head if packet.pts is not None and not packet.is_discard]
    tick = float(stream.time_base or 0)
    if not shown or not tick:
        return []
    begin = min(shown) + math.ceil((start + INSTANT) / tick)
    limit = min(shown) + math.ceil((end - INSTANT) / tick)
    source.seek(begin, stream=stream)
    packets: list[Packet] = []
    times: list[int] = []
    for packet in source.demux(stream):
        if not packet.size:
            continue
        if packet.pts is None or packet.dts is None:
            return []
        if packet.dts >= limit:
            break
        if not packets and not (packet.is_keyframe and abs(packet.pts - begin) * tick <= 2 * INSTANT + tick):
            return []
        if not packets or packet.pts > times[0]:  # earlier ones need frames before the key frame
            packets.append(packet)
            times.append(packet.pts)
    return packets[: _complete(times, limit)]


def _complete(times: list[int], limit: int) -> int:
    """How many frames, of those in order of decoding, are all that are shown before the last of them, which is shown
    before `limit`; 0 when that leaves out more than LOST."""
    wanted = sum(time < limit for time in times)
    latest = list(itertools.accumulate(times, max))
    earliest_after = [*itertools.accumulate(reversed(times), min)][::-1][1:] + [limit]
    for count in range(len(times), max(0, wanted - LOST - 1), -1):
        if latest[count - 1] < min(earliest_after[count - 1], limit):
            return count
    return 0


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except av.FFmpegError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from error


def encode_part(media: Media, start: float, end: float, output: Path, size: tuple[int, int]) -> None:
    """Decode a part and encode it anew, upright and with square pixels.

    Raises DecodeError, and UserError when it cannot be written.
    """
    height, width = size
    chroma = "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p"
    with _writing(output), av.open(output, "w", format="mp4") as target:
        stream = target.add_stream("libx264", options=QUALITY)
        stream.height, stream.width, stream.pix_fmt = height, width, chroma
        stream.codec_context.time_base, stream.codec_context.thread_count = CLOCK, 1
        begin, ticks, length = None, 0, 0
        for time, pixels in iter_frames(media, start, end):
            begin = time if begin is None else begin
            before, ticks = ticks, round((time - begin) / CLOCK)
            length = ticks - before
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(width=width, height=height, format=chroma)
            frame.pts, frame.time_base = ticks, CLOCK
            target.mux(stream.encode(frame))
        if begin is None:
            raise DecodeError(media, f"holds no frame from {start:g} to {end:g} s")
        for packet in stream.encode():
            packet.duration = length  # else the last frame would have none, and the video end too early
            target.mux(packet)
