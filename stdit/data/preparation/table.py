"""Manifests as tables that keep all columns, written atomically."""

import contextlib
import csv
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stdit.atomic_files import atomic_write
from stdit.data.manifest.reading import open_rows
from stdit.errors import UserError, install_command

TableRow = dict[str, Any]
REFUSED = ""
"""Key (no column has this name) of the reason why a row of a manifest is invalid."""
TEXT_COLUMNS = ("path", "text", "member")
"""Columns that are text, even if they look like numbers."""


@dataclass
class Table:
    """Rows of a manifest. Their fields are text, as in a CSV; those that a step added may be numbers."""

    columns: list[str]
    """In order; a row may lack some."""
    rows: list[TableRow]
    root: str
    """Data root: a resolved folder, or a URL."""

    def with_columns(self, rows: list[TableRow], names: Sequence[str]) -> "Table":
        """Return a table of other rows, with new columns at the end."""
        return Table(list(dict.fromkeys([*self.columns, *names])), rows, self.root)


def read_table(source: str, root: str | None) -> Table:
    """Read all columns of a manifest, or path and text of the files in a folder. Raises UserError."""
    chunks, root = open_rows(source, root)
    columns: dict[str, None] = {}
    table: list[TableRow] = []
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
    """Write CSV, JSON lines or Parquet, by the suffix. Raises UserError."""
    with staged_output(path) as staging:
        WRITERS[path.suffix.lower()](staging, table)


def check_output(path: Path, overwrite: bool, suffixes: Sequence[str] | None = None) -> None:
    """Raise UserError if a result could not be written to this path, before any work is done for it."""
    suffixes = list(WRITERS) if suffixes is None else suffixes
    if path.suffix.lower() not in suffixes:
        raise UserError(f"output {path}: its name must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"output {path} is a folder: name a file in it")
    if path.exists() and not overwrite:
        raise UserError(f"output {path} exists: choose another name, or add --overwrite to replace it")
    if path.suffix.lower() == ".parquet":
        _import_pyarrow(path)


@contextlib.contextmanager
def staged_output(path: Path) -> Iterator[Path]:
    """Provide a temporary file that replaces `path` at the end of the block, unless it fails. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as staging:
            yield staging
            with staging.open("rb") as file:
                os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"output {path} cannot be written: {error.strerror or error}") from error


def remove_staged(folder: Path) -> None:
    """Remove the temporary files of `staged_output`, at any depth, of processes that were killed."""
    for file in folder.rglob(".*.tmp"):
        file.unlink(missing_ok=True)


def _write_csv(path: Path, table: Table) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table.columns)
        writer.writerows([_csv_field(row.get(name)) for name in table.columns] for row in table.rows)


def _csv_field(value: Any) -> Any:
    """Convert a value to a field of a CSV: lists and objects become JSON."""
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
    pyarrow = _import_pyarrow(path)
    columns = {name: typed([row.get(name) for row in table.rows], name) for name in table.columns}
    for name, values in columns.items():
        if len({type(value) for value in values if value is not None} - {int, float}) > 1:
            columns[name] = [None if value is None else _csv_field(value) for value in values]
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    except pyarrow.ArrowException as error:
        raise UserError(f"output {path} cannot be written ({error}): choose .csv or .jsonl") from error


def _import_pyarrow(path: Path) -> Any:
    """Import pyarrow, or raise UserError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"output {path} needs pyarrow ({error}): {install_command('parquet')}") from None
    return pyarrow


def typed(values: Sequence[Any], name: str) -> list[Any]:
    """Convert the fields of a column from text to numbers, booleans, lists or objects; empty ones to None.

    Only if all of them can be converted without loss: 007 stays text.
    """
    given = [None if value == "" and name not in TEXT_COLUMNS else value for value in values]
    if name in TEXT_COLUMNS:
        return given
    for read in (int, _finite_float, _boolean, json.loads):
        try:
            made = [read(value) if isinstance(value, str) else value for value in given]
        except (ValueError, RecursionError):
            continue
        if all(
            _csv_field(new) == old or str(new) == old
            for new, old in zip(made, given, strict=True)
            if new != old
        ):
            return made
    return given


def _finite_float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


def _boolean(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(text)
    return text == "True"


WRITERS = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
