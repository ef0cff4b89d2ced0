"""Contact sheets: pictures of many videos on one PNG, each below its prompt.

Frames are uint8 ``[T H W 3]`` arrays.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.PngImagePlugin

from stdit.atomic_files import atomic_write
from stdit.errors import UserError
from stdit.pipelines.lettering import LINE_HEIGHT, draw_lines, wrap_text
from stdit.pipelines.video_io import check_frames, spread

_GAP = 2
"""Pixels between pictures."""
_APART = 24
"""Pixels between sheets that are side by side."""
_CONTENTS = "contents"
"""Name of the text in the PNG that says what is on it."""


def sheet_row(frames: np.ndarray, caption: str, columns: int = 8, tile: int = 128) -> PIL.Image.Image:
    """Draw a caption above ``columns`` frames spread evenly over a video.

    Frames are scaled to about ``tile`` pixels: small ones by whole factors.
    """
    check_frames(frames)
    pictures = [scaled(frames[index], tile) for index in spread(len(frames), columns)]
    return picture_row(pictures, caption, columns)


def picture_row(
    pictures: Sequence[PIL.Image.Image | None], caption: str, columns: int, below: Sequence[str] = ()
) -> PIL.Image.Image:
    """Draw a caption above pictures, next to each other in ``columns`` columns.

    Args:
        pictures: all of about one size; None leaves a column empty.
        below: a label below each picture.
    """
    there = [picture for picture in pictures if picture is not None]
    cell = (max(picture.width for picture in there), max(picture.height for picture in there))
    width = columns * (cell[0] + _GAP)
    lines = wrap_text(caption, width - 4)
    top = LINE_HEIGHT * len(lines) + 4
    row = PIL.Image.new("RGB", (width, top + cell[1] + 6 + (LINE_HEIGHT if below else 0)), "white")
    draw = PIL.ImageDraw.Draw(row)
    draw_lines(draw, 2, 2, lines)
    for column, picture in enumerate(pictures):
        if picture is not None:
            row.paste(picture, (column * (cell[0] + _GAP), top))
    for column, label in enumerate(below):
        draw_lines(draw, column * (cell[0] + _GAP) + 2, top + cell[1], [label])
    return row


def side_by_side(pictures: Sequence[PIL.Image.Image]) -> PIL.Image.Image:
    """Return sheets, or rows of them, next to each other."""
    width = sum(picture.width for picture in pictures) + _APART * (len(pictures) - 1)
    joined = PIL.Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        joined.paste(picture, (left, 0))
        left += picture.width + _APART
    return joined


def write_rows(
    path: Path, rows: Sequence[PIL.Image.Image], contents: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write rows below each other as one PNG, with ``contents`` inside, for `read_contents`."""
    sheet = PIL.Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    info = PIL.PngImagePlugin.PngInfo()
    if contents:
        info.add_itxt(_CONTENTS, json.dumps(list(contents), ensure_ascii=False))
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG", pnginfo=info)


def check_replaceable(output: Path) -> None:
    """Raise UserError if there is a file that is no contact sheet."""
    if output.exists() and not read_contents(output):
        raise UserError(f"{output} exists, and is no contact sheet: choose another --output.")


def read_contents(path: Path) -> list[dict[str, Any]]:
    """Return the contents that `write_rows` wrote into a sheet; an empty list for any other file."""
    try:
        with PIL.Image.open(path) as image:
            return json.loads(image.info.get(_CONTENTS, "[]"))
    except (OSError, ValueError):
        return []


def scaled(frame: np.ndarray, tile: int = 128) -> PIL.Image.Image:
    """Return a frame ``[H W 3]`` scaled to about ``tile`` pixels, by a whole factor if it is smaller."""
    H, W, _ = frame.shape
    scale = max(1, tile // max(H, W)) if max(H, W) <= tile else tile / max(H, W)
    size = (max(1, round(W * scale)), max(1, round(H * scale)))
    resample = PIL.Image.Resampling.NEAREST if scale >= 1 else PIL.Image.Resampling.LANCZOS
    return PIL.Image.fromarray(frame).resize(size, resample)
