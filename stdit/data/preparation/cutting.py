"""Write a span of a video to a file: copied if it begins with a key frame, otherwise re-encoded."""

import contextlib
import itertools
import math
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import av.container
from av.packet import Packet
from av.video.stream import VideoStream

from stdit.data.decoding.decode import INSTANT, DecodeError, VideoInfo, iter_frames, probe
from stdit.data.decoding.media import Media
from stdit.data.decoding.opening import Video, open_clip
from stdit.data.decoding.packets import REORDER_DEPTH
from stdit.data.preparation.table import staged_output
from stdit.errors import UserError

COPIED_CODECS = frozenset({"h264", "hevc", "av1", "vp9", "mpeg4"})
"""Codecs whose packets are copied into an mp4."""
MAX_LOST_FRAMES = 3
"""Frames that a copy may lack at its end, because they cannot be decoded without later ones."""
TIME_BASE = Fraction(1, 90_000)
"""Seconds per tick of re-encoded videos."""
X264_OPTIONS = {"crf": "14", "preset": "fast"}
"""Nearly indistinguishable from the original."""


def cut_clip(
    media: Media, start: float, end: float, output: Path, size: tuple[int, int], field_order: str = ""
) -> tuple[Literal["copied", "encoded"], VideoInfo]:
    """Write the frames from `start` to before `end` (seconds after the first frame) as an mp4 without sound.

    Args:
        size: height and width in square pixels, as shown, if it has to be re-encoded.
        field_order: as in `decode_clip`; what is re-encoded is progressive, and SDR.

    Returns how it was written, and its frames, rate and size. Raises DecodeError, and UserError if writing fails.
    """
    with staged_output(output) as staging:
        copied = copy_packets(media, start, end, staging)
        if copied is not None:
            return "copied", copied
        _reencode(media, start, end, staging, size, field_order)
        return "encoded", probe(staging)


def copy_packets(media: Media, start: float, end: float, output: Path) -> VideoInfo | None:
    """Copy the packets of a span, if it begins with a key frame; return the copy's frames, rate and size, or None.

    Raises DecodeError if the source cannot be read.
    """
    with open_clip(media, quick=False) as opened:
        if not isinstance(opened, Video):
            return None
        source, stream = opened.container, opened.stream
        if (
            stream.codec_context.name not in COPIED_CODECS or source.format.name == "avi"
        ):  # its timestamps are wrong
            return None
        packets = _packets_of_span(source, stream, start, end)
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
        ):  # they do not fit into an mp4; or the disk is full, as it will be again
            return None
    with contextlib.suppress(DecodeError):
        info = probe(output)
        if info.num_frames == len(packets):
            return info
    return None


def _packets_of_span(
    source: av.container.InputContainer, stream: VideoStream, start: float, end: float
) -> list[Packet]:
    """Return the packets from the key frame at `start` on, in decoding order, which decode without any later ones.

    Empty if there is no such key frame, or if more than MAX_LOST_FRAMES frames before `end` need later ones.
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
    return packets[: _count_complete(times, limit)]


def _count_complete(times: list[int], limit: int) -> int:
    """Return how many frames, in decoding order, can be kept so that none is missing before the last one shown.

    The last one is shown before `limit`; 0 if more than MAX_LOST_FRAMES would be lost.
    """
    wanted = sum(time < limit for time in times)
    latest = list(itertools.accumulate(times, max))
    earliest_after = [*itertools.accumulate(reversed(times), min)][::-1][1:] + [limit]
    for count in range(len(times), max(0, wanted - MAX_LOST_FRAMES - 1), -1):
        if latest[count - 1] < min(earliest_after[count - 1], limit):
            return count
    return 0


def _reencode(
    media: Media, start: float, end: float, output: Path, size: tuple[int, int], field_order: str
) -> None:
    """Decode a span and encode it, upright and with square pixels.

    Raises DecodeError, and UserError if it cannot be written.
    """
    try:
        _encode_frames(media, start, end, output, size, field_order)
    except av.FFmpegError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from error


def _encode_frames(
    media: Media, start: float, end: float, output: Path, size: tuple[int, int], field_order: str
) -> None:
    height, width = size
    chroma = "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p"
    with av.open(output, "w", format="mp4") as target:
        stream = target.add_stream("libx264", options=X264_OPTIONS)
        stream.height, stream.width, stream.pix_fmt = height, width, chroma
        stream.codec_context.time_base, stream.codec_context.thread_count = TIME_BASE, 1
        begin, ticks, length = None, 0, 0
        for time, pixels in iter_frames(media, start, end, field_order=field_order):
            begin = time if begin is None else begin
            before, ticks = ticks, round((time - begin) / TIME_BASE)
            length = ticks - before
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(width=width, height=height, format=chroma)
            frame.pts, frame.time_base = ticks, TIME_BASE
            target.mux(stream.encode(frame))
        if begin is None:
            raise DecodeError(media, f"has no frame from {start:g} to {end:g} s")
        for packet in stream.encode():
            packet.duration = length  # otherwise the last frame has none, and the video ends too early
            target.mux(packet)
