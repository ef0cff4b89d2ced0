"""Turn rows of a manifest into clips by column, for rows with complete metadata, without accessing files."""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np

from stdit.data.manifest.caption_scores import score_suffix
from stdit.data.manifest.clips import Clips, Strings
from stdit.data.manifest.fields import FIELD_ORDER_WORDS, LIMITS, clip_span, is_allowed, read_numbers
from stdit.data.manifest.rows import BYTE_RANGE_COLUMNS, FIELD_ORDER, METADATA, REQUIRED, SPAN_COLUMNS, Rows

KNOWN_COLUMNS = frozenset((*REQUIRED, *METADATA, *SPAN_COLUMNS, *BYTE_RANGE_COLUMNS, "member"))


class Scan(NamedTuple):
    """The rows of a manifest, before any file is accessed."""

    clips: Clips
    """Clips of the rows with complete metadata."""
    places: np.ndarray
    """Row numbers of `clips`, int64, ascending."""
    unread: dict[int, tuple[dict[str, str], str]]
    """The other rows by number: fields, and the reason if they are refused."""

    @property
    def total(self) -> int:
        """Number of rows."""
        return len(self.places) + len(self.unread)


def scan_rows(chunks: Iterator[Rows], root: str, caption_scores: Sequence[str], weight: float) -> Scan:
    """Scan all rows of a manifest."""
    parts: list[Clips] = [Clips.of([])]
    places: list[np.ndarray] = [np.empty(0, np.int64)]
    unread: dict[int, tuple[dict[str, str], str]] = {}
    count = 0
    with _no_garbage_collection():
        for rows in chunks:
            add_scores(rows, caption_scores)
            clips, complete = _complete_clips(rows, root, weight)
            parts.append(clips)
            places.append(count + np.flatnonzero(complete))
            for place in np.flatnonzero(~complete).tolist():
                unread[count + place] = rows.fields(place), rows.refused.get(place, "")
            count += len(rows)
    return Scan(Clips.concatenate(parts), np.concatenate(places), unread)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pause garbage collection: rows have no reference cycles, but scanning many objects takes long."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def add_scores(rows: Rows, caption_scores: Sequence[str]) -> None:
    """Append the values of score columns to the captions, in place."""
    given = {name: rows.columns[name] for name in caption_scores if name in rows.columns}
    if given:
        texts = rows.columns["text"]
        for place, values in enumerate(zip(*given.values(), strict=True)):
            if texts[place]:
                texts[place] += score_suffix(dict(zip(given, values, strict=True)))


def _complete_clips(rows: Rows, root: str, weight: float) -> tuple[Clips, np.ndarray]:
    """Return the clips of rows with complete metadata, and which rows those are, bool [rows]."""
    count = len(rows)
    numbers = {name: read_numbers(rows.columns.get(name), count) for name in LIMITS}
    given = {name: ~np.isnan(column) for name, column in numbers.items()}
    members = rows.columns.get("member") or [""] * count
    paths = _plain(rows.columns["path"], root)

    complete = np.ones(count, bool)
    for name, column in numbers.items():
        complete &= is_allowed(name, column) | (name not in METADATA and ~given[name])
    for strings in (paths, rows.columns["text"]):
        complete &= _given(strings)
    in_archive = _given(members)
    complete &= (given["offset"] == in_archive) & (given["size"] == in_archive)
    complete[list(rows.refused)] = False
    if not set(orders := rows.columns.get(FIELD_ORDER, ())) <= FIELD_ORDER_WORDS.keys():
        complete &= np.array([order in FIELD_ORDER_WORDS for order in orders])
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        start, end, num_frames = clip_span(*(numbers[name] for name in ("num_frames", "fps", "start", "end")))
    complete &= num_frames > 0

    chosen = complete.tolist()
    clips = Clips(
        Strings(compress(paths, chosen)),
        Strings(compress(rows.columns["text"], chosen)),
        num_frames=num_frames[complete],
        fps=numbers["fps"][complete],
        height=numbers["height"][complete],
        width=numbers["width"][complete],
        start=start[complete],
        end=end[complete],
        weight=np.asarray(weight),
        members=Strings(compress(members, chosen)),
        offset=np.where(in_archive, numbers["offset"], 0)[complete],
        size=np.where(in_archive, numbers["size"], -1)[complete],
        roots=(root,),
        extra={
            name: Strings(compress(column, chosen))
            for name, column in rows.columns.items()
            if name not in KNOWN_COLUMNS
        },
    )
    return clips, complete


def _given(strings: list[str]) -> np.ndarray:
    """Return which strings are not empty, bool [strings]."""
    if all(strings):
        return np.ones(len(strings), bool)
    return np.fromiter(map(bool, strings), bool, len(strings))


def _plain(paths: list[str], root: str) -> list[str]:
    """Return paths relative to the root; empty if the name alone does not tell that the path lies inside."""
    # Usually one search through all of them shows that none is odd.
    text = "\n".join(["", *paths, ""])
    if not any(odd in text for odd in ("\n/", "./", "//", "\0", "\n.\n", "\n..\n")):
        return paths
    below = [path.removeprefix(root.rstrip("/") + "/") for path in paths]
    return ["" if _is_odd(path) else path for path in below]


def _is_odd(path: str) -> bool:
    return path.startswith("/") or path in (".", "..") or any(odd in path for odd in ("./", "//", "\0"))
