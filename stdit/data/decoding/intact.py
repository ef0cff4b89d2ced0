"""Decode packets, and detect damaged and missing frames: nothing after the first damage of what is read counts."""

import contextlib
from bisect import insort
from collections.abc import Container, Iterable, Iterator

import av
from av.packet import Packet

from stdit.data.decoding.colors import check_colors
from stdit.data.decoding.opening import DecodeError, Video, check_frame_size

ONE_FOR_ONE = frozenset({"libdav1d", "av1"})
"""Decoders that give no error for a damaged packet, but exactly one frame for each intact packet."""

DAMAGED = "not a readable video, or damaged"

ShownFrame = tuple[av.VideoFrame, range]
"""A frame, and the range of indices in a list of times at which it is on screen."""


def is_hidden(packet: Packet) -> bool:
    """Whether a packet gives no frame to show: outside the edit list, or a hidden VP8 reference frame."""
    if packet.is_discard:
        return True
    return packet.stream.codec_context.name == "vp8" and not bytes(packet)[0] & 0x10


def check_intact(video: Video, frame: av.VideoFrame) -> av.VideoFrame:
    """Return the frame. Raises DecodeError if it is damaged, too large, or in colours that cannot be converted."""
    check_frame_size(video.media, frame.width, frame.height)
    check_colors(video.media, frame)
    if frame.is_corrupt:
        raise DecodeError(video.media, f"{DAMAGED} (a frame is incomplete)")
    return frame


def decoded_frames(video: Video, packets: Iterable[Packet]) -> Iterator[av.VideoFrame]:
    """Yield all frames. Raises DecodeError at the first that is damaged or missing."""
    context = video.stream.codec_context
    expected: list[int] = []  # of decoders that leave out damaged frames
    first: int | None = None
    try:
        for packet in packets:
            first = packet.pts if first is None else first
            if context.name in ONE_FOR_ONE and packet.pts is not None and not is_hidden(packet):
                insort(expected, packet.pts)
            yield from _intact(video, packet.decode(), first, expected)
    except av.FFmpegError as error:
        # Frames before the damaged one may wait in the decoder.
        with contextlib.suppress(av.FFmpegError):
            yield from _intact(video, context.decode(None), first, expected)
        raise DecodeError(video.media, f"{DAMAGED} ({error.strerror})") from error
    yield from _intact(video, context.decode(None), first, expected)
    if expected:
        raise DecodeError(video.media, f"{DAMAGED} (a frame is missing)")


def _intact(
    video: Video, frames: list[av.VideoFrame], first: int | None, expected: list[int]
) -> Iterator[av.VideoFrame]:
    """Check frames, but those shown before the `first` packet, which refer to frames that were not read."""
    for frame in frames:
        if first is not None and frame.pts is not None and frame.pts < first:
            yield frame
            continue
        if expected and frame.pts is not None:
            if frame.pts > expected[0]:
                raise DecodeError(video.media, f"{DAMAGED} (a frame is missing)")
            if frame.pts == expected[0]:
                expected.pop(0)
        yield check_intact(video, frame)


def damaged_so_far(
    video: Video, frames: list[av.VideoFrame], wanted: Container[int | None], first: int | None, before: bool
) -> bool:
    """Return whether a frame up to the end of `frames`, which follow those `before`, is damaged.

    Raises DecodeError if one of the pts `wanted` comes after a damaged frame, which it may refer to.

    Args:
        first: pts of the first packet; frames shown before it refer to frames that were not read.
    """
    for frame in frames:
        if before and frame.pts in wanted:
            raise DecodeError(video.media, f"{DAMAGED} (an earlier frame is incomplete)")
        before |= frame.is_corrupt and frame.pts is not None and frame.pts >= (first or 0)
    return before
