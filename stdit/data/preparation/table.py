"""Manifests as tables of which every column is kept, and results that are whole or absent."""

import contextlib
import csv
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from stdit.data.manifest.reading import open_rows
from stdit.errors import UserError

Row = dict[str, Any]
REFUSED = ""
"""Key, which no column has, of the reason why a row of a manifest is none."""
PLAIN = ("path", "text", "member")
"""Columns that are text, whatever they look like."""


@dataclass
class Table:
    """Rows of a manifest, whose fields are text as a CSV has them; those that were added may be numbers."""

    columns: list[str]
    """In their order; a row may lack some."""
    rows: list[Row]
    root: str
    """Data root: a resolved folder, or a URL."""

    def with_columns(self, rows: list[Row], names: Sequence[str]) -> "Table":
        """Other rows, whose new columns come last."""
        return Table(list(dict.fromkeys([*self.columns, *names])), rows, self.root)


def read_table(source: str, root: str | None) -> Table:
    """All columns of a manifest, or path and text of the files in a folder. Raises UserError."""
    chunks, root = open_rows(source, root)
    columns: dict[str, None] = {}
    table: list[Row] = []
    for chunk in chunks:
        columns |= dict.fromkeys(chunk.columns)
        rows = [
            dict(zip(chunk.columns, fields, strict=True))
            for fields in zip(*chunk.columns.values(), strict=True)
        ]
        for place, reason in chunk.refused.items():
            rows[place][REFUSED] = reason
        table += rows
    if not table:
        raise UserError(f"{source} lists no clips: name a folder with videos, or a manifest with rows")
    if os.path.isdir(source):
        above = os.path.relpath(os.path.realpath(source), root)
        for row in table:
            row["path"] = os.path.normpath(os.path.join(above, os.path.relpath(row["path"], source)))
    return Table(list(columns), table, root)


def write_table(path: Path, table: Table) -> None:
    """CSV, JSON lines or Parquet, by the suffix. Raises UserError."""
    with written_whole(path) as aside:
        _writer(path)(aside, table)


def check_output(path: Path, overwrite: bool, suffixes: Sequence[str] | None = None) -> None:
    """Raises UserError when a result cannot get this name, before any work is done for it."""
    suffixes = list(WRITERS) if suffixes is None else suffixes
    if path.suffix.lower() not in suffixes:
        raise UserError(f"output {path}: its name must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"output {path} is a folder: name a file in it")
    if path.exists() and not overwrite:
        raise UserError(f"output {path} exists: choose another name, or give --overwrite to replace it")
    if path.suffix.lower() == ".parquet":
        need_pyarrow(path)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file to write in place of `path`, which gets its name once it is whole, and is gone otherwise."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"output {path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _writer(path: Path) -> Callable[[Path, Table], None]:
    return WRITERS[path.suffix.lower()]


def _write_csv(path: Path, table: Table) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        _csv_into(file, table)


def _csv_into(file: IO[str], table: Table) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows([_as_text(row.get(name)) for name in table.columns] for row in table.rows)


def _as_text(value: Any) -> Any:
    """A cell of a CSV: what is neither text nor number as JSON."""
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _write_jsonl(path: Path, table: Table) -> None:
    columns = {name: typed([row.get(name) for row in table.rows], name) for name in table.columns}
    with path.open("w", encoding="utf-8") as file:
        for values in zip(*columns.values(), strict=True):
            row = {name: value for name, value in zip(columns, values, strict=True) if value is not None}
            file.write(json.dumps({"path": "", "text": "", **row}, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, table: Table) -> None:
    pyarrow = need_pyarrow(path)
    columns = {name: typed([row.get(name) for row in table.rows], name) for name in table.columns}
    for name, values in columns.items():
        if len({type(value) for value in values if value is not None} - {int, float}) > 1:
            columns[name] = [None if value is None else _as_text(value) for value in values]
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    except pyarrow.ArrowException as error:
        raise UserError(f"output {path} cannot be written ({error}): choose .csv or .jsonl") from error


def need_pyarrow(path: Path) -> Any:
    """Raises UserError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"output {path} needs pyarrow ({error}): pip install 'stdit[parquet]'") from None
    return pyarrow


def typed(values: Sequence[Any], name: str) -> list[Any]:
    """Fields of a column as the numbers, truths, lists or objects that they are the text of; None for no value.

    Only where this loses nothing of any of them: 007 stays text.
    """
    given = [None if value == "" and name not in PLAIN else value for value in values]
    if name in PLAIN:
        return given
    for read in (int, _finite, _truth, json.loads):
        try:
            made = [read(value) if isinstance(value, str) else value for value in given]
        except (ValueError, RecursionError):
            continue
        if all(
            _as_text(new) == old or str(new) == old
            for new, old in zip(made, given, strict=True)
            if new != old
        ):
            return made
    return given


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


def _truth(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(text)
    return text == "True"


WRITERS = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
