"""Pages of the gallery: what they show, and the conditions of SQLite that select it. Imports no torch."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stdit.serve.errors import RequestError
from stdit.serve.gallery.gallery_index import FACT_COLUMNS, OURS
from stdit.serve.gallery.gallery_scan import VideoFacts
from stdit.serve.json_values import whole_text

GALLERY_COLUMNS = f"id, key, folder, name, changed, bytes, state, {FACT_COLUMNS}"
"""What `video_of_row` takes."""
_CURSOR = re.compile(r"(-?\d{1,19})-(\d{1,18})", re.ASCII)
_MOST_WORDS = 20


@dataclass(frozen=True)
class GalleryVideo(VideoFacts):
    """A video of the gallery."""

    id: str
    name: str
    """Of the file."""
    folder: str
    """Below the folder of outputs; empty for that itself."""
    created: float
    """Unix seconds."""
    bytes: int
    seconds: float | None


@dataclass(frozen=True)
class GalleryPage:
    """Some videos of the gallery, newest first."""

    data: list[GalleryVideo]
    next: str | None
    """Where the next page begins; None: this is the last."""
    total: int
    """Videos that match, as far as they are known: see ``indexing``."""
    checkpoints: list[str]
    """Names to filter by."""
    indexing: bool
    """Whether files are still to be read, which a search does not find yet."""


def page_filters(search: str, checkpoint: str | None) -> tuple[list[str], list[str]]:
    """Return the conditions of a listing, and their values; none: all videos, read or not.

    Raises:
        RequestError: for too many words.
    """
    words = whole_text(search).casefold().split()
    if len(words) > _MOST_WORDS:
        raise RequestError(
            f"search has {len(words)} words: at most {_MOST_WORDS} are looked for: leave some out.",
            param="search",
        )
    # Not FTS5: it finds whole words, and prompts in Chinese or Japanese have no spaces.
    conditions, values = ["instr(folded, ?) > 0"] * len(words), words
    if checkpoint is not None:
        conditions, values = [*conditions, "checkpoint = ?"], [*values, whole_text(checkpoint)]
    return [f"state = {OURS}", *conditions] if conditions else [], values


def after_cursor(before: str | None) -> tuple[list[str], list[int]]:
    """Return the condition of a cursor, and its values. Raises RequestError if it is none."""
    if before is None:
        return [], []
    found = _CURSOR.fullmatch(before)
    if found is None or abs(int(found[1])) >= 2**63:
        raise RequestError(
            f"before = {whole_text(before)[:40]!r}: must be what `next` of the page before says; leave it out for "
            "the first page.",
            param="before",
        )
    return ["(changed, id) < (?, ?)"], [int(found[1]), int(found[2])]


def video_of_row(row: Sequence[Any]) -> GalleryVideo:
    """Return the video of a row with `GALLERY_COLUMNS`."""
    _, key, folder, name, changed, size, _, *facts = row
    known = VideoFacts(*facts)
    return GalleryVideo(
        **asdict(known),
        id=key,
        name=name,
        folder=folder.rstrip("/"),
        created=changed / 1e9,
        bytes=size,
        seconds=round(known.num_frames / known.fps, 3) if known.num_frames and known.fps else None,
    )
