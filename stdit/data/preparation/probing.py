"""`probe`: frames, rate and size of every file, what is damaged, HDR or interlaced."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from stdit.data.decoding.decode import VideoInfo
from stdit.data.decoding.examine import examine
from stdit.data.manifest.media_kinds import media_lines
from stdit.data.manifest.reading import row_name
from stdit.data.manifest.rows import FIELD_ORDER, MEDIA_COLUMNS, METADATA, SPAN_COLUMNS
from stdit.data.preparation.flow import (
    ClipRecord,
    RowResult,
    Task,
    add_columns,
    process_clips,
    read_record,
    write_results,
)
from stdit.data.preparation.jobs import ExcludedError, Outcome
from stdit.data.preparation.table import TableRow

MOST_DAMAGED = 5
"""Damaged files that the summary names."""


def probe_clips(task: Task, quick: bool = False) -> list[str]:
    """Fill in METADATA and MEDIA_COLUMNS, whatever the manifest says. Returns a summary; raises UserError.

    Args:
        quick: decode a few frames of each file instead of all, so that damage is not found.
    """
    table = task.open()
    work = partial(_probe, quick=True) if quick else _probe
    files = table.with_columns([_without(row, *SPAN_COLUMNS) for row in table.rows], ())  # each is read once
    outcomes = process_clips(task, files, work, ("examined", quick), "probe")
    pairs = zip(table.rows, outcomes, strict=True)
    results = add_columns(table, [_checked_span(row, outcome, table.root) for row, outcome in pairs])
    lines = write_results(task, table, results, (*METADATA, *MEDIA_COLUMNS))
    kept = [row for result in results for row in result.rows]
    kinds = {name: [row.get(name, "") for row in kept] for name in MEDIA_COLUMNS[:2]}
    return [*lines, *media_lines(kinds), *_damage(results)]


def _probe(record: ClipRecord, quick: bool = False) -> dict[str, Any]:
    """Read the columns of a file. Raises DecodeError."""
    found = examine(record.media, quick)
    readable = None if quick else found.readable_seconds
    values = (found.color, found.field_order, readable, found.damage)
    info = found.info._replace(fps=round(found.info.fps, 9))  # 24.0, not 24.000000000000004
    return {**info._asdict(), **dict(zip(MEDIA_COLUMNS, values, strict=True))}


def _without(row: TableRow, *columns: str) -> TableRow:
    """Empty columns of a row, and those that `probe` finds out itself."""
    return {**row, **dict.fromkeys((*METADATA, FIELD_ORDER, *columns), "")}


def _checked_span(row: TableRow, outcome: Outcome, root: str) -> Outcome:
    """Return the outcome of a row's file, or why the part of it that is the row's clip cannot be used."""
    if outcome.reason is not None or not any(row.get(name) for name in SPAN_COLUMNS):
        return outcome
    try:
        read_record(_without(row), root).span(VideoInfo(*(outcome.value[name] for name in METADATA)))
    except ExcludedError as error:
        return Outcome(reason=str(error))
    return outcome


def _damage(results: Sequence[RowResult]) -> list[str]:
    """Return lines that name the damaged files."""
    rows = [row for result in results for row in result.rows]
    damaged = {row_name(row): row["damage"] for row in rows if row.get("damage")}
    if not damaged:
        return []
    shown = [f"  {name}: damaged {where}" for name, where in list(damaged.items())[:MOST_DAMAGED]]
    more = [f"  and {len(damaged) - MOST_DAMAGED} more: column damage"] if len(damaged) > MOST_DAMAGED else []
    return [f"{len(damaged)} files are damaged; what is readable before the damage is kept:", *shown, *more]
