"""Select the frames of a video that are on screen at given times.

Two ways give the same answer. `select_by_packets` knows the times of frames before it decodes them, from their
packets: it decodes nothing after the last frame needed, and skips frames that are neither needed nor referred to by
others. `select_by_frames` decodes one by one and reads the times of decoded frames; it is used where packets have
no times. Both take the latest frame that is not later than the time, and seek to the key frame before the first.
"""

import itertools
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import av
from av.packet import Packet

from stdit.data.decoding.intact import (
    DAMAGED,
    ONE_FOR_ONE,
    ShownFrame,
    check_intact,
    damaged_so_far,
    decoded_frames,
    is_hidden,
)
from stdit.data.decoding.media import Media
from stdit.data.decoding.opening import DecodeError, NeedsSlowerRead, Video
from stdit.data.decoding.packets import (
    REORDER_DEPTH,
    UNSEEKABLE,
    Clock,
    TimeOrderCheck,
    is_counted,
    packets_from_key_frame,
    time_of_packet,
    timed_packets,
)

SKIPPING = frozenset({"h264", "mpeg1video", "mpeg2video", "mpeg4"})
"""Decoders that can skip single frames that no other frame refers to."""

PictureT = TypeVar("PictureT")
TimedFrame = tuple[float, float, av.VideoFrame]
"""Seconds after the first frame, duration in seconds, frame."""
FrameFilter = Callable[[Iterator[TimedFrame]], Iterator[TimedFrame]]
"""Changes consecutive frames on their way, such as a deinterlacer."""


def select_by_packets(video: Video, times: list[float], tolerance: float) -> Iterator[ShownFrame]:
    """Yield the frames on screen at ascending `times` (seconds after the first frame), each once.

    Raises NeedsSlowerRead if the times of packets are not sufficient, or frames are missing; DecodeError.
    """
    clock, packets = timed_packets(video)
    if not clock.tick or is_counted(video):
        raise NeedsSlowerRead
    if times[0] > 0 and video.container.format.name not in UNSEEKABLE:
        packets = packets_from_key_frame(video, clock, times[0] + tolerance)
    context = video.stream.codec_context
    context.open(strict=False)  # before skip_frame is set, which some decoders read once
    wanted: dict[int, range] = {}
    first: int | None = None
    damaged = False
    missing: set[int] = set()
    left = len(times)
    try:
        for packet, places in _match_packets(video, packets, clock, times, tolerance):
            if places:
                assert packet.pts is not None, "it has a time on screen"
                wanted[packet.pts] = places
                left -= len(places)
            if context.name in SKIPPING:
                context.skip_frame = "DEFAULT" if places else "NONREF"
            if context.name in ONE_FOR_ONE and packet.pts is not None and not is_hidden(packet):
                missing.add(packet.pts)
            first = packet.pts if first is None else first
            decoded = packet.decode()
            missing -= {frame.pts for frame in decoded}
            damaged = damaged_so_far(video, decoded, wanted, first, damaged)
            yield from _pick(video, decoded, wanted)
            if not left:
                break
        decoded = context.decode(None)
        missing -= {frame.pts for frame in decoded}
        damaged = damaged_so_far(video, decoded, wanted, first, damaged)
        yield from _pick(video, decoded, wanted)
    except av.FFmpegError as error:
        raise NeedsSlowerRead from error
    if missing:
        raise DecodeError(video.media, f"{DAMAGED} (a frame is missing)")
    if left or wanted:
        raise NeedsSlowerRead


def select_by_frames(
    video: Video,
    times: list[float],
    tolerance: float,
    seek: bool = True,
    through: FrameFilter | None = None,
) -> Iterator[ShownFrame]:
    """Do the same as `select_by_packets`, but decode every frame from the key frame, or from the start, on.

    Args:
        through: a filter of the frames.

    Raises NeedsSlowerRead if seeking ended too late; DecodeError.
    """
    start = times[0] + tolerance if seek and times[0] > 0 else 0.0
    yield from latest_shown(video.media, frames_through(video, start, through), times, tolerance)


def frames_through(video: Video, start: float, through: FrameFilter | None) -> Iterator[TimedFrame]:
    """Yield what `frames_in_order` does, changed by a filter that may need the frame before."""
    if through is None:
        return frames_in_order(video, start)
    earlier = 2 / float(video.stream.average_rate or 1)
    return through(frames_in_order(video, max(0.0, start - earlier)))


def frames_in_order(video: Video, start: float = 0.0) -> Iterator[TimedFrame]:
    """Yield (seconds after the first frame, duration in seconds, frame) in presentation order.

    Begins at a frame that is shown no later than `start`. Raises NeedsSlowerRead if seeking ended too late; and
    DecodeError at the first damaged frame, after all frames before it.
    """
    clock, packets = timed_packets(video)
    counted = is_counted(video) or not clock.tick
    seek = start > 0 and not counted and video.container.format.name not in UNSEEKABLE
    if seek:
        packets = packets_from_key_frame(video, clock, start)
    time, index = 0.0, -1
    for index, frame in enumerate(decoded_frames(video, packets)):
        if counted:
            time = index / clock.rate
        else:
            time = clock.seconds(frame.pts) if frame.pts is not None else time + (index > 0) / clock.rate
        if seek and index == 0 and time > start:
            raise NeedsSlowerRead
        yield time, float((frame.duration or 0) * clock.tick) or 1 / clock.rate, frame
    if index < 0:
        raise DecodeError(video.media, "holds no frame that can be decoded")


def latest_shown(
    media: Media, timed: Iterable[tuple[float, float, PictureT]], times: list[float], tolerance: float
) -> Iterator[tuple[PictureT, range]]:
    """Yield, for ascending `times`, the latest picture that is not later, with the range of its indices in `times`.

    Args:
        timed: (seconds, duration in seconds, picture) in presentation order.

    Raises DecodeError if the last picture ends before the last time.
    """
    shown, place, at, length = None, 0, 0.0, 0.0
    try:
        for time, next_length, picture in timed:
            end = bisect_left(times, time - tolerance, place)
            if shown is not None and end > place:
                yield shown, range(place, end)
                place = end
            if place == len(times):
                return
            shown, at, length = picture, time, next_length
    except DecodeError:
        if shown is None or times[-1] > at + length - tolerance:
            raise  # otherwise what is damaged comes after the last time
    if times[-1] > at + max(tolerance, length - tolerance):
        raise _too_short(media, at + length, times[-1])
    if shown is not None:
        yield shown, range(place, len(times))


def _match_packets(
    video: Video, packets: Iterable[Packet], clock: Clock, times: list[float], tolerance: float
) -> Iterator[tuple[Packet, range]]:
    """Yield each packet with the range of indices in `times` at which its frame is on screen.

    Looks ahead, and holds packets, only as far as frames may be reordered.

    Raises NeedsSlowerRead for a packet without a time, or two with the same time; DecodeError if time jumps back, or
    the video ends before the last of `times`.
    """
    around: deque[tuple[Packet | None, float | None]] = deque()
    presented: list[float] = []  # ascending: of the packets in `around`
    forward = TimeOrderCheck(video.media)
    ends: list[None] = [None] * REORDER_DEPTH
    for packet in itertools.chain(packets, ends):
        shown = time_of_packet(packet, clock)
        if shown is not None:
            forward.check(shown)
            insort(presented, shown)
        around.append((packet, shown))
        if len(around) <= REORDER_DEPTH:
            continue
        if len(around) > 2 * REORDER_DEPTH + 1:
            _, passed = around.popleft()
            if passed is not None:
                presented.remove(passed)
        current, time = around[-1 - REORDER_DEPTH]
        if current is None:
            continue
        if time is None:
            yield current, range(0)
            continue
        after = bisect_left(presented, time) + 1
        following = presented[after] if after < len(presented) else None
        if following == time:
            raise NeedsSlowerRead
        begin = bisect_left(times, time - tolerance)
        if following is not None:
            end = bisect_left(times, following - tolerance)
        else:
            length = float((current.duration or 0) * clock.tick) or 1 / clock.rate
            end = bisect_right(times, time + max(tolerance, length - tolerance))
            if end < len(times):
                raise _too_short(video.media, time + length, times[-1])
        yield current, range(begin, end)


def _too_short(media: Media, seconds: float, needed: float) -> DecodeError:
    return DecodeError(media, f"lasts {seconds:.3f} s, but a frame is needed at {needed:.3f} s")


def _pick(video: Video, frames: list[av.VideoFrame], wanted: dict[int, range]) -> Iterator[ShownFrame]:
    for frame in frames:
        if frame.pts in wanted:
            yield check_intact(video, frame), wanted.pop(frame.pts)
