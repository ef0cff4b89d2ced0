"""Tables of clips, stored by column so that a million clips fit in a few hundred MB.

Letter: N clips.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, overload

import numpy as np
import xxhash

from stdit.data.decoding.media import Media
from stdit.data.manifest.fields import FIELD_ORDER_WORDS

_STRINGS_PER_PIECE = 65536
WHOLE_FILE = -1
"""Value of `Clips.size` for clips that are whole files."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A video, an image (a video of one frame), or a part of a video, with its caption."""

    media: Media
    """Location of its bytes; whether they exist, inside the data root, is checked when they are read."""
    text: str
    num_frames: int
    """Number of frames between `start` and `end`."""
    fps: float
    """Mean frames per second, so that num_frames / fps is the duration in seconds."""
    height: int
    """Pixels, after rotation."""
    width: int
    extra: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Further columns of the manifest."""
    start: float = 0.0
    """Seconds after the first frame of the file where the clip begins."""
    end: float | None = None
    """Seconds after the first frame of the file where the clip ends; None: with the file."""
    weight: float = 1.0
    """How often it is drawn per epoch: 2 is twice, 0.5 in every other epoch on average."""

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    @property
    def field_order(self) -> str:
        """Of the file, as the manifest states it, see `decode_clip`; empty if it does not."""
        return FIELD_ORDER_WORDS[self.extra.get("field_order", "")]


class Strings(Sequence[str]):
    """A read-only sequence of N strings, stored as one piece of UTF-8 and an array of offsets."""

    __slots__ = ("offsets", "utf8")

    def __init__(self, strings: Iterable[str] = ()) -> None:
        strings = list(strings)
        pieces: Sequence[str] | Sequence[bytes] = strings
        self.utf8 = "".join(strings).encode("utf-8", "surrogatepass")
        if not self.utf8.isascii():  # characters are not bytes
            pieces = [string.encode("utf-8", "surrogatepass") for string in strings]
        self.offsets = np.fromiter(accumulate(map(len, pieces), initial=0), np.int64, len(strings) + 1)

    @classmethod
    def of(cls, utf8: bytes, offsets: np.ndarray) -> "Strings":
        """Make the sequence of its UTF-8 and offsets, without a copy."""
        made = cls.__new__(cls)
        made.utf8, made.offsets = utf8, offsets
        return made

    @classmethod
    def concatenate(cls, parts: Sequence["Strings"]) -> "Strings":
        begins = accumulate((len(part.utf8) for part in parts), initial=0)
        offsets = [part.offsets[:-1] + begin for part, begin in zip(parts, begins, strict=False)]
        total = sum(len(part.utf8) for part in parts)
        return cls.of(b"".join(part.utf8 for part in parts), np.concatenate([*offsets, [total]]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Strings": ...
    def __getitem__(self, index: int | slice) -> "str | Strings":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        place = range(len(self))[index]
        begin, end = self.offsets[place], self.offsets[place + 1]
        return self.utf8[begin:end].decode("utf-8", "surrogatepass")

    def take(self, places: np.ndarray) -> "Strings":
        """Return the strings at these places, in this order."""
        lengths = self.offsets[places + 1] - self.offsets[places]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return self.of(b"".join(self.pieces(places)), offsets)

    def digests(self) -> np.ndarray:
        """Return a hash of each string, uint64 [N]."""
        if not self.utf8:
            return np.zeros(len(self), np.uint64)
        content, ends = memoryview(self.utf8), self.offsets.tolist()
        spans = zip(ends, ends[1:], strict=False)
        return np.fromiter((xxhash.xxh3_64_intdigest(content[a:b]) for a, b in spans), np.uint64, len(self))

    def pieces(self, places: np.ndarray) -> Iterator[bytes]:
        """Yield the UTF-8 of the strings at these places, many strings per piece, for hashing and copying."""
        for chunk in np.array_split(places, range(_STRINGS_PER_PIECE, len(places), _STRINGS_PER_PIECE)):
            begins, ends = self.offsets[chunk].tolist(), self.offsets[chunk + 1].tolist()
            yield b"".join([self.utf8[begin:end] for begin, end in zip(begins, ends, strict=True)])


NUMBER_COLUMNS = {
    "num_frames": np.int32,
    "fps": np.float64,
    "height": np.int32,
    "width": np.int32,
    "start": np.float64,
    "end": np.float64,
    "weight": np.float64,
    "root": np.int32,
    "offset": np.int64,
    "size": np.int64,
    "row": np.int32,
}
"""Numeric columns of `Clips`."""

COLUMN_DEFAULTS = {
    "start": 0.0,
    "end": math.nan,
    "weight": 1.0,
    "root": 0,
    "offset": 0,
    "size": WHOLE_FILE,
    "row": 0,
}
"""Values of optional columns."""
NOT_CONTENT = ("root", "row")
"""Columns that say where a clip is listed, and not what it is."""


@dataclass(frozen=True, eq=False)
class Clips(Sequence[Clip]):
    """A read-only table of N clips by column; `clips[i]` makes a `Clip`."""

    paths: Strings
    """Relative to the clip's root."""
    texts: Strings
    num_frames: np.ndarray
    """int32 [N]; this and all columns below may be given as a single value for all clips."""
    fps: np.ndarray
    """float64"""
    height: np.ndarray
    """int32"""
    width: np.ndarray
    """int32"""
    start: np.ndarray = field(default=COLUMN_DEFAULTS["start"])  # type: ignore[arg-type]
    """float64, seconds"""
    end: np.ndarray = field(default=COLUMN_DEFAULTS["end"])  # type: ignore[arg-type]
    """float64, seconds; nan: the end of the file"""
    weight: np.ndarray = field(default=COLUMN_DEFAULTS["weight"])  # type: ignore[arg-type]
    """float64"""
    root: np.ndarray = field(default=COLUMN_DEFAULTS["root"])  # type: ignore[arg-type]
    """int32, places in `roots`"""
    roots: tuple[str | None, ...] = (None,)
    """Folders with links resolved, or URLs."""
    members: Strings = field(default=None)  # type: ignore[assignment]
    """Names inside the archives at `paths`; an empty string for clips that are files; None: all are files."""
    offset: np.ndarray = field(default=COLUMN_DEFAULTS["offset"])  # type: ignore[arg-type]
    """int64, bytes from the start of the archive"""
    size: np.ndarray = field(default=COLUMN_DEFAULTS["size"])  # type: ignore[arg-type]
    """int64, bytes; WHOLE_FILE: to the end"""
    row: np.ndarray = field(default=COLUMN_DEFAULTS["row"])  # type: ignore[arg-type]
    """int32, place in its manifest, from 1; 0: unknown"""
    extra: dict[str, Strings] = field(default_factory=dict)
    """Further columns by name; an empty string where a clip has none."""

    def __post_init__(self) -> None:
        count = len(self.paths)
        for name, dtype in NUMBER_COLUMNS.items():
            column = np.broadcast_to(
                np.asarray(getattr(self, name), dtype), (count,)
            )  # a view, of no size if all alike
            object.__setattr__(self, name, column)
        object.__setattr__(self, "members", self.members or Strings([""] * count))
        assert all(len(strings) == count for strings in (self.texts, self.members, *self.extra.values()))

    @classmethod
    def of(cls, clips: Iterable[Clip]) -> "Clips":
        """Make a table of single clips."""
        clips = list(clips)
        media = [clip.media for clip in clips]
        roots = list(dict.fromkeys(one.root for one in media)) or [None]
        place = {root: index for index, root in enumerate(roots)}
        numbers: dict[str, Any] = {
            name: [getattr(clip, name) for clip in clips]
            for name in ("num_frames", "fps", "height", "width", "start", "weight")
        }
        names = dict.fromkeys(name for clip in clips for name in clip.extra)
        return cls(
            Strings(one.location.removeprefix(_folder(one.root)) for one in media),
            Strings(clip.text for clip in clips),
            **numbers,
            end=np.array([math.nan if clip.end is None else clip.end for clip in clips]),
            root=np.array([place[one.root] for one in media]),
            roots=tuple(roots),
            members=Strings(one.member for one in media),
            offset=np.array([one.offset for one in media]),
            size=np.array([WHOLE_FILE if one.size is None else one.size for one in media]),
            extra={name: Strings(clip.extra.get(name, "") for clip in clips) for name in names},
        )

    @classmethod
    def concatenate(cls, parts: Sequence["Clips"]) -> "Clips":
        """Return the clips of all tables, one table after the other, with the union of roots and extra columns."""
        roots = list(dict.fromkeys(root for part in parts for root in part.roots))
        names = dict.fromkeys(name for part in parts for name in part.extra)
        places = [np.array([roots.index(root) for root in part.roots]) for part in parts]
        columns: dict[str, Any] = {
            name: _joined([getattr(part, name) for part in parts]) for name in NUMBER_COLUMNS
        }
        columns["root"] = _joined([place[part.root] for place, part in zip(places, parts, strict=True)])
        return cls(
            Strings.concatenate([part.paths for part in parts]),
            Strings.concatenate([part.texts for part in parts]),
            **columns,
            roots=tuple(roots),
            members=Strings.concatenate([part.members for part in parts]),
            extra={
                name: Strings.concatenate(
                    [part.extra.get(name) or Strings([""] * len(part)) for part in parts]
                )
                for name in names
            },
        )

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Clip: ...
    @overload
    def __getitem__(self, index: slice) -> "Clips": ...
    def __getitem__(self, index: int | slice) -> "Clip | Clips":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        place = range(len(self))[index]
        root = self.roots[self.root[place]]
        end, size = float(self.end[place]), int(self.size[place])
        return Clip(
            media=Media(
                _folder(root) + self.paths[place],
                self.members[place],
                int(self.offset[place]),
                None if size == WHOLE_FILE else size,
                root,
            ),
            text=self.texts[place],
            num_frames=int(self.num_frames[place]),
            fps=float(self.fps[place]),
            height=int(self.height[place]),
            width=int(self.width[place]),
            extra={name: strings[place] for name, strings in self.extra.items()},
            start=float(self.start[place]),
            end=None if math.isnan(end) else end,
            weight=float(self.weight[place]),
        )

    def take(self, places: np.ndarray) -> "Clips":
        """Return the clips at these places, in this order."""
        return Clips(
            self.paths.take(places),
            self.texts.take(places),
            **{name: getattr(self, name)[places] for name in NUMBER_COLUMNS},
            roots=self.roots,
            members=self.members.take(places),
            extra={name: strings.take(places) for name, strings in self.extra.items()},
        )

    def content(self, places: np.ndarray) -> Iterator[bytes]:
        """Yield the bytes that identify the clips at these places, wherever they are listed, for hashing."""
        for name in ("paths", "texts", "members"):
            strings = getattr(self, name)
            lengths = strings.offsets[places + 1] - strings.offsets[places]
            if lengths.any():
                yield name.encode() + lengths.tobytes()
                yield from strings.pieces(places)
        for name in NUMBER_COLUMNS:
            values = getattr(self, name)[places]
            usual = name in COLUMN_DEFAULTS and np.array_equal(
                values, np.full_like(values, COLUMN_DEFAULTS[name]), equal_nan=True
            )
            if name not in NOT_CONTENT and not usual:
                yield name.encode() + values.tobytes()

    @cached_property
    def files(self) -> np.ndarray:
        """Hash of each clip's file (or member of an archive), uint64 [N]: parts of one file have the same hash."""
        return self.paths.digests() * np.uint64(31) + self.members.digests() + self.root.astype(np.uint64)

    @property
    def seconds(self) -> np.ndarray:
        """Duration of each clip, float64 [N]."""
        return self.num_frames / self.fps


def _folder(root: str | None) -> str:
    """Return the prefix of paths in a root."""
    return "" if root is None else root.rstrip("/") + "/"


def _joined(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate columns; return a single value if all entries are equal."""
    columns = [column for column in columns if len(column)] or columns[:1]
    firsts = np.array([column[0] for column in columns if len(column)])
    alike = all(column.strides == (0,) for column in columns) and len(np.unique(firsts)) == 1
    return firsts[0] if alike else np.concatenate(columns)
