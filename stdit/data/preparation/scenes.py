"""`split`: each video into its scenes, as parts of the same file (columns start, end) or as files of their own."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from stdit.data.decoding.decode import iter_frames
from stdit.data.decoding.media import inside, is_url
from stdit.data.manifest.rows import METADATA, SPAN_COLUMNS
from stdit.data.preparation.cutting import cut
from stdit.data.preparation.flow import Part, Result, Section, Task, each_clip, finish
from stdit.data.preparation.jobs import LeftOut
from stdit.data.preparation.table import Row, Table
from stdit.errors import UserError

ARCHIVE = ("member", "offset", "size")
"""Columns that say where in an archive a file is."""
SIDE = 256
"""Pixels of the longer side of the frames that the detector sees, as PySceneDetect scales down by itself."""


@dataclass(frozen=True)
class SceneConfig:
    """What a scene is."""

    detector: Literal["adaptive", "content"] = "adaptive"
    """adaptive: a change is compared with those around it, so that fast motion is none; content: with a threshold."""
    threshold: float | None = None
    """Of PySceneDetect's detector: the change that makes a scene; None: its own default."""
    min_seconds: float = 1.0
    """Shorter scenes are left out."""
    max_seconds: float | None = None
    """Longer scenes are divided into equal parts; None: they stay whole."""

    def validate(self) -> None:
        """Raises UserError."""
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


class Scene(NamedTuple):
    """Seconds after the first frame of the file, `end` excluded."""

    start: float
    end: float


def split_clips(task: Task, config: SceneConfig, cut_into: Path | None = None) -> list[str]:
    """A row for each scene. Returns a summary; raises UserError.

    Args:
        cut_into: folder for a file of each scene; None: no file is made, and rows say where in theirs scenes begin
            and end, which loses nothing and takes no space.
    """
    config.validate()
    detector(config)
    table = task.open()
    folder = None if cut_into is None else check_folder(cut_into, task, table)
    work = partial(split, config=config, folder=folder)
    outcomes = each_clip(task, table, work, (config, folder), "split")
    results = []
    for row, outcome in zip(table.rows, outcomes, strict=True):
        if outcome.reason is not None:
            results.append(Result(row, [], outcome.reason))
            continue
        results.append(Result(row, [{**row, **columns} for columns in outcome.value["scenes"]]))
        results += [_too_short(row, Scene(*scene), config) for scene in outcome.value["short"]]
    lines = finish(task, table, results, [*METADATA, *(() if folder else SPAN_COLUMNS)])
    if folder is not None:
        how = [way for outcome in outcomes if outcome.value for way in outcome.value["how"]]
        copied, encoded = how.count("copied"), how.count("encoded")
        lines.append(
            f"{folder}: {copied} scenes copied from a key frame on, {encoded} encoded anew; no sound is kept"
        )
    return lines


def check_folder(folder: Path, task: Task, table: Table) -> str:
    """Its resolved path. Raises UserError for one that training could not read, or that holds other things."""
    resolved = os.path.realpath(folder)
    manifest = os.path.realpath(task.output.parent)
    if not inside(resolved, manifest) and (is_url(table.root) or not inside(resolved, table.root)):
        raise UserError(
            f"--cut {folder}: must lie in the folder of the output, {manifest}, whose paths lead there"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--cut {folder} is not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (task.overwrite or task.journal.known):
        raise UserError(
            f"--cut {folder} is not empty: choose another, or give --overwrite to replace its scenes"
        )
    return resolved


def split(section: Section, config: SceneConfig, folder: str | None) -> dict[str, Any]:
    """Columns of each scene, the scenes that are too short, and how files were made. Raises DecodeError, LeftOut."""
    whole = section.whole()
    part = section.part(whole)
    if part.is_still:
        return {"scenes": [whole._asdict()], "short": [], "how": []}
    found, short = scenes(section, part, config)
    if not found:
        longest = max(scene.end - scene.start for scene in short)
        raise LeftOut(f"no scene is long enough: the longest of {len(short)} lasts {longest:.2f} s")
    if folder is None:
        rows: list[Row] = [{**whole._asdict(), **scene._asdict()} for scene in found]
        return {"scenes": rows, "short": short, "how": []}
    rows, how = [], []
    for scene in found:
        file = Path(folder) / section.media.name / f"{round(scene.start * 1000):09d}.mp4"
        way, info = cut(section.media, *scene, file, (part.height, part.width))
        rows.append({"path": str(file), **info._asdict(), **dict.fromkeys((*SPAN_COLUMNS, *ARCHIVE))})
        how.append(way)
    return {"scenes": rows, "short": short, "how": how}


def scenes(section: Section, part: Part, config: SceneConfig) -> tuple[list[Scene], list[Scene]]:
    """Those that are long enough, none longer than the maximum, and those that are too short.

    No scene has a cut inside. Raises DecodeError and LeftOut.
    """
    from scenedetect import FrameTimecode

    found, times, cuts = detector(config), [], []
    stop = math.inf if math.isnan(section.end) else section.end
    for time, frame in iter_frames(section.media, part.start, stop, SIDE):
        times.append(time)
        cuts += found.process_frame(
            FrameTimecode(len(times) - 1, fps=part.fps), frame[..., ::-1]
        )  # it takes BGR
    if not times:
        raise LeftOut("no frame from start to end")
    cuts += found.post_process(FrameTimecode(len(times) - 1, fps=part.fps))
    edges = sorted({0, len(times), *(cut.frame_num for cut in cuts)})
    times.append(max(times[-1] + 1 / part.fps, min(part.start + part.seconds, times[-1] + 2 / part.fps)))
    long, short = [], []
    for first, last in zip(edges, edges[1:], strict=False):
        seconds = times[last] - times[first]
        if seconds < config.min_seconds - 1e-6:
            short.append(_scene(times, first, last))
            continue
        parts = 1 if config.max_seconds is None else math.ceil(seconds / config.max_seconds - 1e-6)
        inner = [first + round((last - first) * k / parts) for k in range(parts + 1)]
        long += [_scene(times, a, b) for a, b in zip(inner, inner[1:], strict=False) if b > a]
    return long, short


def detector(config: SceneConfig) -> Any:
    """A new detector of PySceneDetect, which counts every cut. Raises UserError."""
    try:
        from scenedetect import AdaptiveDetector, ContentDetector
    except ImportError as error:
        raise UserError(f"PySceneDetect cannot be loaded ({error}): pip install 'stdit[prepare]'") from None
    if config.detector == "content":
        return ContentDetector(min_scene_len=0, **_given(threshold=config.threshold))
    return AdaptiveDetector(min_scene_len=0, **_given(adaptive_threshold=config.threshold))


def _given(**options: float | None) -> dict[str, float]:
    return {name: value for name, value in options.items() if value is not None}


def _scene(times: Sequence[float], first: int, last: int) -> Scene:
    return Scene(round(times[first], 5), round(times[last], 5))


def _too_short(row: Row, scene: Scene, config: SceneConfig) -> Result:
    reason = f"scene too short: {scene.end - scene.start:.2f} s, --min_seconds {config.min_seconds:g}"
    return Result({**row, **scene._asdict()}, [], reason)
