"""Runs in a folder, by the files that training writes: state, curves, checkpoints, videos. Imports no torch.

A file that is damaged or half written is no error: what it does not say is None, and ``problem`` says why.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from stdit.checkpoint_files import step_folders
from stdit.serve.errors import RequestError
from stdit.serve.gallery.gallery_scan import read_facts
from stdit.serve.json_values import whole_number, whole_text
from stdit.serve.runs.metrics_reader import MetricsReader, read_last_lines
from stdit.serve.runs.run_checkpoints import CheckpointStates, RunCheckpoint
from stdit.serve.runs.run_files import (
    CONFIG,
    METRICS,
    exported_step,
    is_run_folder,
    is_run_name,
    read_run_config,
    sample_folders,
    sample_videos_in,
)
from stdit.serve.runs.run_locks import query_lock

RunState = Literal["running", "stopped", "finished", "unknown"]
_FRESH_SECONDS = 120.0
"""Age of the metrics below which another machine may train, though its lock is not seen here."""
_MOST_READERS = 16
_MOST_KNOWN = 2000
"""Configs that are kept, and metadata of videos."""
_Key = TypeVar("_Key")
_Known = TypeVar("_Known")


@dataclass(frozen=True)
class RunSummary:
    """A run; None: its files do not say."""

    name: str
    step: int
    """Steps that are done."""
    steps: int | None
    """Of the whole run."""
    state: RunState
    """unknown: whether a process trains cannot be seen from this machine."""
    host: str | None
    """Machine that trains, or did last."""
    updated: float | None
    """When its metrics, or else its config, were written last, in Unix seconds."""
    loss: float | None
    """Mean of the last steps, as are clips per second."""
    clips_per_second: float | None
    eta_seconds: float | None
    """Until the last step, while it runs."""
    config: str | None
    """Its config, below the folder of runs."""
    pipeline: bool
    """Whether it has exported a pipeline."""
    problem: str | None
    """What is wrong with its files."""


@dataclass(frozen=True)
class RunDetails(RunSummary):
    """A run with all that its files say, but for curves and videos."""

    checkpoints: list[RunCheckpoint]
    settings: dict[str, Any]
    """Its config."""
    fields: list[str]
    """Names of its curves."""
    prompts: list[str]
    """Of its validation videos."""


@dataclass(frozen=True)
class RunCurves:
    """Curves of a run."""

    fields: dict[str, list[tuple[int, float, float, float]]]
    """Buckets by name: (last step, mean, least, largest)."""
    last_step: int
    """-1: there is none."""
    complete: bool
    """Whether the file was read to its end; a large one takes several requests."""


@dataclass(frozen=True)
class ValidationVideo:
    """A validation video of a run."""

    step: int
    name: str
    prompt: str | None
    """None: the file is damaged."""
    num_inference_steps: int | None
    url: str


@dataclass(frozen=True)
class ValidationVideos:
    """The validation videos of a run."""

    steps: list[int]
    data: list[ValidationVideo]


class Runs:
    """The runs in a folder, each a folder directly below it."""

    def __init__(self, root: Path) -> None:
        self.given, self.root = root, Path(os.path.realpath(root))
        self.checkpoints = CheckpointStates()
        self._lock = threading.Lock()
        self._readers: OrderedDict[str, MetricsReader] = OrderedDict()
        self._configs: OrderedDict[Path, tuple[tuple[int, int], dict[str, Any], str | None]] = OrderedDict()
        self._videos: OrderedDict[Path, tuple[tuple[int, int], str | None, int | None]] = OrderedDict()

    def summaries(self) -> list[RunSummary]:
        """Return all runs, those that changed last first."""
        found = [RunSummary(**self._summary(folder)) for folder in self._folders()]
        return sorted(found, key=lambda run: run.updated or 0.0, reverse=True)

    def summary(self, name: str) -> RunSummary:
        """Return a run. Raises RequestError (404) if there is none of this name."""
        return RunSummary(**self._summary(self.folder(name)))

    def details(self, name: str) -> RunDetails:
        """Return all that the files of a run say, but for curves and videos. Raises RequestError as `summary`."""
        folder = self.folder(name)
        reader = self._reader(name)
        reader.update()
        summary, settings = self._summary(folder), self._config(folder)[0]
        prompts = _group(settings, "validation").get("prompts")
        return RunDetails(
            **summary | {"problem": summary["problem"] or reader.problem},
            checkpoints=self.checkpoints.of_run(folder),
            settings=settings,
            fields=list(reader.curves),
            prompts=[str(prompt) for prompt in prompts] if isinstance(prompts, list) else [],
        )

    def curves(self, name: str, fields: list[str] | None, points: int, after: int) -> RunCurves:
        """Return curves of a run.

        Args:
            fields: names of curves; None: all.
            points: most buckets of a curve.
            after: only buckets that end at later steps.

        Raises:
            RequestError: as `summary`.
        """
        self.folder(name)
        reader = self._reader(name)
        reader.update()
        return RunCurves(reader.points(fields, points, after), reader.last_step, reader.complete)

    def samples(self, name: str) -> ValidationVideos:
        """Return the validation videos of a run by step. Raises RequestError as `summary`."""
        folder = self.folder(name)
        found = [
            self._sample(name, step, video)
            for step, place in sorted(sample_folders(folder))
            for video in sorted(sample_videos_in(place))
        ]
        return ValidationVideos(sorted({video.step for video in found}), found)

    def sample_file(self, name: str, step: int, file: str) -> Path:
        """Return the file of a validation video. Raises RequestError (404) if there is none."""
        for number, place in sample_folders(self.folder(name)):
            for video in sample_videos_in(place) if number == step else ():
                if video.name == file and os.path.realpath(video) == str(video):
                    return video
        raise RequestError(
            f"run {name}: it has no validation video {whole_text(file)[:80]!r} of step {step}: load the page again.",
            status=404,
            param="file",
            code="not_found",
        )

    def folder(self, name: str) -> Path:
        """Return the folder of a run. Raises RequestError (404) if there is none of this name."""
        if is_run_name(name) and (folder := self.root / name).is_dir() and is_run_folder(folder):
            if os.path.realpath(folder) == str(folder):
                return folder
        raise RequestError(
            f"run {whole_text(name)[:80]!r}: there is none of this name in the folder of runs.",
            status=404,
            param="name",
            code="not_found",
        )

    def _folders(self) -> Iterator[Path]:
        try:
            with os.scandir(self.root) as entries:
                for entry in entries:
                    if is_run_name(entry.name) and entry.is_dir(follow_symlinks=False):
                        if is_run_folder(folder := Path(entry.path)):
                            yield folder
        except OSError:  # no folder of runs yet, or an unreadable one
            return

    def _summary(self, folder: Path) -> dict[str, Any]:
        """Return the fields of `RunSummary`."""
        settings, problem = self._config(folder)
        lock, last = query_lock(folder), read_last_lines(folder / METRICS)
        steps = whole_number(_group(settings, "trainer").get("steps"))
        done = max([0 if last.step is None else last.step + 1, *step_folders(folder / "checkpoints")])
        exported = exported_step(folder)
        updated = last.updated or _changed(folder / CONFIG)
        fresh = updated is not None and abs(time.time() - updated) < _FRESH_SECONDS
        state: RunState = "stopped"
        if lock.held:
            state = "running"
        elif (steps is not None and done >= steps) or (done and exported == done):  # also after an early stop
            state = "finished"
        elif lock.held is None or (lock.host is not None and not lock.is_here and fresh):
            state = "unknown"
        left = max(0, steps - done) if steps is not None else None
        eta = left * last.seconds_per_step if left is not None and last.seconds_per_step else None
        return {
            "name": folder.name,
            "step": done,
            "steps": steps,
            "state": state,
            "host": None if lock.host is None else whole_text(lock.host),
            "updated": updated,
            "loss": last.loss,
            "clips_per_second": last.clips_per_second,
            "eta_seconds": eta if state == "running" else None,
            "config": f"{folder.name}/{CONFIG}" if (folder / CONFIG).is_file() else None,
            "pipeline": exported is not None,
            "problem": problem,
        }

    def _config(self, folder: Path) -> tuple[dict[str, Any], str | None]:
        """Return the config of a run, and what is wrong with it; it is read once for each time that it is written."""
        file = folder / CONFIG
        try:
            status = os.lstat(file)
            state = (status.st_mtime_ns, status.st_size)
            with self._lock:
                known = self._configs.get(folder)
            if known is None or known[0] != state:
                known = (state, *read_run_config(file))
                with self._lock:
                    _remember(self._configs, folder, known, _MOST_KNOWN)
            return known[1:]
        except FileNotFoundError:
            return {}, f"it has no {CONFIG}"
        except OSError as error:
            return {}, f"{CONFIG} cannot be read ({error.strerror})"

    def _reader(self, name: str) -> MetricsReader:
        with self._lock:
            reader = self._readers.get(name) or MetricsReader(self.root / name / METRICS)
            _remember(self._readers, name, reader, _MOST_READERS)
        return reader

    def _sample(self, run: str, step: int, video: Path) -> ValidationVideo:
        try:
            status = video.stat()
            state = (status.st_mtime_ns, status.st_size)
        except OSError:
            state = (0, 0)
        with self._lock:
            known = self._videos.get(video)
        if known is None or known[0] != state:
            facts = read_facts(video)
            known = (state, facts.prompt if facts else None, facts.num_inference_steps if facts else None)
            with self._lock:
                _remember(self._videos, video, known, _MOST_KNOWN)
        _, prompt, taken = known
        url = f"/v1/runs/{quote(run, safe='')}/samples/{step}/{quote(video.name, safe='')}"
        return ValidationVideo(step, video.name, prompt, taken, url)


def _group(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a group of settings; empty if it is missing or damaged."""
    found = settings.get(name)
    return found if isinstance(found, dict) else {}


def _changed(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None


def _remember(known: OrderedDict[_Key, _Known], key: _Key, value: _Known, most: int) -> None:
    """Keep a value as the newest; forget the oldest."""
    known[key] = value
    known.move_to_end(key)
    if len(known) > most:
        known.popitem(last=False)
