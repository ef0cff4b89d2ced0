"""Packets of a video before they are decoded: their times, key frames, and where to seek."""

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import av
from av.packet import Packet

from stdit.data.decoding.intact import is_hidden
from stdit.data.decoding.media import Media
from stdit.data.decoding.opening import DecodeError, NeedsSlowerRead, Video

REORDER_DEPTH = 16
"""Most places by which decoding order and presentation order of packets differ."""

FIRST_KEY = 512
"""Number of packets at the start of a file among which a key frame is expected."""

UNSEEKABLE = frozenset({"gif"})
"""Formats in which each frame builds on the last, so that seeking would read the whole file from its start."""

SEEK_BACK_SECONDS = (0.0, 0.5, 2.0, 10.0, 60.0)
"""How many seconds earlier to seek again if a seek does not end at a key frame."""


class Clock(NamedTuple):
    """Converts time stamps of a stream to seconds after its first frame."""

    origin: int
    tick: float
    """Seconds per time stamp unit."""
    rate: float
    """Frames per second according to the container, or 1."""

    def seconds(self, pts: int) -> float:
        return (pts - self.origin) * self.tick


class TimeOrderCheck:
    """Detects times, in decoding order, that jump back by more than reordering explains."""

    def __init__(self, media: Media) -> None:
        self.media, self._recent, self._newest = media, deque[float](), -math.inf

    def check(self, time: float) -> None:
        """Raise DecodeError if `time` jumps back."""
        if time < self._newest:
            raise DecodeError(self.media, f"its times jump back from {self._newest:.3f} s to {time:.3f} s")
        self._recent.append(time)
        if len(self._recent) > REORDER_DEPTH:
            self._newest = max(self._newest, self._recent.popleft())


def decodable_packets(packets: Iterable[Packet]) -> Iterator[Packet]:
    """Yield packets with data, from the first key frame on, since a stream may begin in the middle.

    If the first FIRST_KEY packets have no key frame, yield all of them: some encoders mark none.
    """
    packets = (packet for packet in packets if packet.size)
    before: list[Packet] = []
    for packet in itertools.islice(packets, FIRST_KEY):
        before.append(packet)
        if packet.is_keyframe:
            return itertools.chain([packet], packets)
    return itertools.chain(before, packets)


def timed_packets(video: Video) -> tuple[Clock, Iterator[Packet]]:
    """Return the clock of a video that was just opened, and its packets."""
    packets = decodable_packets(video.container.demux(video.stream))
    head = list(itertools.islice(packets, REORDER_DEPTH + 1))
    ticks = [p.pts for p in head if p.pts is not None and not is_hidden(p)]
    origin = min(ticks) if ticks else video.stream.start_time or 0
    if head and head[0].is_keyframe and head[0].pts is not None and not is_hidden(head[0]):
        origin = head[0].pts  # earlier frames refer to frames that are missing
    tick, rate = float(video.stream.time_base or 0), float(video.stream.average_rate or 0)
    return Clock(origin, tick, rate or 1.0), itertools.chain(head, packets)


def packets_from_key_frame(video: Video, clock: Clock, time: float) -> Iterator[Packet]:
    """Yield packets from a key frame that is shown no later than `time`; the last one if the file has an index.

    Raises NeedsSlowerRead if none is found.
    """
    target = clock.origin + int(time / clock.tick)
    at = target
    for back in SEEK_BACK_SECONDS:
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


def time_of_packet(packet: Packet | None, clock: Clock) -> float | None:
    """Return the seconds at which its frame is shown; None if it has none. Raises NeedsSlowerRead without a time."""
    if packet is None or is_hidden(packet):
        return None
    if packet.pts is None:
        raise NeedsSlowerRead
    return clock.seconds(packet.pts)


def is_counted(video: Video) -> bool:
    """Whether frames must be counted from the start: AVI has a constant rate, and wrong times for B-frames."""
    return video.container.format.name == "avi" and video.stream.codec_context.has_b_frames
