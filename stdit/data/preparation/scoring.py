"""`score`: numbers that say what a clip looks like, from a window of frames in its middle.

The scores are entries of a registry. `register_scorer` adds one from a module of your own.

Letters: T frames, H height, W width.
"""

import contextlib
import inspect
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from stdit.data.decoding.decode import decode_clip
from stdit.data.manifest.rows import BYTE_RANGE_COLUMNS, METADATA, SPAN_COLUMNS
from stdit.data.preparation.expressions import as_number
from stdit.data.preparation.flow import (
    BatchStage,
    ClipRecord,
    Task,
    add_columns,
    process_clips,
    write_results,
)
from stdit.data.preparation.jobs import FailedError, Outcome
from stdit.data.preparation.models import ModelConfig
from stdit.data.preparation.table import Table
from stdit.data.preparation.text_score import TEXT, TEXT_COLUMN, TextScorer, choose_frames
from stdit.errors import UserError, install_command
from stdit.hashing import hash_file
from stdit.registry import Registry

Scorer = Callable[[np.ndarray, float], float | Mapping[str, float]]
"""From frames uint8 [T H W 3] and frames per second to a score, or to several by name."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in grey (ITU-R BT.601)."""
RESERVED_COLUMNS = (
    "path",
    "text",
    "member",
    "reason",
    TEXT_COLUMN,
    *METADATA,
    *SPAN_COLUMNS,
    *BYTE_RANGE_COLUMNS,
)
FLOW_SIDE = 32
"""Pixels to which frames are padded for the optical flow: OpenCV chooses the levels of its pyramid by the width
alone, and on wide frames that are lower than this (a clip of 1280x100) reads outside of them."""
TEXT_FRAMES = 3
"""Frames that are searched for text, which is slow."""


@dataclass(frozen=True)
class ScoringWindow:
    """The frames of a clip that are scored."""

    frames: int = 32
    """At most; a shorter clip has fewer."""
    fps: float = 8.0
    side: int = 256
    """Pixels of the longer side; a smaller clip is not enlarged."""

    def validate(self) -> None:
        """Raise UserError if a setting is out of range."""
        for name, value in (("frames", self.frames), ("fps", self.fps), ("side", self.side)):
            if not 1 <= value <= 4096:
                raise UserError(f"--{name} {value}: must be from 1 to 4096")


def score_clips(
    task: Task,
    scores: Sequence[str],
    window: ScoringWindow = ScoringWindow(),  # noqa: B008 (it is frozen)
    text_model: ModelConfig | None = None,
) -> list[str]:
    """Add a column for each score. Returns a summary; raises UserError.

    Args:
        scores: names of the registry: the built-in ones, and those of `register_scorer`.
        text_model: the model of the score `text`, if that is one of them.
    """
    window.validate()
    if not scores:
        raise UserError(f"--scores is empty: name some of {', '.join(SCORERS.names())}")
    scorers = {name: SCORERS.get(name) for name in scores if name != TEXT}
    if TEXT in scores and text_model is None:
        raise UserError(
            "--scores text needs --model: the folder or hub id of a CLIP-like model of transformers"
        )
    if TEXT not in scores and text_model is not None:
        raise UserError(f"--model {text_model.path} is used by the score text alone: add it to --scores")
    if task.workers:
        for name, scorer in scorers.items():
            try:
                pickle.dumps(scorer)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise UserError(
                    f"--scores {name} cannot be sent to other processes ({error}): make it a function of a module, "
                    "or add --workers 0"
                ) from error
    table = task.open()
    _check_packages(scores)
    stage = None
    if text_model is not None:
        text_scorer = TextScorer(text_model)
        stage = BatchStage(text_scorer.score, text_model.batch_size, lambda row: row["text"])
    work = partial(_score_clip, scorers=scorers, window=window, for_text=stage is not None)
    code = tuple(_code_hash(scorer) for scorer in scorers.values())
    model = None if text_model is None else (text_model.path, text_model.dtype)
    outcomes = process_clips(task, table, work, (tuple(scores), code, window, model), "score", stage)
    columns = dict.fromkeys(name for outcome in outcomes for name in outcome.value or {})
    lines = write_results(task, table, add_columns(table, outcomes), list(columns))
    return [*lines, *_replaced(table, outcomes, [name for name in columns if name in table.columns])]


def _replaced(table: Table, outcomes: Sequence[Outcome], columns: Sequence[str]) -> list[str]:
    """Return a line for each column of the source whose values are now others."""
    lines = []
    for name in columns:
        pairs = zip(table.rows, outcomes, strict=True)
        values = [(row.get(name), out.value.get(name)) for row, out in pairs if out.reason is None]
        changed = sum(before not in (None, "") and as_number(before) != now for before, now in values)
        if changed:
            lines.append(
                f"column {name}: {changed} of {len(values)} values of the source are replaced by this score; "
                "rename the column in the source to keep both"
            )
    return lines


def register_scorer(name: str, scorer: Scorer) -> None:
    """Add a score, which `prepare_data.py score --import MODULE --scores NAME` computes.

    Args:
        name: of the score and its column.
        scorer: a function of a module, from frames uint8 [T H W 3] and their frames per second to a number, or to a
            dict of numbers, each of which gets a column of its own. A clip for which it raises an error, or returns
            a number that is not finite, is excluded.

    Raises:
        UserError: if the name is taken, or cannot be a column.
    """
    _check_column(name, name)
    SCORERS.register(name, scorer)


def _score_clip(
    record: ClipRecord, scorers: Mapping[str, Scorer], window: ScoringWindow, for_text: bool = False
) -> dict[str, Any]:
    """Return all scores of a clip, rounded to 6 digits. Raises DecodeError, ExcludedError and UserError.

    Args:
        for_text: also return the frames that the score `text` needs, under `TEXT`.
    """
    frames = middle_frames(record, window)
    scores: dict[str, Any] = {TEXT: choose_frames(frames)} if for_text else {}
    for name, scorer in scorers.items():
        try:
            answer = scorer(frames, window.fps)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise FailedError(f"score {name} failed: {type(error).__name__}: {error}") from error
        for column, value in (answer if isinstance(answer, Mapping) else {name: answer}).items():
            _check_column(name, column)
            number = math.nan
            with contextlib.suppress(TypeError, ValueError):
                number = float(value)
            if not math.isfinite(number):
                raise FailedError(f"score {name} failed: {column} = {value!r} is not a number")
            if column in scores:
                raise UserError(f"score {name}: another score writes the column {column}, too: leave one out")
            scores[column] = float(f"{number:.6g}")
    return scores


def _code_hash(scorer: Scorer) -> str:
    """Return a hash of the file that defines a scorer, whose earlier results a change of it makes void."""
    defined = scorer if inspect.isroutine(scorer) else type(scorer)
    try:
        return hash_file(Path(inspect.getfile(defined)))
    except (TypeError, OSError):  # it is built in, or was typed into an interpreter
        return ""


def _check_column(scorer: str, column: object) -> None:
    """Raise UserError if a score cannot be a column of this name."""
    if not (isinstance(column, str) and column.isidentifier()) or column in RESERVED_COLUMNS:
        raise UserError(
            f"score {scorer}: {column!r} cannot be a column: choose an identifier, such as aesthetic, and none of "
            f"{', '.join(RESERVED_COLUMNS)}"
        )


def middle_frames(record: ClipRecord, window: ScoringWindow) -> np.ndarray:
    """Decode the window in the middle of a clip: uint8 [T H W 3]. Raises DecodeError and ExcludedError."""
    span = record.span()
    count = 1 if span.is_still else max(1, min(window.frames, math.floor(span.seconds * window.fps + 1e-6)))
    start = 0.0 if span.is_still else span.start + max(0.0, span.seconds - count / window.fps) / 2
    video = decode_clip(
        record.media, count, window.fps, *span.size(window.side), start=start, field_order=record.field_order
    )
    return video.permute(0, 2, 3, 1).numpy()


def _motion(frames: np.ndarray, fps: float) -> float:
    """Return the mean length of the optical flow, in percent of the longer side per second; 0 for a single frame."""
    cv2 = opencv()
    height, width = frames.shape[1:3]
    if len(frames) < 2:
        return 0.0
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    below, right = max(0, FLOW_SIDE - height), max(0, FLOW_SIDE - width)
    greys = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    greys = [cv2.copyMakeBorder(grey, 0, below, 0, right, cv2.BORDER_REFLECT) for grey in greys]
    lengths = [
        np.linalg.norm(flow.calc(before, after, None)[:height, :width], axis=2).mean()
        for before, after in zip(greys, greys[1:], strict=False)
    ]
    return 100 * fps * float(np.mean(lengths)) / max(height, width)


def _difference(frames: np.ndarray, fps: float) -> float:
    """Return the mean change of a pixel between frames, in grey levels from 0 to 255; 0 for a single frame."""
    greys = _grey(frames)
    return float(np.abs(np.diff(greys, axis=0)).mean()) if len(frames) > 1 else 0.0


def _sharpness(frames: np.ndarray, fps: float) -> float:
    """Return the variance of the Laplacian of grey levels, mean over frames: below about 100 looks soft."""
    cv2 = opencv()
    return float(np.mean([cv2.Laplacian(image, cv2.CV_32F).var() for image in _grey(frames)]))


def _brightness(frames: np.ndarray, fps: float) -> float:
    """Return the mean grey level, from 0 to 255."""
    return float(_grey(frames).mean())


def _contrast(frames: np.ndarray, fps: float) -> float:
    """Return the standard deviation of the grey levels of a frame, mean over frames."""
    return float(_grey(frames).std(axis=(1, 2)).mean())


def _text_area(frames: np.ndarray, fps: float) -> float:
    """Return the share of the picture, in percent, that text covers: the mean over a few frames."""
    cv2 = opencv()
    detect = _text_detector()
    chosen = frames[np.linspace(0, len(frames) - 1, min(TEXT_FRAMES, len(frames))).round().astype(int)]
    areas = []
    for frame in chosen:
        found = detect(frame[..., ::-1]).boxes  # BGR
        area = sum(cv2.contourArea(np.asarray(box, np.float32)) for box in (() if found is None else found))
        areas.append(min(1.0, area / (frame.shape[0] * frame.shape[1])))
    return 100 * float(np.mean(areas))


def _text(frames: np.ndarray, fps: float) -> float:
    """Stand for the score of caption and clip in the registry: `TextScorer` computes it, in batches."""
    raise AssertionError("it needs the caption")


SCORERS: Registry[Scorer] = Registry(
    "--scores",
    {
        "motion": _motion,
        "difference": _difference,
        "sharpness": _sharpness,
        "brightness": _brightness,
        "contrast": _contrast,
        "text_area": _text_area,
        TEXT: _text,
    },
)


def _grey(frames: np.ndarray) -> np.ndarray:
    """Convert uint8 [T H W 3] to grey levels float32 [T H W], from 0 to 255."""
    return frames.astype(np.float32) @ LUMA


def _check_packages(scores: Sequence[str]) -> None:
    """Raise UserError if a package that the scores need is not installed."""
    if {"motion", "sharpness", "text_area"} & set(scores):
        opencv()
    if "text_area" in scores:
        _text_detector()


@cache
def opencv() -> Any:
    """Return OpenCV, set to one thread. Raises UserError if it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(f"OpenCV cannot be loaded ({error}): {install_command('prepare')}") from None
    cv2.setNumThreads(1)
    return cv2


@cache
def _text_detector() -> Callable[..., Any]:
    """Return a text detector, whose weights are part of its package. Raises UserError if it is not installed."""
    try:
        import onnxruntime  # noqa: F401 (it runs the detector)
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError(f"text_area needs rapidocr ({error}): {install_command('ocr')}") from None
    engine = RapidOCR(
        params={
            "Global.log_level": "error",
            "Det.limit_type": "max",  # the default enlarges frames, which is slow and finds text everywhere
            "Det.limit_side_len": 960,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
    return partial(engine, use_det=True, use_cls=False, use_rec=False)
