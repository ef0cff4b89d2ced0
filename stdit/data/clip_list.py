"""List of the clips that a run trains on, kept in a file, to say in words how another list differs.

Letter: N clips.
"""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from stdit.data.assignment import Assignment
from stdit.data.manifest.clips import NOT_CONTENT, NUMBER_COLUMNS, Clips
from stdit.data.manifest.index import clips_of_tensors, tensors_of_clips
from stdit.errors import UserError, listed

MAX_NAMED_CLIPS = 3
"""Clips that are named for each kind of difference."""
MAX_CAPTION = 60
"""Characters that are shown of a caption."""


@dataclass(frozen=True)
class ClipList:
    """The clips (or windows) that train, bucket by bucket."""

    clips: Clips
    buckets: list[str]
    """Names of the buckets."""
    bucket: np.ndarray
    """For each clip its place in `buckets`, int64 [N]."""

    @classmethod
    def of(cls, assignment: Assignment) -> "ClipList":
        """Return the list of the clips in an assignment, without their roots: data may move."""
        places = np.concatenate(assignment.members)
        clips = replace(assignment.clips.take(places), roots=(None,), root=np.zeros((), np.int32), extra={})
        bucket = np.repeat(np.arange(len(assignment.members)), [len(part) for part in assignment.members])
        return cls(clips, [str(bucket) for bucket in assignment.buckets], bucket)

    def to_bytes(self) -> bytes:
        """Return the compressed content of a file: equal lists have equal bytes."""
        names = np.frombuffer("\n".join(self.buckets).encode(), np.uint8)
        content = save(tensors_of_clips(self.clips) | {"buckets": names, "bucket": self.bucket})
        return gzip.compress(content, compresslevel=1, mtime=0)

    @classmethod
    def read(cls, file: Path) -> "ClipList":
        """Read what `to_bytes` returned from a file. Raises UserError if it is damaged."""
        try:
            tensors = load(gzip.decompress(file.read_bytes()))
            names = tensors["buckets"].tobytes().decode().split("\n")
            return cls(clips_of_tensors(tensors), names, tensors["bucket"])
        except (OSError, EOFError, KeyError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{file} is no list of clips ({error}): use another checkpoint, or delete this one to resume from "
                "the one before it."
            ) from None

    def changes_since(self, old: "ClipList") -> list[str]:
        """Return in words how this list differs from an older one; a few clips are named for each kind of change."""
        places, old_places = _common(_identities(self.clips), _identities(old.clips))
        new = np.setdiff1d(np.arange(len(self.clips)), places)
        gone = np.setdiff1d(np.arange(len(old.clips)), old_places)
        found = []
        if len(new) or len(gone):
            parts = [f"new: {self._names(new)}"] if len(new) else []
            parts += [f"gone: {old._names(gone)}"] if len(gone) else []
            found.append(f"{len(old.clips)} -> {len(self.clips)} clips ({'; '.join(parts)})")
        for what, values, old_values in self._columns(old):
            differ = values[places] != old_values[old_places]
            differ &= ~(
                (values[places] != values[places]) & (old_values[old_places] != old_values[old_places])
            )
            if differ.any():
                found.append(self._change(what, old, places[differ], old_places[differ]))
        if not found:
            found.append("the order of the clips in the manifest")
        return found

    def _columns(self, old: "ClipList") -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield the name of each property of clips, and its values here and in an older list."""
        yield "caption", self.clips.texts.digests(), old.clips.texts.digests()
        yield "bucket", np.array(self.buckets)[self.bucket], np.array(old.buckets)[old.bucket]
        for name in NUMBER_COLUMNS:
            if name not in (*NOT_CONTENT, "start", "end"):  # which are part of the identity
                yield name, getattr(self.clips, name), getattr(old.clips, name)

    def _change(self, what: str, old: "ClipList", places: np.ndarray, old_places: np.ndarray) -> str:
        """Return the words for clips, here and in an older list, that differ in one property."""
        first = self._first_windows(places)
        named = first[:MAX_NAMED_CLIPS]
        shown = []
        for place, old_place in zip(places[named], old_places[named], strict=True):
            before, after = old._value(what, old_place), self._value(what, place)
            if what == "caption":
                before, after = _excerpts(before, after)
            shown.append(f"{self._name(place)}: {before} -> {after}")
        return f"{what} of {listed(shown, len(first))}"

    def _value(self, what: str, place: int) -> str:
        if what == "caption":
            return self.clips.texts[int(place)]
        if what == "bucket":
            return self.buckets[self.bucket[place]]
        return f"{getattr(self.clips, what)[place]:g}"

    def _first_windows(self, places: np.ndarray) -> np.ndarray:
        """Return the indices in ``places``, ascending, of the first window of each row and file."""
        clips = self.clips.files[places] * np.uint64(31) + self.clips.row[places].astype(np.uint64)
        return np.sort(np.unique(clips, return_index=True)[1])

    def _names(self, places: np.ndarray) -> str:
        first = self._first_windows(places)
        return listed([self._name(place) for place in places[first[:MAX_NAMED_CLIPS]]], len(first))

    def _name(self, place: int) -> str:
        """Return the row of a clip, if it is known, and its file."""
        clips, place = self.clips, int(place)
        name = "/".join(filter(None, (clips.paths[place], clips.members[place])))
        return f"row {clips.row[place]} ({name})" if clips.row[place] else name


def _identities(clips: Clips) -> np.ndarray:
    """Return a hash of the file and the window of each clip, uint64 [N]; clips that are listed again have another."""
    window = [(np.ascontiguousarray(part) + 0.0).view(np.uint64) for part in (clips.start, clips.end)]
    hashes = (clips.files * np.uint64(31) + window[0]) * np.uint64(31) + window[1]
    order = np.argsort(hashes, kind="stable")
    _, first, counts = np.unique(hashes[order], return_index=True, return_counts=True)
    repetition = np.empty(len(clips), np.int64)
    repetition[order] = np.arange(len(clips)) - np.repeat(first, counts)
    return hashes + repetition.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def _common(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the values that both have, in the order of the first."""
    _, places, other_places = np.intersect1d(one, other, assume_unique=True, return_indices=True)
    order = places.argsort()
    return places[order], other_places[order]


def _excerpts(before: str, after: str) -> tuple[str, str]:
    """Return two captions, quoted, cut so that the first difference is seen."""
    same = next(
        (place for place, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]),
        min(len(before), len(after)),
    )
    begin = max(0, same - MAX_CAPTION // 2) if max(len(before), len(after)) > MAX_CAPTION else 0
    return _quoted(before, begin), _quoted(after, begin)


def _quoted(caption: str, begin: int) -> str:
    end = begin + MAX_CAPTION
    return f'"{"..." * (begin > 0)}{caption[begin:end]}{"..." * (end < len(caption))}"'
