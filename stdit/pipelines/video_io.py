"""Video files: mp4 and gif with metadata inside.

Frames are uint8 ``[T H W 3]`` arrays throughout. Every file is written under a temporary name and renamed, so that a
full disk or Ctrl-C leaves no partial file.
"""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
from av.video.reformatter import ColorRange, Colorspace

from stdit.atomic_files import atomic_write
from stdit.errors import UserError


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Convert levels in [0, 1] to uint8, rounding to the nearest."""
    return (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)


def write_mp4(
    path: Path, frames: np.ndarray, fps: float, metadata: dict[str, Any] | None = None, crf: int = 14
) -> dict[str, Any]:
    """Write frames as h264 (yuv420p, index first, so that browsers play it while it loads); return the metadata.

    h264 halves the colour planes, so an odd height or width is padded by repeating its last row or column. The
    metadata's ``height`` and ``width`` are then those of the file, and ``padded_from`` has those of the frames.
    `read_metadata` reads them back.
    """
    check_frames(frames)
    T, H, W, _ = frames.shape
    metadata = dict(metadata or {})
    if H % 2 or W % 2:
        frames = np.pad(frames, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)), mode="edge")
        metadata |= {"height": H + H % 2, "width": W + W % 2, "padded_from": {"height": H, "width": W}}
    rate = Fraction(fps).limit_denominator(1001)
    with atomic_write(path) as temporary:
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            container.metadata["comment"] = json.dumps(metadata, ensure_ascii=False)
            # x264 gives the same bytes for the same frames only with one thread and without its macroblock
            # tree, whose fast path reads uninitialised memory if frames are tiny.
            options = {"crf": str(crf), "preset": "medium", "x264-params": "mbtree=0"}
            stream = container.add_stream("libx264", rate=rate, options=options)
            stream.codec_context.thread_count = 1
            stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
            _tag_bt709(stream.codec_context)
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                picture = picture.reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    return metadata


def write_gif(path: Path, frames: np.ndarray, fps: float, metadata: dict[str, Any] | None = None) -> None:
    """Write frames as a looping gif; its frame duration is a multiple of 10 ms."""
    check_frames(frames)
    first, *rest = [PIL.Image.fromarray(frame) for frame in frames]
    comment = json.dumps(metadata or {}).encode()
    milliseconds = max(20, round(100 / fps) * 10)
    with atomic_write(path) as temporary:
        first.save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=rest,
            duration=milliseconds,
            loop=0,
            comment=comment,
        )


def read_frames(path: Path, columns: int = 8) -> np.ndarray:
    """Return at most ``columns`` frames spread evenly over an mp4 or gif made here, without its padding.

    Returns:
        uint8 ``[T H W 3]``.

    Raises:
        UserError: if it cannot be read to its end.
    """
    try:
        frames = _read_gif(path, columns) if path.suffix == ".gif" else _read_mp4(path, columns)
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it, and it is made again.") from None
    metadata = read_metadata(path)
    generated = metadata.get("padded_from", {})
    return frames[:, : generated.get("height"), : generated.get("width")]


def is_whole_video(path: Path) -> bool:
    """Return whether all frames that the index of a video names are in the file; they are not decoded."""
    try:
        if path.suffix == ".gif":
            with PIL.Image.open(path) as image:
                image.seek(getattr(image, "n_frames", 1) - 1)
                image.load()
            return True
        with av.open(str(path), options={"protocol_whitelist": "file"}) as container:
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if packet.size]
            return len(packets) == stream.frames and not any(packet.is_corrupt for packet in packets)
    except (OSError, ValueError, IndexError, EOFError):
        return False


def read_metadata(path: Path) -> dict[str, Any]:
    """Read the metadata that `write_mp4` or `write_gif` wrote into a file.

    Raises:
        UserError: if the file holds none.
    """
    try:
        if Path(path).suffix == ".gif":
            with PIL.Image.open(path) as image:
                comment = image.info["comment"]
        else:
            with av.open(str(path), options={"protocol_whitelist": "file"}) as container:
                comment = container.metadata["comment"]
        found = json.loads(comment)
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        return found
    except (OSError, KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path} holds no metadata of stdit ({type(error).__name__}: {error}).") from None


def _tag_bt709(codec: Any) -> None:
    """Tag the colour space, which players otherwise guess from the size."""
    codec.colorspace, codec.color_primaries, codec.color_trc = Colorspace.ITU709, 1, 1
    codec.color_range = ColorRange.MPEG


def spread(count: int, columns: int) -> list[int]:
    """Return at most ``columns`` indices spread evenly over ``count``, the first and the last among them."""
    return np.linspace(0, count - 1, min(columns, count)).round().astype(int).tolist()


def _read_mp4(path: Path, columns: int) -> np.ndarray:
    with av.open(str(path), options={"protocol_whitelist": "file"}) as container:
        stream = container.streams.video[0]
        shown = spread(stream.frames, columns)
        frames = [
            frame.reformat(format="rgb24", src_colorspace=Colorspace.ITU709).to_ndarray()
            for index, frame in enumerate(container.decode(stream))
            if index in shown
        ]
    if len(frames) < len(shown):
        raise ValueError(f"it ends before its frame {shown[len(frames)] + 1} of {shown[-1] + 1}")
    return np.stack(frames)


def _read_gif(path: Path, columns: int) -> np.ndarray:
    frames = []
    with PIL.Image.open(path) as image:
        for index in spread(getattr(image, "n_frames", 1), columns):
            image.seek(index)
            frames.append(np.array(image.convert("RGB")))
    return np.stack(frames)


def check_frames(frames: np.ndarray) -> None:
    """Raise ValueError unless frames are uint8 ``[T H W 3]``, and there are some."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or min(frames.shape) < 1:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}: must be uint8 [T H W 3], none of them 0")
