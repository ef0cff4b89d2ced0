"""Video files: mp4 and gif with metadata inside, and contact sheets.

Frames are uint8 ``[T H W 3]`` arrays throughout. Every file is written under a temporary name and renamed, so that a
full disk or Ctrl-C leaves no partial file.
"""

import json
import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from av.video.reformatter import ColorRange, Colorspace

from stdit.errors import UserError


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Convert levels in [0, 1] to uint8, rounding to the nearest."""
    return (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)


def write_mp4(
    path: Path, frames: np.ndarray, fps: float, metadata: dict[str, Any] | None = None, crf: int = 14
) -> dict[str, Any]:
    """Write frames as h264 (yuv420p, index first, so that browsers play it while it loads); return the metadata.

    h264 halves the colour planes, so an odd height or width is padded by repeating its last row or column;
    the metadata then says ``padded_to``. `read_metadata` reads them back.
    """
    _check_frames(frames)
    T, H, W, _ = frames.shape
    metadata = dict(metadata or {})
    if H % 2 or W % 2:
        frames = np.pad(frames, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)), mode="edge")
        metadata["padded_to"] = {"height": H + H % 2, "width": W + W % 2}
    rate = Fraction(fps).limit_denominator(1001)
    with atomic_write(path) as temporary:
        with av.open(temporary, "w", format="mp4", options={"movflags": "+faststart"}) as container:
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
    _check_frames(frames)
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


def write_sheet(
    path: Path, videos: Sequence[np.ndarray], captions: Sequence[str], columns: int = 8, tile: int = 128
) -> None:
    """Write a contact sheet: one `sheet_row` per video."""
    write_rows(path, [sheet_row(*pair, columns, tile) for pair in zip(videos, captions, strict=True)])


def write_rows(path: Path, rows: Sequence[PIL.Image.Image]) -> None:
    """Write rows made by `sheet_row` below each other as one PNG."""
    sheet = PIL.Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG")


def sheet_row(frames: np.ndarray, caption: str, columns: int = 8, tile: int = 128) -> PIL.Image.Image:
    """Draw a caption above ``columns`` frames spread evenly over a video.

    Frames are scaled to about ``tile`` pixels: small ones by whole factors.
    """
    _check_frames(frames)
    T, H, W, _ = frames.shape
    scale = max(1, tile // max(H, W)) if max(H, W) <= tile else tile / max(H, W)
    size = (max(1, round(W * scale)), max(1, round(H * scale)))
    resample = PIL.Image.Resampling.NEAREST if scale >= 1 else PIL.Image.Resampling.LANCZOS
    shown = np.linspace(0, T - 1, min(columns, T)).round().astype(int)
    pictures = [PIL.Image.fromarray(frames[index]).resize(size, resample) for index in shown]

    gap, font = 2, _font(14)
    width = columns * (size[0] + gap)
    lines = textwrap.wrap(caption, max(20, width // 8)) or [""]
    row = PIL.Image.new("RGB", (width, 20 * len(lines) + size[1] + 6), "white")
    PIL.ImageDraw.Draw(row).multiline_text((2, 2), "\n".join(lines), fill="black", font=font, spacing=4)
    for column, picture in enumerate(pictures):
        row.paste(picture, (column * (size[0] + gap), 20 * len(lines)))
    return row


def write_json_atomic(path: Path, values: dict[str, Any]) -> None:
    """Write readable JSON; the file is complete or absent."""
    with atomic_write(path) as temporary:
        Path(temporary).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
        return json.loads(comment)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} holds no metadata of stdit ({type(error).__name__}: {error}).") from None


@contextmanager
def atomic_write(path: Path) -> Iterator[str]:
    """Yield a temporary name beside ``path``; on success it is renamed to ``path``, on failure it is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield str(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _tag_bt709(codec: Any) -> None:
    """Tag the colour space, which players otherwise guess from the size."""
    codec.colorspace, codec.color_primaries, codec.color_trc = Colorspace.ITU709, 1, 1
    codec.color_range = ColorRange.MPEG


def _font(size: int) -> Any:
    """Return a font with many alphabets if the system has it, else Pillow's own."""
    try:
        return PIL.ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return PIL.ImageFont.load_default(size)


def _check_frames(frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or min(frames.shape) < 1:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}: must be uint8 [T H W 3], none of them 0")
