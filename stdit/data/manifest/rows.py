"""Read the rows of a manifest: CSV, JSON lines, Parquet, or a folder of videos with captions beside them.

Rows are read by column, in chunks, every field as text: a million of them take seconds. No file that they name is
opened here.
"""

import csv
import difflib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from stdit.data.decoding.decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from stdit.errors import UserError, install_command

REQUIRED = ("path", "text")
METADATA = ("num_frames", "fps", "height", "width")
SPAN_COLUMNS = ("start", "end")
COLOR, FIELD_ORDER = "color_space", "field_order"
MEDIA_COLUMNS = (COLOR, FIELD_ORDER, "readable_seconds", "damage")
"""Columns that `prepare_data.py probe` adds to METADATA: see `stdit.data.decoding.examine`."""
BYTE_RANGE_COLUMNS = ("offset", "size")
ROWS_PER_CHUNK = 4096
"""Few enough for the cache of a processor: a third faster than 65536 on CSV."""

OTHER_NAMES = {
    "path": ("file", "filename", "filepath", "video", "video_path", "image"),
    "text": ("caption", "prompt", "description", "sentence", "title"),
}
"""Names of the required columns in other data sets."""


class Rows(NamedTuple):
    """A chunk of rows of a manifest, by column."""

    columns: dict[str, list[str]]
    """Stripped fields by name, including "path" and "text"; an empty string if a row has no value."""
    refused: dict[int, str]
    """Reasons ("kind" or "kind: detail") for which rows cannot be used, by place in the chunk."""

    def __len__(self) -> int:
        return len(self.columns["path"])

    def fields(self, place: int) -> dict[str, str]:
        """Return one row."""
        return {name: column[place] for name, column in self.columns.items()}


def read_rows(manifest: Path, root: Path) -> Iterator[Rows]:
    """Yield rows in order. Raises UserError if the manifest itself cannot be read.

    Args:
        manifest: .csv, .jsonl, .parquet, or a folder; the content decides for files with another suffix.
        root: resolved data root; caption files outside it are not read.
    """
    if manifest.is_dir():
        yield from _folder_rows(manifest, root)
        return
    if os.path.exists(manifest) and not os.path.isfile(manifest):
        raise UserError(f"manifest {manifest} is a pipe or a device: write it to a file, and name that")
    if manifest.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
        raise UserError(
            f"manifest {manifest} is a single video or picture: name its folder, or a manifest that lists it "
            "(a .csv with the columns path,text)"
        )
    try:
        yield from _reader(manifest)(manifest)
    except UnicodeDecodeError as error:
        raise UserError(
            f"manifest {manifest} is not UTF-8 ({error}): save it as UTF-8, or name a folder of videos instead"
        ) from error
    except OSError as error:
        raise UserError(f"manifest {manifest} cannot be read: {error.strerror or error}") from error


def _check_columns(manifest: Path | str, names: Sequence[str]) -> None:
    """Raise UserError if a required column is missing or a column occurs twice; suggest a similar name."""
    for column in names:
        if names.count(column) > 1:
            raise UserError(f"manifest {manifest} has two columns {column!r}: rename or remove one")
    if len(names) == 1 and (found := next((mark for mark in ";\t|" if mark in names[0]), None)):
        raise UserError(f"manifest {manifest} separates its columns by {found!r}: save it with commas")
    for column in REQUIRED:
        if column in names:
            continue
        lower = {name.strip().lower(): name for name in names}
        others = [name for other in (column, *OTHER_NAMES[column]) if (name := lower.get(other))]
        near = others or [lower[name] for name in difflib.get_close_matches(column, lower, 1, 0.6)]
        free = [name for name in near if name not in REQUIRED]
        hint = f" (rename {free[0]!r}?)" if free else ""
        raise UserError(
            f"manifest {manifest} has no column {column!r}; it has {shorten(', '.join(names), 200)}{hint}: "
            "its rows must have at least path,text"
        )


def near_misses(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return misspelt columns: pairs of a name and the known column that is missing and similar to it."""
    known, names = (
        (*METADATA, *MEDIA_COLUMNS, *SPAN_COLUMNS, *BYTE_RANGE_COLUMNS, "aesthetic", "motion", "camera"),
        list(names),
    )
    near = (
        (name, difflib.get_close_matches(name.lower(), known, 1, 0.8)) for name in names if name not in known
    )
    return [(name, meant[0]) for name, meant in near if meant and meant[0] not in names]


def as_text(value: Any) -> str:
    """Return a value as the text that a CSV would have."""
    if isinstance(value, str):
        return value.strip()
    if value is None or value != value:  # NaN: a missing value of pandas
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace").strip()
    return (
        json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else str(value)
    )


def _reader(manifest: Path) -> Callable[[Path], Iterator[Rows]]:
    readers = {".jsonl": _json_rows, ".ndjson": _json_rows, ".parquet": _parquet_rows}
    if reader := readers.get(manifest.suffix.lower()):
        return reader
    with manifest.open("rb") as file:
        begin = file.read(8)
    if begin.startswith(b"PAR1"):
        return _parquet_rows
    return _json_rows if begin.removeprefix(b"\xef\xbb\xbf").startswith(b"{") else _csv_rows


def _csv_rows(manifest: Path) -> Iterator[Rows]:
    with manifest.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next((row for row in reader if row), None)
            if header is None:
                raise UserError(
                    f"manifest {manifest} is empty: its first line must name the columns path,text"
                )
            names = [name.strip() for name in header]
            _check_columns(manifest, names)
            before = reader.line_num
            while chunk := list(itertools.islice(reader, ROWS_PER_CHUNK)):
                rows, refused = _even(chunk, len(names), before)
                before = reader.line_num
                columns = zip(*rows, strict=True) if rows else itertools.repeat((), len(names))
                yield Rows(
                    {name: list(map(str.strip, column)) for name, column in zip(names, columns, strict=True)},
                    refused,
                )
        except csv.Error as error:
            raise UserError(
                f"manifest {manifest}, line {reader.line_num}: {error}: check its quotes"
            ) from error


def _even(rows: list[list[str]], width: int, line: int) -> tuple[list[list[str]], dict[int, str]]:
    """Pad rows to `width` fields and drop blank ones; also return the reasons to refuse longer rows.

    Args:
        line: number of the line before the first row.
    """
    if set(map(len, rows)) == {width}:
        return rows, {}
    even: list[list[str]] = []
    refused = {}
    for row in rows:
        line += 1 + sum(field.count("\n") for field in row)
        if len(row) > width:
            refused[len(even)] = (
                f"malformed row: line {line} has more fields than the header; quote captions that hold commas"
            )
        if row:
            even.append((row + [""] * width)[:width])
    return even, refused


def _json_rows(manifest: Path) -> Iterator[Rows]:
    checked = False
    with manifest.open(encoding="utf-8-sig", newline="\n") as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if not line.isspace())
        while chunk := list(itertools.islice(lines, ROWS_PER_CHUNK)):
            rows, refused = [], {}
            for place, (number, line) in enumerate(chunk):
                row, refusal = _json_row(line)
                rows.append(row)
                if refusal:
                    refused[place] = f"malformed row: line {number} {refusal}"
            names = list(dict.fromkeys(itertools.chain(*rows)))
            if not checked and names:
                _check_columns(manifest, names)
                checked = True
            columns = {
                name: [as_text(row.get(name)) for row in rows] for name in dict.fromkeys((*REQUIRED, *names))
            }
            yield Rows(columns, refused)


def _json_row(line: str) -> tuple[dict[str, Any], str]:
    """Parse a line; if it is no object, return an empty row and the reason."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, f"is not JSON ({error})"
    return (
        (row, "")
        if isinstance(row, dict)
        else ({}, 'is not an object such as {"path": "a.mp4", "text": "a ball"}')
    )


def _parquet_rows(manifest: Path) -> Iterator[Rows]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"manifest {manifest} is in Parquet, which needs pyarrow: {install_command('parquet')}"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(manifest) as file:
            schema = file.schema_arrow
            _check_columns(manifest, schema.names)
            names = [field.name for field in schema if field.name in REQUIRED or not _is_bytes(field.type)]
            for batch in file.iter_batches(ROWS_PER_CHUNK, columns=names):
                columns = zip(batch.schema.names, batch.columns, strict=True)
                yield Rows(
                    {name: [as_text(field) for field in column.to_pylist()] for name, column in columns}, {}
                )
    except pyarrow.ArrowException as error:
        reason = str(error).partition(". ")[0].partition("\n")[0]
        raise UserError(
            f"manifest {manifest} is not a complete Parquet file ({reason}): write it again"
        ) from error


def _is_bytes(kind: Any) -> bool:
    """Whether a column of Parquet has bytes (such as whole files), which are not read."""
    return "binary" in str(kind)


def _folder_rows(folder: Path, root: Path) -> Iterator[Rows]:
    suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    paths, texts, refused = list[str](), list[str](), dict[int, str]()
    for path in sorted(p for p in folder.absolute().rglob("*") if p.suffix.lower() in suffixes):
        caption = path.with_suffix(".txt")
        inside = caption.resolve().is_relative_to(root)
        text = ""
        try:
            text = caption.read_text(encoding="utf-8-sig").strip() if inside and caption.is_file() else ""
        except (OSError, UnicodeDecodeError) as error:
            refused[len(paths)] = f"caption file cannot be read: {caption.name}: {error}"
        paths.append(str(path))
        texts.append(text)
    if paths:
        yield Rows({"path": paths, "text": texts}, refused)
