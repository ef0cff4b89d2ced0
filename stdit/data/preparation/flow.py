"""What the sub-commands share: a manifest in, work on each clip, a manifest and the list of what was left out."""

import math
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stdit.data.decoding.decode import VideoInfo, probe
from stdit.data.decoding.media import Media, MediaError, inside, is_url
from stdit.data.manifest.fields import clip_span
from stdit.data.manifest.reading import RowError, Skipped, read_fields, row_name, summarise
from stdit.data.preparation.jobs import Journal, LeftOut, Outcome, key_of, run_all
from stdit.data.preparation.table import REFUSED, Row, Table, check_output, read_table, write_table
from stdit.errors import UserError


@dataclass(frozen=True)
class Task:
    """From which manifest to which, and how."""

    source: str
    """A folder, a manifest, or tar shards."""
    output: Path
    root: str | None = None
    """What paths are relative to, and no file may lie outside; None: the folder of the manifest."""
    workers: int = 0
    """Processes; 0 works in this one."""
    overwrite: bool = False

    @property
    def left_out(self) -> Path:
        """The table of rows that were left out, each with its reason."""
        return self.output.with_suffix(f".left_out{self.output.suffix}")

    @property
    def journal(self) -> Journal:
        return Journal(self.output.with_name(f"{self.output.name}.partial"))

    def open(self, suffixes: Sequence[str] | None = None) -> Table:
        """The table of the source. Raises UserError for what would spoil the result, before any work."""
        if self.workers < 0:
            raise UserError(f"--workers {self.workers}: must be 0 (this process) or more")
        for file in (self.output, self.left_out):
            check_output(file, self.overwrite, suffixes)
            if file.exists() and os.path.exists(self.source) and os.path.samefile(self.source, file):
                raise UserError(f"output {file} is the source, which is never changed: choose another name")
        return read_table(self.source, self.root)


class Part(NamedTuple):
    """A clip: a file, or what lies between two times in it."""

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
        """Height and width, scaled down until the longer is at most `side`."""
        scale = min(1.0, side / max(self.height, self.width))
        return max(1, round(self.height * scale)), max(1, round(self.width * scale))


class Section(NamedTuple):
    """What a manifest says of a clip; nan is what it does not say."""

    media: Media
    num_frames: float = math.nan
    """Of the whole file, as fps, height and width."""
    fps: float = math.nan
    height: float = math.nan
    width: float = math.nan
    start: float = math.nan
    """Seconds, as end: of the part of the file that is the clip."""
    end: float = math.nan

    def whole(self) -> VideoInfo:
        """Of the file; decodes what the manifest does not say. Raises DecodeError."""
        if any(map(math.isnan, self[1:5])):
            return probe(self.media)
        return VideoInfo(int(self.num_frames), self.fps, int(self.height), int(self.width))

    def part(self, whole: VideoInfo | None = None) -> Part:
        """Of the clip. Raises DecodeError and LeftOut."""
        whole = self.whole() if whole is None else whole
        start, _, num_frames = map(float, clip_span(whole.num_frames, whole.fps, self.start, self.end))
        if num_frames == 0:
            seconds = whole.num_frames / whole.fps
            raise LeftOut(f"no frame from start to end: {self.start:g} to {self.end:g} s of {seconds:g} s")
        return Part(start, int(num_frames), *whole[1:])


class Result(NamedTuple):
    """A row of the source, and what became of it: rows of the output, or a reason."""

    row: Row
    rows: list[Row]
    reason: str | None = None


def section_of(row: Row, root: str) -> Section:
    """The clip of a row, whose file is there. Raises LeftOut."""
    if reason := row.get(REFUSED):
        raise LeftOut(reason)
    if not row["path"]:
        raise LeftOut("path missing")
    try:
        media, given = read_fields(row, root)
        if not media.is_remote:
            media.local_path()
    except (RowError, MediaError) as error:
        raise LeftOut(str(error)) from None
    return Section(media, *(given.get(name, math.nan) for name in Section._fields[1:]))


def each_clip(
    task: Task, table: Table, work: Callable[[Section], Any], settings: Sequence[Hashable], label: str
) -> list[Outcome]:
    """What `work` gives for the clip of each row, in order; see `run_all`."""
    sections: dict[int, Section] = {}
    outcomes: list[Outcome] = []
    for place, row in enumerate(table.rows):
        try:
            sections[place] = section_of(row, table.root)
            outcomes.append(Outcome())
        except LeftOut as error:
            outcomes.append(Outcome(reason=str(error)))
    keys = [key_of(section.media, label, *section[1:], *settings) for section in sections.values()]
    done = run_all(work, list(sections.values()), keys, task.journal, task.workers, label)
    for place, outcome in zip(sections, done, strict=True):
        outcomes[place] = outcome
    return outcomes


def finish(task: Task, table: Table, results: Sequence[Result], new_columns: Sequence[str] = ()) -> list[str]:
    """Write the output and the list of what was left out; lines that say how many of which.

    Raises UserError when nothing is left; then only the list is written.
    """
    kept = [row for result in results for row in result.rows]
    refused = [(result.row, result.reason) for result in results if result.reason is not None]
    root, folder = table.root, os.path.realpath(task.output.parent)
    base = common_base(kept, root, folder)
    told = summarise(Skipped(row_name(row), reason or "") for row, reason in refused)
    if refused:
        told = [f"{len(refused)} left out, listed in {task.left_out}:", *told]
        rows = [{**moved(row, root, base), "reason": reason} for row, reason in refused]
        write_table(task.left_out, table.with_columns(rows, [*new_columns, "reason"]))
    elif task.left_out.exists():
        task.left_out.unlink()
    if not kept:
        raise UserError("\n".join([f"{task.source}: no clip is left", *told]))
    write_table(task.output, table.with_columns([moved(row, root, base) for row in kept], new_columns))
    task.journal.remove()
    clips = (
        f"{len(kept)} clips"
        if len(kept) != len(results) - len(refused)
        else f"{len(kept)} of {len(results)} clips"
    )
    note = (
        ""
        if base == folder
        else f"; its paths are relative to {root}: give --root {root} (--data.root in training)"
    )
    return [f"{task.output}: {clips}{note}", *told]


def common_base(rows: Sequence[Row], root: str, folder: str) -> str:
    """What paths in a manifest in `folder` are relative to: `folder` if all files lie in it, so that nothing need be
    said to its reader; else the data root."""
    return folder if not is_url(root) and all(inside(_location(row, root), folder) for row in rows) else root


def moved(row: Row, root: str, base: str) -> Row:
    """A row whose path is relative to `base` instead of the data root, if the file lies there and there is a path."""
    if is_url(root) or not row["path"]:
        return row
    location = _location(row, root)
    return {**row, "path": os.path.relpath(location, base)} if inside(location, base) else row


def _location(row: Row, root: str) -> str:
    return os.path.normpath(os.path.join(root, row["path"]))
