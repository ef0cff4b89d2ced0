"""From a manifest to clips: what is there, what it says about itself, and what has to be left out and why.

Rows are read by column, many at a time. A row that says everything about its clip costs no look at the file system,
since a million of them would take minutes; its file is checked when it is opened.
"""

import csv
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from stdit.data.clips import Clip, Clips, Strings
from stdit.data.decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES, DecodeError, probe
from stdit.data.media import Media, MediaError, inside
from stdit.errors import UserError

__all__ = ["Clip", "Clips", "Skipped", "read_manifest", "read_texts", "summarise"]

REQUIRED = ("path", "text")
METADATA = ("num_frames", "fps", "height", "width")
ROWS_AT_ONCE = 65536
LARGEST_NUMBER = 2**31 - 1
EXAMPLES = 2
"""Of one kind of reason that a summary names."""


class Skipped(NamedTuple):
    """Something left out. `reason` is "kind" or "kind: detail"; reports count by kind."""

    path: str
    reason: str


class Kind(NamedTuple):
    """Cases of one kind of reason."""

    total: int
    examples: list[Skipped]


class _Row(NamedTuple):
    path: str
    text: str
    fields: dict[str, str]


class _Rows(NamedTuple):
    """Rows by column: fields by name, "path" and "text" among them, stripped."""

    columns: dict[str, list[str]]
    malformed: dict[int, str]
    """Why a row is none, by its place."""

    def __len__(self) -> int:
        return len(self.columns["path"])

    def row(self, place: int) -> _Row:
        fields = {name: column[place] for name, column in self.columns.items()}
        if place in self.malformed:
            fields["overflow"] = self.malformed[place]
        return _Row(fields.pop("path"), fields.pop("text"), fields)


def read_manifest(manifest: Path, root: Path | None = None) -> tuple[Clips, list[Skipped]]:
    """Clips in the order of the manifest, and what was left out.

    Args:
        manifest: a CSV in UTF-8 with the columns path,text and any of num_frames,fps,height,width (what is
            not given is probed from the file) and others (kept in `Clip.extra`); or a folder that holds videos
            and images, each with its caption in a .txt of the same name beside it.
        root: paths are relative to it, and a file outside it is never opened; default: the manifest's folder.

    Raises UserError when the manifest itself is unusable or nothing is left.
    """
    manifest = Path(manifest)
    if not manifest.exists():
        raise UserError(f"manifest {manifest} does not exist: check data.manifest")
    if root is None:
        root = manifest if manifest.is_dir() else manifest.parent
    if not root.is_dir():
        raise UserError(f"data root {root} is not a folder: check data.root")
    resolved_root = root.resolve()

    parts: list[Clips] = []
    places: list[np.ndarray] = []  # of the parts' clips among all rows
    rest: dict[int, _Row] = {}  # rows that need a closer look, by place
    count = 0
    for rows in _folder_rows(manifest, root) if manifest.is_dir() else _csv_rows(manifest):
        clips, complete = _complete_clips(rows, resolved_root)
        parts.append(clips)
        places.append(count + np.flatnonzero(complete))
        rest.update((count + place, rows.row(place)) for place in np.flatnonzero(~complete).tolist())
        count += len(rows)
    if not count:
        raise UserError(
            f"manifest {manifest} lists no clips: add rows below the header, or videos to the folder"
        )

    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda row: _read_row(row, resolved_root), rest.values())
        bar = tqdm(results, total=len(rest), desc="reading clips", unit="clip", delay=3, disable=None)
        outcomes = dict(zip(rest, bar, strict=True))
    skipped = [outcome for outcome in outcomes.values() if isinstance(outcome, Skipped)]
    read = {place: outcome for place, outcome in outcomes.items() if isinstance(outcome, Clip)}
    clips = Clips.concatenate([*parts, Clips.of(read.values())])
    if not len(clips):
        raise UserError("\n".join([f"manifest {manifest}: no clip can be used", *summarise(skipped)]))
    if read:
        clips = clips.take(np.concatenate([*places, np.array(list(read))]).argsort())
    return clips, skipped


def read_texts(manifest: Path) -> list[str]:
    """The captions of a manifest, whose files are not opened. Raises UserError."""
    chunks = _folder_rows(manifest, manifest) if manifest.is_dir() else _csv_rows(manifest)
    return [text for rows in chunks for text in rows.columns["text"] if text]


def summarise(skipped: Iterable[Skipped]) -> list[str]:
    """One line for each kind of reason, most frequent first, with a count and the first examples."""
    kinds: dict[str, Kind] = {}
    for case in skipped:
        name = case.reason.partition(": ")[0]
        total, examples = kinds.get(name, Kind(0, []))
        kinds[name] = Kind(total + 1, examples if len(examples) == EXAMPLES else [*examples, case])
    return summary_lines(kinds)


def summary_lines(kinds: dict[str, Kind]) -> list[str]:
    """One line for each kind of reason, as `summarise` gives."""
    lines = []
    for kind, (count, examples) in sorted(kinds.items(), key=lambda item: -item[1].total):
        details = [(path, reason.partition(": ")[2]) for path, reason in examples]
        cases = ", ".join(f"{path} ({detail})" if detail else path for path, detail in details)
        lines.append(f"  {count} x {kind}: {cases}{', ...' if count > len(examples) else ''}")
    return lines


def _csv_rows(manifest: Path) -> Iterator[_Rows]:
    try:
        with manifest.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            names = next((row for row in reader if row), None)
            if names is None:
                raise UserError(
                    f"manifest {manifest} is empty: its first line must name the columns path,text"
                )
            names = [name.strip() for name in names]
            for column in REQUIRED:
                if column not in names:
                    raise UserError(
                        f"manifest {manifest} has no column {column!r}; it has "
                        f"{', '.join(names)}: its first line must name at least path,text"
                    )
            rows: list[list[str]] = []
            malformed: dict[int, str] = {}
            for row in reader:
                if len(row) != len(names):
                    if not row:
                        continue
                    if len(row) > len(names):
                        malformed[len(rows)] = f"line {reader.line_num} has more fields than the header"
                    row = (row + [""] * len(names))[: len(names)]
                rows.append(row)
                if len(rows) == ROWS_AT_ONCE:
                    yield _by_column(names, rows, malformed)
                    rows, malformed = [], {}
            if rows:
                yield _by_column(names, rows, malformed)
    except UnicodeDecodeError as error:
        raise UserError(f"manifest {manifest} is not UTF-8 ({error}): save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"manifest {manifest}, line {reader.line_num}: {error}: check its quotes") from error
    except OSError as error:
        raise UserError(f"manifest {manifest} cannot be read: {error.strerror}") from error


def _by_column(names: list[str], rows: list[list[str]], malformed: dict[int, str]) -> _Rows:
    columns = {
        name: [value.strip() for value in column]
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }
    return _Rows(columns, malformed)


def _folder_rows(folder: Path, root: Path) -> Iterator[_Rows]:
    suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    paths, texts = [], []
    for path in sorted(p for p in folder.absolute().rglob("*") if p.suffix.lower() in suffixes):
        caption = path.with_suffix(".txt")
        inside = caption.resolve().is_relative_to(root.resolve())
        try:
            text = caption.read_text(encoding="utf-8-sig").strip() if inside and caption.is_file() else ""
        except (OSError, UnicodeDecodeError):
            text = ""
        paths.append(str(path))
        texts.append(text)
    if paths:
        yield _Rows({"path": paths, "text": texts}, {})


def _complete_clips(rows: _Rows, root: Path) -> tuple[Clips, np.ndarray]:
    """Clips of the rows that say everything about them, and which rows those are, bool [rows]. `root` is resolved."""
    count = len(rows)
    numbers = {name: _numbers(rows.columns.get(name, [""] * count), whole=name != "fps") for name in METADATA}
    paths = [_inside(path, str(root)) for path in rows.columns["path"]]
    complete = np.isfinite(np.stack(list(numbers.values()))).all(axis=0)  # [rows]
    for column in (paths, rows.columns["text"]):
        complete &= np.fromiter(map(bool, column), bool, count)
    complete[list(rows.malformed)] = False
    chosen = complete.tolist()
    extra = {name: column for name, column in rows.columns.items() if name not in (*REQUIRED, *METADATA)}
    clips = Clips(
        Strings(compress(paths, chosen)),
        Strings(compress(rows.columns["text"], chosen)),
        **{name: column[complete] for name, column in numbers.items()},
        roots=(str(root),),
        extra={name: Strings(compress(column, chosen)) for name, column in extra.items()},
    )
    return clips, complete


def _inside(path: str, root: str) -> str:
    """A path below the root, relative to it; empty where only a look at the files can tell."""
    if os.path.isabs(path):
        path = path[len(root) + 1 :] if path.startswith(root + os.sep) else ""
    return "" if ".." in path or "\0" in path or os.path.isabs(path) else path


def _numbers(column: list[str], whole: bool) -> np.ndarray:
    """The numbers of a column, float64; nan for what cannot be one, or is not given."""
    try:
        numbers = np.fromiter(map(float, column), np.float64, len(column))
    except ValueError:
        numbers = np.array([_number(text, whole) or math.nan for text in column])
    good = (numbers > 0) & (numbers <= LARGEST_NUMBER) & ((numbers == np.floor(numbers)) | (not whole))
    return np.where(good, numbers, math.nan)


def _read_row(row: _Row, root: Path) -> Clip | Skipped:
    """The clip of one row, or why it has to be left out. `root` is resolved."""
    if "overflow" in row.fields:
        return Skipped(row.path, f"malformed row: {row.fields['overflow']}; quote captions that hold commas")
    if not row.path:
        return Skipped("(no path)", "path missing")
    if not row.text:
        return Skipped(row.path, "caption missing")
    try:
        media = _media(row.path, str(root))
        media.local_path()
    except MediaError as error:
        return Skipped(row.path, str(error))

    given: dict[str, float] = {}
    for name in METADATA:
        if value := row.fields.get(name):
            number = _number(value, whole=name != "fps")
            if number is None:
                kind = "number" if name == "fps" else "whole number"
                return Skipped(row.path, f"{name} is not a {kind} above 0: {value!r}")
            given[name] = number
    if len(given) < len(METADATA):
        try:
            given = probe(media)._asdict() | given
        except DecodeError as error:
            return Skipped(row.path, f"cannot be read: {error.reason}")
    return Clip(
        media=media,
        text=row.text,
        num_frames=int(given["num_frames"]),
        fps=given["fps"],
        height=int(given["height"]),
        width=int(given["width"]),
        extra={name: value for name, value in row.fields.items() if name not in METADATA},
    )


def _media(path: str, root: str) -> Media:
    """The file of a row, at which nothing is looked unless its name lies outside the root.

    Raises MediaError.
    """
    location = os.path.normpath(os.path.join(root, path))
    if not inside(location, root):  # by its name; a link on the way may lead to the root all the same
        location = Media(location, root=root).local_path()
    return Media(location, root=root)


def _number(text: str, whole: bool) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 < number <= LARGEST_NUMBER and (not whole or number == int(number)) else None
