"""`split`: each video into its scenes, as spans of the same file (columns start, end) or as files of their own."""

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from stdit.data.decoding.colors import SDR
from stdit.data.decoding.decode import DecodeError, iter_frames
from stdit.data.decoding.interlacing import PROGRESSIVE
from stdit.data.decoding.media import inside, is_url
from stdit.data.manifest.rows import COLOR, FIELD_ORDER, METADATA, SPAN_COLUMNS
from stdit.data.preparation.cutting import cut_clip
from stdit.data.preparation.flow import (
    ClipRecord,
    ClipSpan,
    RowResult,
    Task,
    process_clips,
    write_results,
)
from stdit.data.preparation.jobs import ExcludedError
from stdit.data.preparation.table import Table, TableRow, remove_staged
from stdit.errors import UserError, install_command

ARCHIVE_COLUMNS = ("member", "offset", "size")
"""Columns that say where in an archive a file is."""
UNFINISHED = ".unfinished"
"""Empty file in the folder of --cut until its step is complete: the next call may write to a folder that has it."""
DETECTOR_SIDE = 256
"""Pixels of the longer side of the frames that the detector sees, as PySceneDetect downscales by default."""


@dataclass(frozen=True)
class SceneConfig:
    """Settings of the scene detection."""

    detector: Literal["adaptive", "content"] = "adaptive"
    """adaptive: compares a change with those around it, so that fast motion is not a cut; content: a threshold."""
    threshold: float | None = None
    """Of PySceneDetect's detector; None: its default."""
    min_seconds: float = 1.0
    """Shorter scenes are excluded."""
    max_seconds: float | None = None
    """Longer scenes are divided into equal parts; None: they stay whole."""

    def validate(self) -> None:
        """Raise UserError if a setting is out of range."""
        if self.threshold is not None and not self.threshold > 0:
            raise UserError(f"--threshold {self.threshold:g}: must be above 0")
        if not 0 <= self.min_seconds < math.inf:
            raise UserError(f"--min_seconds {self.min_seconds:g}: must be 0 or more")
        if self.max_seconds is not None and not (
            self.max_seconds > 0 and self.max_seconds >= 2 * self.min_seconds
        ):
            raise UserError(
                f"--max_seconds {self.max_seconds:g}: must be above 0 and at least twice --min_seconds "
                f"{self.min_seconds:g}, since the parts of a longer scene may be half as long"
            )


class SceneSpan(NamedTuple):
    """Seconds after the first frame of the file, `end` excluded."""

    start: float
    end: float


def split_clips(task: Task, config: SceneConfig, cut_into: Path | None = None) -> list[str]:
    """Write a row per scene. Returns a summary; raises UserError.

    Args:
        cut_into: folder for a file per scene; None: no files are written, and rows say where in their file scenes
            begin and end, which is lossless and takes no space.
    """
    config.validate()
    _build_detector(config)
    table = task.open()
    folder = None if cut_into is None else _check_folder(cut_into, task, table)
    work = partial(split_clip, config=config, folder=folder)
    outcomes = process_clips(task, table, work, (config, folder), "split")
    results = []
    for row, outcome in zip(table.rows, outcomes, strict=True):
        if outcome.reason is not None:
            results.append(RowResult(row, [], outcome.reason))
            continue
        results.append(RowResult(row, [{**row, **columns} for columns in outcome.value["scenes"]]))
        for start, end in outcome.value["short"]:
            reason = f"scene too short: {end - start:.2f} s, --min_seconds {config.min_seconds:g}"
            results.append(RowResult({**row, "start": start, "end": end}, [], reason))
        if lost := outcome.value["lost"]:
            start, end, reason = lost
            results.append(RowResult({**row, "start": start, "end": end}, [], f"damaged: {reason}"))
    lines = write_results(task, table, results, [*METADATA, *(() if folder else SPAN_COLUMNS)])
    if folder is not None:
        remove_staged(Path(folder))
        (Path(folder) / UNFINISHED).unlink(missing_ok=True)
        how = [way for outcome in outcomes if outcome.value for way in outcome.value["how"]]
        copied, encoded = how.count("copied"), how.count("encoded")
        lines.append(
            f"{folder}: {copied} scenes copied from a key frame on, {encoded} re-encoded; sound is dropped"
        )
    return lines


def _check_folder(folder: Path, task: Task, table: Table) -> str:
    """Return the resolved path of --cut, and mark the folder as unfinished.

    Raises UserError if training could not read from it, or it has files that no unfinished step has written.
    """
    resolved = os.path.realpath(folder)
    manifest = os.path.realpath(task.output.parent)
    if not inside(resolved, manifest) and (is_url(table.root) or not inside(resolved, table.root)):
        raise UserError(
            f"--cut {folder}: must lie in the folder of the output, {manifest}, which its paths are relative to"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--cut {folder} is not a folder")
    unfinished = folder / UNFINISHED
    if folder.is_dir() and any(folder.iterdir()) and not (task.overwrite or unfinished.exists()):
        raise UserError(
            f"--cut {folder} is not empty: choose another, or add --overwrite to replace its scenes"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
    except OSError as error:
        raise UserError(f"--cut {folder} cannot be written: {error.strerror or error}") from error
    return resolved


def split_clip(record: ClipRecord, config: SceneConfig, folder: str | None) -> dict[str, Any]:
    """Return columns of each scene, scenes that are too short, what is lost by damage, and how files were written.

    Raises DecodeError, and ExcludedError if no scene is long enough.
    """
    info = record.file_info()
    span = record.span(info)
    if span.is_still:
        return {"scenes": [info._asdict()], "short": [], "lost": None, "how": []}
    scenes, short, lost = _find_scenes(record, span, config)
    if not scenes and lost:
        raise ExcludedError(f"cannot be read: {lost[2]}, and no scene before {lost[0]:.2f} s is long enough")
    if not scenes:
        longest = max(scene.end - scene.start for scene in short)
        raise ExcludedError(f"no scene is long enough: the longest of {len(short)} lasts {longest:.2f} s")
    if folder is None:
        rows: list[TableRow] = [{**info._asdict(), **scene._asdict()} for scene in scenes]
        return {"scenes": rows, "short": short, "lost": lost, "how": []}
    rows, how = [], []
    for scene in scenes:
        file = Path(folder) / record.media.name / f"{round(scene.start * 1000):09d}.mp4"
        size = (span.height, span.width)
        way, written = cut_clip(record.media, *scene, file, size, record.field_order)
        values = {**dict.fromkeys((*SPAN_COLUMNS, *ARCHIVE_COLUMNS)), "damage": ""}
        values["readable_seconds"] = round(written.num_frames / written.fps, 3)
        if way == "encoded":
            values |= {COLOR: SDR, FIELD_ORDER: PROGRESSIVE}
        rows.append({"path": str(file), **written._asdict(), **values})
        how.append(way)
    return {"scenes": rows, "short": short, "lost": lost, "how": how}


def _find_scenes(
    record: ClipRecord, span: ClipSpan, config: SceneConfig
) -> tuple[list[SceneSpan], list[SceneSpan], tuple[float, float, str] | None]:
    """Return the scenes that are long enough, divided at the maximum length, and those that are too short.

    Also what follows the first damage: start and end in seconds, and the reason; None for an intact file. Raises
    DecodeError if nothing comes before the damage, and ExcludedError.
    """
    from scenedetect import FrameTimecode

    detector, times, cuts = _build_detector(config), [], []
    stop = math.inf if math.isnan(record.end) else record.end
    damage = ""
    try:
        frames = iter_frames(record.media, span.start, stop, DETECTOR_SIDE, record.field_order)
        for time, frame in frames:
            times.append(time)
            bgr = frame[..., ::-1]
            cuts += detector.process_frame(FrameTimecode(len(times) - 1, fps=span.fps), bgr)
    except DecodeError as error:
        if not times:
            raise
        damage = error.reason
    if not times:
        raise ExcludedError("no frame from start to end")
    cuts += detector.post_process(FrameTimecode(len(times) - 1, fps=span.fps))
    edges = sorted({0, len(times), *(cut.frame_num for cut in cuts)})
    most = 1 if damage else 2  # frames that the last one may last
    times.append(max(times[-1] + 1 / span.fps, min(span.start + span.seconds, times[-1] + most / span.fps)))

    def scene(first: int, last: int) -> SceneSpan:
        return SceneSpan(round(times[first], 5), round(times[last], 5))

    long, short = [], []
    for first, last in zip(edges, edges[1:], strict=False):
        seconds = times[last] - times[first]
        if seconds < config.min_seconds - 1e-6:
            short.append(scene(first, last))
            continue
        parts = 1 if config.max_seconds is None else math.ceil(seconds / config.max_seconds - 1e-6)
        inner = [first + round((last - first) * k / parts) for k in range(parts + 1)]
        long += [scene(a, b) for a, b in zip(inner, inner[1:], strict=False) if b > a]
    ends = round(times[-1], 5)
    return long, short, (ends, round(max(ends, span.start + span.seconds), 5), damage) if damage else None


def _build_detector(config: SceneConfig) -> Any:
    """Return a new detector of PySceneDetect, which reports every cut. Raises UserError if it is not installed."""
    try:
        from scenedetect import AdaptiveDetector, ContentDetector
    except ImportError as error:
        raise UserError(f"PySceneDetect cannot be loaded ({error}): {install_command('prepare')}") from None
    build, name = (
        (ContentDetector, "threshold")
        if config.detector == "content"
        else (AdaptiveDetector, "adaptive_threshold")
    )
    options = {} if config.threshold is None else {name: config.threshold}
    return build(min_scene_len=0, **options)
