"""What all steps of prepare_data.py share: read a manifest, process each clip, write kept and excluded rows."""

import contextlib
import math
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from stdit.data.decoding.decode import VideoInfo, probe
from stdit.data.decoding.media import Media, MediaError, inside, is_url
from stdit.data.manifest.archives import is_archive
from stdit.data.manifest.fields import FIELD_ORDER_WORDS, clip_span
from stdit.data.manifest.reading import RowError, Skipped, read_fields, row_name, summarise
from stdit.data.manifest.rows import FIELD_ORDER
from stdit.data.preparation.jobs import ExcludedError, Journal, Outcome, Outcomes, outcome_key, run_all
from stdit.data.preparation.table import REFUSED, Table, TableRow, check_output, read_table, write_table
from stdit.errors import UserError


@dataclass(frozen=True)
class Task:
    """Source, output and processes of a step."""

    source: str
    """A folder, a manifest, or tar shards."""
    output: Path
    root: str | None = None
    """Folder that paths are relative to, outside of which no file may lie; None: the folder of the manifest."""
    workers: int = 0
    """Processes; 0 works in this one."""
    overwrite: bool = False
    timeout: float = 0.0
    """Seconds per clip, after which it is excluded; 0: no limit. Needs workers."""

    @property
    def excluded(self) -> Path:
        """The table of excluded rows, each with its reason."""
        return self.output.with_suffix(f".excluded{self.output.suffix}")

    @property
    def journal(self) -> Journal:
        """Outcomes of an earlier, interrupted call of the same step."""
        return Journal(self.output.with_name(f"{self.output.name}.partial"))

    def open(self, suffixes: Sequence[str] | None = None) -> Table:
        """Read the source. Raises UserError, before any work, if the output could not be written."""
        if not (is_url(self.source) or is_archive(self.source) or os.path.exists(self.source)):
            raise UserError(f"source {self.source}: there is no such folder or manifest: correct the path")
        if self.workers < 0:
            raise UserError(f"--workers {self.workers}: must be 0 (this process) or more")
        if not 0 <= self.timeout < math.inf:
            raise UserError(f"--timeout {self.timeout:g}: must be seconds per clip, or 0 for no limit")
        for file in (self.output, self.excluded):
            check_output(file, self.overwrite or self._is_of_failed_step(file), suffixes)
            if file.exists() and os.path.exists(self.source) and os.path.samefile(self.source, file):
                raise UserError(f"output {file} is the source, which is never changed: choose another name")
        return read_table(self.source, self.root)

    def _is_of_failed_step(self, file: Path) -> bool:
        """Whether a file is a table of excluded rows without an output: the one of a step that ended in an error."""
        if file != self.excluded or not file.is_file() or self.output.exists():
            return False
        try:
            return "reason" in read_table(str(file), None).columns
        except UserError:
            return False


class ClipSpan(NamedTuple):
    """A clip as decoded: a whole file, or a span of it."""

    start: float
    """Seconds after the first frame of the file."""
    num_frames: int
    fps: float
    height: int
    width: int

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    @property
    def is_still(self) -> bool:
        return self.num_frames == 1

    def size(self, side: int) -> tuple[int, int]:
        """Return height and width, scaled down so that the longer is at most `side` pixels."""
        scale = min(1.0, side / max(self.height, self.width))
        return max(1, round(self.height * scale)), max(1, round(self.width * scale))


class ClipRecord(NamedTuple):
    """A clip as described by a manifest; nan stands for a value that it does not give."""

    media: Media
    num_frames: float = math.nan
    """Of the whole file, as fps, height and width."""
    fps: float = math.nan
    height: float = math.nan
    width: float = math.nan
    start: float = math.nan
    """Seconds, as end: the span of the file that is the clip."""
    end: float = math.nan
    field_order: str = ""
    """Of the file, see `decode_clip`."""

    def file_info(self) -> VideoInfo:
        """Return frames, rate and size of the file; probes it if the manifest lacks some. Raises DecodeError."""
        if any(map(math.isnan, self[1:5])):
            return probe(self.media)
        return VideoInfo(int(self.num_frames), self.fps, int(self.height), int(self.width))

    def span(self, info: VideoInfo | None = None) -> ClipSpan:
        """Return the span of the file that is the clip. Raises DecodeError, and ExcludedError if it is empty."""
        info = self.file_info() if info is None else info
        start, _, num_frames = map(float, clip_span(info.num_frames, info.fps, self.start, self.end))
        if num_frames == 0:
            seconds = info.num_frames / info.fps
            raise ExcludedError(
                f"no frame from start to end: {self.start:g} to {self.end:g} s of {seconds:g} s"
            )
        return ClipSpan(start, int(num_frames), *info[1:])


class RowResult(NamedTuple):
    """A row of the source, with the rows of the output that it gives, or the reason why it is excluded."""

    source: TableRow
    rows: list[TableRow]
    reason: str | None = None


class BatchStage(NamedTuple):
    """A second stage of a step: a model that takes what was computed from clips in batches, in this process."""

    run: Callable[[Sequence[TableRow], Sequence[Any]], list[Outcome]]
    """From rows and what the first stage gives for their clips to their outcomes."""
    size: int
    """Rows per call."""
    key: Callable[[TableRow], Hashable]
    """What its outcome depends on besides the clip and the settings, such as the caption."""

    def batches(self, rows: Sequence[TableRow], outcomes: Outcomes, places: Sequence[int]) -> Outcomes:
        """Yield the outcomes of both stages; rows that the first one excludes do not reach the second."""
        waiting: list[tuple[int, Any]] = []

        def flush() -> Outcomes:
            batch, waiting[:] = list(waiting), []
            made = self.run([rows[places[place]] for place, _ in batch], [value for _, value in batch])
            yield from zip([place for place, _ in batch], made, strict=True)

        with contextlib.closing(outcomes):
            for place, outcome in outcomes:
                if outcome.reason is not None:
                    yield place, outcome
                    continue
                waiting.append((place, outcome.value))
                if len(waiting) == self.size:
                    yield from flush()
            if waiting:
                yield from flush()


def process_clips(
    task: Task,
    table: Table,
    work: Callable[[ClipRecord], Any],
    settings: Sequence[Hashable],
    label: str,
    stage: BatchStage | None = None,
) -> list[Outcome]:
    """Return what `work`, and then `stage`, gives for the clip of each row, in order; see `jobs.run_all`."""
    records: dict[int, ClipRecord] = {}
    outcomes: list[Outcome] = []
    for place, row in enumerate(table.rows):
        try:
            records[place] = read_record(row, table.root)
            outcomes.append(Outcome())
        except ExcludedError as error:
            outcomes.append(Outcome(reason=str(error)))
    rows = [table.rows[place] for place in records]
    own = [() if stage is None else (stage.key(row),) for row in rows]
    keys = [
        outcome_key(record.media, label, *record[1:], *settings, *key)
        for record, key in zip(records.values(), own, strict=True)
    ]
    then = None if stage is None else partial(stage.batches, rows)
    items = list(records.values())
    done = run_all(work, items, keys, task.journal, task.workers, task.timeout, label, then)
    for place, outcome in zip(records, done, strict=True):
        outcomes[place] = outcome
    return outcomes


def read_record(row: TableRow, root: str) -> ClipRecord:
    """Read the clip of a row. Raises ExcludedError if its fields are wrong or its file is missing."""
    if reason := row.get(REFUSED):
        raise ExcludedError(reason)
    if not row["path"]:
        raise ExcludedError("path missing")
    try:
        media, given = read_fields(row, root)
        if not media.is_remote:
            media.local_path()
    except (RowError, MediaError) as error:
        raise ExcludedError(str(error)) from None
    numbers = {name: given.get(name, math.nan) for name in ClipRecord._fields[1:-1]}
    return ClipRecord(media, **numbers, field_order=FIELD_ORDER_WORDS[row.get(FIELD_ORDER) or ""])


def add_columns(table: Table, outcomes: Sequence[Outcome]) -> list[RowResult]:
    """Add the values of the outcomes, which are columns, to their rows."""
    return [
        RowResult(row, [] if outcome.reason else [{**row, **outcome.value}], outcome.reason)
        for row, outcome in zip(table.rows, outcomes, strict=True)
    ]


def write_results(
    task: Task, table: Table, results: Sequence[RowResult], new_columns: Sequence[str] = ()
) -> list[str]:
    """Write the output and the table of excluded rows; return lines that summarise both.

    Raises UserError if no row is left; then only the excluded rows are written, unless they would replace those of
    an existing output. The next call may replace them.
    """
    kept = [row for result in results for row in result.rows]
    excluded = [(result.source, result.reason) for result in results if result.reason is not None]
    root, folder = table.root, os.path.realpath(task.output.parent)
    # Paths are relative to the folder of the output if all files lie in it, so that its reader needs no --root.
    together = not is_url(root) and all(inside(_location(row, root), folder) for row in kept)
    base = folder if together else root
    summary = summarise(Skipped(row_name(row), reason or "") for row, reason in excluded)
    if excluded and not kept and task.output.exists():
        summary = [f"{len(excluded)} excluded; {task.output} stays as it was:", *summary]
    elif excluded:
        summary = [f"{len(excluded)} excluded, listed in {task.excluded}:", *summary]
        rows = [{**_rebased(row, root, base), "reason": reason} for row, reason in excluded]
        write_table(task.excluded, table.with_columns(rows, [*new_columns, "reason"]))
    elif task.excluded.exists():
        task.excluded.unlink()
    if not kept:
        task.journal.remove()
        if excluded and all(reason == "file missing" for _, reason in excluded):
            summary.append(f"paths are relative to {root}: if the files lie elsewhere, add --root FOLDER")
        raise UserError("\n".join([f"{task.source}: no clip is left", *summary]))
    write_table(task.output, table.with_columns([_rebased(row, root, base) for row in kept], new_columns))
    task.journal.remove()
    clips = f"{len(kept)} clips"
    if len(kept) == len(results) - len(excluded):
        clips = f"{len(kept)} of {len(results)} clips"
    clips += captionless(kept)
    note = f"; its paths are relative to {root}: add --root {root} (--data.root in training)"
    return [f"{task.output}: {clips}{'' if base == folder else note}", *summary]


def captionless(rows: Sequence[TableRow]) -> str:
    """Return the part of a summary that counts the rows without a caption; empty if there are none."""
    count = sum(not row.get("text") for row in rows)
    return f", {count} without a caption (training skips them; the step caption writes one)" if count else ""


def _rebased(row: TableRow, root: str, base: str) -> TableRow:
    """Make a row's path relative to `base` instead of the data root, if the file lies there and there is a path."""
    if is_url(root) or not row["path"]:
        return row
    location = _location(row, root)
    return {**row, "path": os.path.relpath(location, base)} if inside(location, base) else row


def _location(row: TableRow, root: str) -> str:
    return os.path.normpath(os.path.join(root, row["path"]))


def is_link(row: TableRow, root: str) -> bool:
    """Whether the path of a row leads through a link, below the data root."""
    location = _location(row, root)
    return not is_url(location) and os.path.realpath(location) != location
