"""Write a folder of awkward media, each file with what is expected of it.

    python -m tests.data.awkward FOLDER

Every clip shows a bright square that moves to the right over a grey ramp, unless its point is another.
"""

import struct
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image

from scripts.bench.data import scheduled_as_before

HEIGHT, WIDTH, FRAMES, FPS = 48, 64, 16, 8


class Expected(NamedTuple):
    """What `probe` says of a file."""

    num_frames: int = FRAMES
    fps: float = FPS
    height: int = HEIGHT
    width: int = WIDTH
    color: str = "SDR"
    field_order: str = "progressive"
    damaged: bool = False


class Excluded(NamedTuple):
    """Why `probe` excludes a file."""

    reason: str


Case = tuple[Callable[[Path], Any], Expected | Excluded]


def picture(place: float, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Return a grey ramp with a square whose left side is `place` pixels from the left: uint8 [H W 3]."""
    ramp = np.linspace(40, 120, width)[None, :, None].repeat(height, 0).repeat(3, 2)
    side, left = max(1, height // 3), int(place) % width
    ramp[height // 3 : height // 3 + side, left : left + side] = (235, 200, 60)
    return ramp.astype(np.uint8)


def moving(count: int = FRAMES, height: int = HEIGHT, width: int = WIDTH, speed: float = 2) -> np.ndarray:
    """uint8 [T H W 3]"""
    return np.stack([picture(speed * k, height, width) for k in range(count)])


def combed(count: int, height: int = HEIGHT, width: int = WIDTH, bottom_first: bool = False) -> np.ndarray:
    """Return interlaced frames: even and odd lines of different moments."""
    fields = moving(2 * count, height, width, speed=3)
    frames = fields[0::2].copy()
    if bottom_first:
        frames[:, 0::2] = fields[1::2, 0::2]
    else:
        frames[:, 1::2] = fields[1::2, 1::2]
    return frames


def write(
    path: Path,
    frames: np.ndarray | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: Fraction | int = FPS,
    options: dict[str, str] | None = None,
    aspect: Fraction | None = None,
    times: list[float] | None = None,
    colors: tuple[int, int, int] | None = None,
) -> Path:
    """Encode frames. `colors`: FFmpeg's numbers of primaries, transfer and matrix."""
    frames = moving() if frames is None else frames
    options = {"qp": "8", "g": "8"} if options is None and codec == "libx264" else options or {}
    with scheduled_as_before(), av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        if colors:
            context = stream.codec_context
            context.color_primaries, context.color_trc, context.colorspace = colors
        for index, pixels in enumerate(frames):
            layout = "rgba" if pixels.shape[-1] == 4 else "rgb24" if pixels.dtype == np.uint8 else "rgb48le"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=layout)
            if colors:
                frame = frame.reformat(format=pix_fmt, dst_colorspace=9 if colors[2] == 9 else 1)
                frame.color_primaries, frame.color_trc, frame.colorspace = colors
            if times:
                frame.pts, frame.time_base = round(times[index] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def patched(path: Path, box: bytes, offset: int, value: bytes) -> None:
    """Overwrite bytes of the first box of this name, `offset` bytes after its name."""
    data = bytearray(path.read_bytes())
    at = data.index(box) + 4 + offset
    data[at : at + len(value)] = value
    path.write_bytes(data)


def rotated(path: Path) -> None:
    write(path)
    one = 0x10000
    patched(path, b"tkhd", 40, struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 0x40000000))


def latin_title(path: Path) -> None:
    """The name of the track is not UTF-8."""
    write(path)
    patched(path, b"Video", -2, "éo".encode("latin-1"))


def edit_list(path: Path) -> None:
    """The first half second is hidden, in the middle of a group of pictures."""
    write(path, options={"qp": "8", "g": "16", "bf": "0"})
    with av.open(path) as container:
        tick = container.streams.video[0].time_base
    patched(path, b"elst", 12, int(0.5 / tick).to_bytes(4, "big"))


def truncated(path: Path) -> None:
    """The index stands before the frames, of which half are missing."""
    write(path, noisy(), options={"qp": "8", "g": "8", "bf": "0", "movflags": "faststart"})
    _faststart(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])


def _faststart(path: Path) -> None:
    with av.open(path) as source:
        moved = path.with_name(f"moved-{path.name}")
        with av.open(moved, "w", options={"movflags": "faststart"}) as target:
            copy = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = copy
                    target.mux(packet)
    moved.replace(path)


def noisy(count: int = FRAMES) -> np.ndarray:
    """Frames whose packets are large."""
    noise = np.random.default_rng(0).integers(0, 60, (count, HEIGHT, WIDTH, 3), np.uint8)
    return moving(count) // 2 + noise


def bit_rot(path: Path) -> None:
    """The data of frame 10 is overwritten."""
    write(path, noisy(), options={"qp": "8", "g": "8", "bf": "0"})
    with av.open(path) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    position, size = places[10]
    data[position : position + size] = bytes(size)
    path.write_bytes(data)


def no_index(path: Path) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cover(path: Path) -> None:
    """A video whose first stream is its cover."""
    write(path.with_suffix(".cover.jpg"), moving(1), codec="mjpeg", pix_fmt="yuvj420p")
    write(path.with_suffix(".video.mp4"))
    _with_cover(path, path.with_suffix(".cover.jpg"), path.with_suffix(".video.mp4"))


def only_cover(path: Path) -> None:
    """A song with a cover."""
    write(path.with_suffix(".cover.jpg"), moving(1), codec="mjpeg", pix_fmt="yuvj420p")
    _with_cover(path, path.with_suffix(".cover.jpg"), None)


def _with_cover(path: Path, cover_file: Path, video: Path | None) -> None:
    with av.open(path, "w") as target:
        streams = []
        for file in filter(None, (cover_file, video)):
            source = av.open(file)
            streams.append((source, target.add_stream_from_template(source.streams.video[0])))
        streams[0][1].disposition = av.stream.Disposition.attached_pic
        audio = target.add_stream("aac", rate=16000, layout="mono")
        for source, stream in streams:
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
            source.close()
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        target.mux(audio.encode(sound))
        target.mux(audio.encode())
    for file in filter(None, (cover_file, video)):
        file.unlink()


def transparent(path: Path) -> None:
    alpha = np.full((FRAMES, HEIGHT, WIDTH, 1), 255, np.uint8)
    alpha[:, :16] = 0
    write(path, np.concatenate([moving(), alpha], -1), codec="qtrle", pix_fmt="argb")


def linked(path: Path) -> None:
    path.symlink_to(write(path.with_name("linked to.mp4")).name)


def animated(path: Path) -> None:
    frames = [Image.fromarray(pixels) for pixels in moving()]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // FPS)


HEVC = {"preset": "ultrafast", "x265-params": "log-level=none"}
INTERLACED = {"qp": "8", "g": "8", "flags": "+ildct+ilme"}
VARIABLE = [0, 0.1, 0.2, 0.3, 0.7, 0.8, 0.9, 1.0, 1.4, 1.5, 1.6, 1.7, 1.75, 1.8, 1.85, 2.0]

CASES: dict[str, Case] = {
    "plain.mp4": (write, Expected()),
    "rotated.mp4": (rotated, Expected(height=WIDTH, width=HEIGHT)),
    "a title in Latin-1.mp4": (latin_title, Expected()),
    "edit list.mp4": (edit_list, Expected(num_frames=12)),
    "variable rate.mp4": (lambda path: write(path, times=VARIABLE), Expected(fps=7.5)),
    "10 bit.mp4": (
        lambda path: write(path, codec="libx265", pix_fmt="yuv420p10le", options=HEVC),
        Expected(),
    ),
    "pq.mp4": (
        lambda path: write(path, codec="libx265", pix_fmt="yuv420p10le", options=HEVC, colors=(9, 16, 9)),
        Expected(color="PQ"),
    ),
    "hlg.mp4": (
        lambda path: write(path, codec="libx265", pix_fmt="yuv420p10le", options=HEVC, colors=(9, 18, 9)),
        Expected(color="HLG"),
    ),
    "bt2020.mp4": (lambda path: write(path, colors=(9, 1, 9)), Expected(color="BT.2020")),
    "interlaced.mp4": (
        lambda path: write(path, combed(FRAMES), options={**INTERLACED, "x264-params": "tff=1"}),
        Expected(field_order="tff"),
    ),
    "bottom first.mp4": (
        lambda path: write(path, combed(FRAMES, bottom_first=True), options={"qp": "8"}),
        Expected(field_order="bff"),
    ),
    "combed without a flag.mkv": (
        lambda path: write(path, combed(FRAMES), options={"qp": "8"}),
        Expected(field_order="tff"),
    ),
    "odd size.mkv": (
        lambda path: write(path, moving(FRAMES, 47, 65), pix_fmt="yuv444p"),
        Expected(height=47, width=65),
    ),
    "truncated.mp4": (truncated, Expected(damaged=True)),
    "bit rot.mp4": (bit_rot, Expected(num_frames=10, damaged=True)),
    "no index.mp4": (no_index, Excluded("damaged")),
    "empty.mp4": (lambda path: path.write_bytes(b""), Excluded("is empty (0 bytes)")),
    "text.mp4": (lambda path: path.write_text("404 Not Found\n" * 100), Excluded("not a ")),
    "two  spaces, a comma & 'quotes'.mp4": (write, Expected()),
    "eine Straße — 道.mp4": (write, Expected()),
    "a new\nline.mp4": (write, Expected()),
    "UPPER.MP4": (write, Expected()),
    "wrong suffix.avi": (lambda path: write(path.with_suffix(".mp4")).rename(path), Expected()),
    "link.mp4": (linked, Expected()),
    "linked to.mp4": (lambda path: None, Expected()),  # written with its link
    "dead link.mp4": (lambda path: path.symlink_to("nowhere.mp4"), Excluded("file missing")),
    "link out.mp4": (lambda path: path.symlink_to(__file__), Excluded("outside the data root")),
    "one frame.mp4": (lambda path: write(path, moving(1)), Expected(num_frames=1)),
    "picture.png": (lambda path: Image.fromarray(picture(9)).save(path), Expected(num_frames=1, fps=1)),
    "animated.webp": (animated, Expected()),
    "120 fps.mp4": (lambda path: write(path, moving(240, speed=0.2), fps=120), Expected(240, 120)),
    "cover.mp4": (cover, Expected()),
    "only a cover.mov": (only_cover, Excluded("no video stream")),
    "wide pixels.mp4": (lambda path: write(path, aspect=Fraction(2)), Expected(width=2 * WIDTH)),
    "transparent.mov": (transparent, Expected()),
}
"""What writes each file, and what is expected of it."""


def write_folder(folder: Path) -> Path:
    """Write all files, each with a caption, and return the folder."""
    folder.mkdir(parents=True)
    for number, (name, (make, _)) in enumerate(CASES.items()):
        make(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"clip {number}: a square moves to the right\n")
    return folder


if __name__ == "__main__":
    write_folder(Path(sys.argv[1]))
