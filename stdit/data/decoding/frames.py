"""Which frame of a video is on screen at which time.

Two ways give the same answer. `select_by_packets` knows the times of frames before it decodes them, from their
packets: it decodes nothing after the last frame needed, and skips frames that are neither needed nor referred to by
others. `select_by_frames` decodes one by one and reads the times of decoded frames; it is used where packets do not
tell. Both take the latest frame that is not later than the time, and seek to the key frame before the first.
"""

import itertools
import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import av
from av.packet import Packet

from stdit.data.decoding.media import Media
from stdit.data.decoding.opening import DecodeError, NeedsSlowerRead, Video, check_frame_size

REORDER_DEPTH = 16
"""Packets come in the order of decoding, at most so far from their place in the order of presentation."""

FIRST_KEY = 512
"""Packets at the start of a file of which one should be a key frame."""

SKIPPING = frozenset({"h264", "mpeg1video", "mpeg2video", "mpeg4"})
"""Decoders that leave out frames that no other refers to, one by one, when told so."""

ONE_FOR_ONE = frozenset({"libdav1d", "av1"})
"""Decoders that keep silent about packets of rubbish, but of which every whole packet gives one frame."""

UNSEEKABLE = frozenset({"gif"})
"""Formats of which each frame adds to the last: seeking would read the whole file, to begin at its start."""

STEPS_BACK = (0.0, 0.5, 2.0, 10.0, 60.0)
"""Seconds before the time that is looked for at which to try again, where seeking does not lead to a key frame."""

T = TypeVar("T")
Shown = tuple[av.VideoFrame, range]
"""A frame, and the places in a list of times at which it is on screen."""


class Clock(NamedTuple):
    """Times of a stream, in seconds after its first frame."""

    origin: int
    tick: float
    """Seconds."""
    rate: float
    """Frames per second that the container states, or 1."""

    def seconds(self, pts: int) -> float:
        return (pts - self.origin) * self.tick


class TimeOrderCheck:
    """Refuses times, in order of decoding, that jump back by more than reordering explains."""

    def __init__(self, media: Media) -> None:
        self.media, self._recent, self._newest = media, deque[float](), -math.inf

    def check(self, time: float) -> None:
        """Raises DecodeError."""
        if time < self._newest:
            raise DecodeError(self.media, f"its times jump back from {self._newest:.3f} s to {time:.3f} s")
        self._recent.append(time)
        if len(self._recent) > REORDER_DEPTH:
            self._newest = max(self._newest, self._recent.popleft())


def select_by_packets(video: Video, times: list[float], tolerance: float) -> Iterator[Shown]:
    """The frames on screen at ascending `times` (seconds after the first), each once.

    Raises NeedsSlowerRead where packets do not tell, or not all frames come; DecodeError.
    """
    clock, packets = _packets(video)
    if not clock.tick or _is_counted(video):
        raise NeedsSlowerRead
    if times[0] > 0 and video.container.format.name not in UNSEEKABLE:
        packets = _from_key_frame(video, clock, times[0] + tolerance)
    context = video.stream.codec_context
    context.open(strict=False)  # before frames are skipped: a decoder may take the first setting for good
    wanted: dict[int, range] = {}
    missing: set[int] = set()
    left = len(times)
    try:
        for packet, places in times_on_screen(video, packets, clock, times, tolerance):
            if places:
                assert packet.pts is not None, "it has a time on screen"
                wanted[packet.pts] = places
                left -= len(places)
            if context.name in SKIPPING:
                context.skip_frame = "DEFAULT" if places else "NONREF"
            if context.name in ONE_FOR_ONE and packet.pts is not None and not is_hidden(packet):
                missing.add(packet.pts)
            decoded = packet.decode()
            missing -= {frame.pts for frame in decoded}
            yield from _pick(video, decoded, wanted)
            if not left:
                break
        decoded = context.decode(None)
        missing -= {frame.pts for frame in decoded}
        yield from _pick(video, decoded, wanted)
    except av.FFmpegError as error:
        raise NeedsSlowerRead from error
    if missing:
        raise DecodeError(video.media, "not a readable video, or damaged (a frame is missing)")
    if left or wanted:
        raise NeedsSlowerRead


def select_by_frames(
    video: Video, times: list[float], tolerance: float, seek: bool = True
) -> Iterator[Shown]:
    """As `select_by_packets`, by decoding every frame from the key frame, or from the start, on.

    Raises NeedsSlowerRead when seeking led too far; DecodeError.
    """
    timed = frames_in_order(video, times[0] + tolerance if seek and times[0] > 0 else 0.0)
    for frame, places in latest_shown(video.media, timed, times, tolerance):
        yield check_intact(video, frame), places


def frames_in_order(video: Video, start: float = 0.0) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """(seconds after the first frame, seconds that it lasts, frame) in order of presentation: all, or from one
    on that is shown no later than `start`.

    Raises NeedsSlowerRead when seeking led too far; DecodeError.
    """
    clock, packets = _packets(video)
    counted = _is_counted(video) or not clock.tick
    seek = start > 0 and not counted and video.container.format.name not in UNSEEKABLE
    if seek:
        packets = _from_key_frame(video, clock, start)
    time, index = 0.0, -1
    for index, frame in enumerate(_decoded(video, packets)):
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
    media: Media, timed: Iterable[tuple[float, float, T]], times: list[float], tolerance: float
) -> Iterator[tuple[T, range]]:
    """Of (seconds, length in seconds, picture) in order of presentation: for each of `times` the latest that is not
    later, with all its places in `times`.

    Raises DecodeError when the last picture ends before the last time.
    """
    shown, place, at, length = None, 0, 0.0, 0.0
    for time, next_length, picture in timed:
        end = bisect_left(times, time - tolerance, place)
        if shown is not None and end > place:
            yield shown, range(place, end)
            place = end
        if place == len(times):
            return
        shown, at, length = picture, time, next_length
    if times[-1] > at + max(tolerance, length - tolerance):
        raise too_short(media, at + length, times[-1])
    if shown is not None:
        yield shown, range(place, len(times))


def times_on_screen(
    video: Video, packets: Iterable[Packet], clock: Clock, times: list[float], tolerance: float
) -> Iterator[tuple[Packet, range]]:
    """Each packet in turn, with the places in `times` at which its frame is on screen.

    Looks ahead as far as frames may be reordered, and holds no more packets than that.
    Raises NeedsSlowerRead for packets without a time, or two of one time; DecodeError when time runs backwards, or
    the video ends before the last of `times`.
    """
    around: deque[tuple[Packet | None, float | None]] = deque()
    presented: list[float] = []  # ascending: of the packets in `around`
    forward = TimeOrderCheck(video.media)
    ends: list[None] = [None] * REORDER_DEPTH
    for packet in itertools.chain(packets, ends):
        shown = _presented(packet, clock)
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
                raise too_short(video.media, time + length, times[-1])
        yield current, range(begin, end)


def too_short(media: Media, seconds: float, needed: float) -> DecodeError:
    return DecodeError(media, f"lasts {seconds:.3f} s, but a frame is needed at {needed:.3f} s")


def is_hidden(packet: Packet) -> bool:
    """Whether a packet of data gives no frame to show: outside of the edit list, or a VP8 frame for reference."""
    if packet.is_discard:
        return True
    return packet.stream.codec_context.name == "vp8" and not bytes(packet)[0] & 0x10


def pixel_aspect(video: Video) -> float:
    """Width of a pixel over its height, as the container states it, or the decoder, once it has decoded a frame;
    1.0 unless it is believable."""
    stated = video.stream.sample_aspect_ratio or video.stream.codec_context.sample_aspect_ratio
    aspect = float(stated or 0)
    return aspect if 0.1 < aspect < 10 else 1.0


def check_intact(video: Video, frame: av.VideoFrame) -> av.VideoFrame:
    """The frame. Raises DecodeError when it is damaged or too large."""
    check_frame_size(video.media, frame.width, frame.height)
    if frame.is_corrupt:
        raise DecodeError(video.media, "not a readable video, or damaged (a frame is incomplete)")
    return frame


def decodable_packets(packets: Iterable[Packet]) -> Iterator[Packet]:
    """Those with data, from the first key frame on: a stream may have been cut in the middle.

    All of them where the first FIRST_KEY have no key frame: some encoders write none.
    """
    packets = (packet for packet in packets if packet.size)
    before: list[Packet] = []
    for packet in itertools.islice(packets, FIRST_KEY):
        before.append(packet)
        if packet.is_keyframe:
            return itertools.chain([packet], packets)
    return itertools.chain(before, packets)


def _packets(video: Video) -> tuple[Clock, Iterator[Packet]]:
    """The packets of a video that was just opened, and its clock."""
    packets = decodable_packets(video.container.demux(video.stream))
    head = list(itertools.islice(packets, REORDER_DEPTH + 1))
    ticks = [p.pts for p in head if p.pts is not None and not is_hidden(p)]
    origin = min(ticks) if ticks else video.stream.start_time or 0
    if head and head[0].is_keyframe and head[0].pts is not None and not is_hidden(head[0]):
        origin = head[0].pts  # what is shown before it needs frames that are not there
    tick, rate = float(video.stream.time_base or 0), float(video.stream.average_rate or 0)
    return Clock(origin, tick, rate or 1.0), itertools.chain(head, packets)


def _from_key_frame(video: Video, clock: Clock, time: float) -> Iterator[Packet]:
    """Packets from a key frame on that is shown no later than `time`: the last such, where the file has an index.

    Raises NeedsSlowerRead if none is found.
    """
    target = clock.origin + int(time / clock.tick)
    at = target
    for back in STEPS_BACK:
        try:
            video.container.seek(at, stream=video.stream)
        except av.FFmpegError as error:
            raise NeedsSlowerRead from error
        packets = (packet for packet in video.container.demux(video.stream) if packet.size)
        key = next((packet for packet in packets if packet.is_keyframe), None)
        if key is not None and key.pts is not None and clock.seconds(key.pts) <= time:
            return itertools.chain([key], packets)
        times = [t for t in (key.pts, key.dts) if t is not None] if key is not None else []
        at = min(at, target - int(back / clock.tick), *times) - 1
    raise NeedsSlowerRead


def _presented(packet: Packet | None, clock: Clock) -> float | None:
    if packet is None or is_hidden(packet):
        return None
    if packet.pts is None:
        raise NeedsSlowerRead
    return clock.seconds(packet.pts)


def _decoded(video: Video, packets: Iterable[Packet]) -> Iterator[av.VideoFrame]:
    for packet in packets:
        yield from packet.decode()
    yield from video.stream.codec_context.decode(None)


def _pick(video: Video, frames: list[av.VideoFrame], wanted: dict[int, range]) -> Iterator[Shown]:
    for frame in frames:
        if frame.pts in wanted:
            yield check_intact(video, frame), wanted.pop(frame.pts)


def _is_counted(video: Video) -> bool:
    """Whether frames have to be counted from the start: AVI has a constant rate, and wrong times for B-frames."""
    return video.container.format.name == "avi" and video.stream.codec_context.has_b_frames
