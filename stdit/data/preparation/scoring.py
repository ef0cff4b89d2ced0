"""`score`: numbers that say how a clip looks, from a window in its middle.

Letters: T frames, H height, W width.
"""

import contextlib
import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from stdit.data.decoding.decode import decode_clip
from stdit.data.manifest.rows import BYTE_RANGE_COLUMNS, METADATA, SPAN_COLUMNS
from stdit.data.preparation.flow import Result, Section, Task, each_clip, finish
from stdit.data.preparation.jobs import LeftOut
from stdit.errors import UserError

GREY = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in grey (ITU-R BT.601)."""
RESERVED = ("path", "text", "member", "reason", *METADATA, *SPAN_COLUMNS, *BYTE_RANGE_COLUMNS)
TEXT_FRAMES = 3
"""Frames that are searched for text, which takes long."""


@dataclass(frozen=True)
class View:
    """What of a clip its scores are taken from."""

    frames: int = 32
    """At most; a clip that is shorter gives fewer."""
    fps: float = 8.0
    side: int = 256
    """Pixels of the longer side; a clip that is smaller is not enlarged."""

    def validate(self) -> None:
        """Raises UserError."""
        for name, value in (("frames", self.frames), ("fps", self.fps), ("side", self.side)):
            if not 1 <= value <= 4096:
                raise UserError(f"--{name} {value}: must be from 1 to 4096")


def score_clips(
    task: Task, scores: Sequence[str], scorers: Sequence[str] = (), view: View = View()
) -> list[str]:  # noqa: B008 (it is frozen)
    """Add a column for each score. Returns a summary; raises UserError.

    Args:
        scores: names in SCORES.
        scorers: "module:function" of the user's own: frames uint8 [T H W 3] to a number, or to a dict of them.
    """
    view.validate()
    for name in scores:
        if name not in SCORES:
            raise UserError(f"--scores {name}: is not one of {', '.join(SCORES)}")
    if not scores and not scorers:
        raise UserError(
            f"--scores is empty: name some of {', '.join(SCORES)}, or give a --scorer module:function"
        )
    table = task.open()
    own_packages(scores)
    for name in scorers:
        own_scorer(name)
    work = partial(scored, scores=tuple(scores), scorers=tuple(scorers), view=view)
    outcomes = each_clip(task, table, work, (tuple(scores), tuple(scorers), view), "score")
    results = [
        Result(row, [] if outcome.reason else [{**row, **outcome.value}], outcome.reason)
        for row, outcome in zip(table.rows, outcomes, strict=True)
    ]
    columns = dict.fromkeys(name for outcome in outcomes for name in outcome.value or {})
    return finish(task, table, results, list(columns))


def scored(section: Section, scores: Sequence[str], scorers: Sequence[str], view: View) -> dict[str, float]:
    """All scores of a clip, rounded to what they are worth. Raises DecodeError and LeftOut."""
    frames = middle_frames(section, view)
    found: dict[str, float] = {name: float(SCORES[name](frames, view.fps)) for name in scores}
    for name in scorers:
        found |= own_scores(name, frames)
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def middle_frames(section: Section, view: View) -> np.ndarray:
    """uint8 [T H W 3]. Raises DecodeError and LeftOut."""
    part = section.part()
    count = 1 if part.is_still else max(1, min(view.frames, math.floor(part.seconds * view.fps + 1e-6)))
    start = 0.0 if part.is_still else part.start + max(0.0, part.seconds - count / view.fps) / 2
    video = decode_clip(section.media, count, view.fps, *part.size(view.side), start=start)
    return video.permute(0, 2, 3, 1).numpy()


def motion(frames: np.ndarray, fps: float) -> float:
    """Mean length of the optical flow, in percent of the longer side a second. 0 for a single frame."""
    cv2 = opencv()
    height, width = frames.shape[1:3]
    if len(frames) < 2 or min(height, width) < 16:
        return 0.0
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    greys = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    lengths = [
        np.linalg.norm(flow.calc(before, after, None), axis=2).mean()
        for before, after in zip(greys, greys[1:], strict=False)
    ]
    return 100 * fps * float(np.mean(lengths)) / max(height, width)


def difference(frames: np.ndarray, fps: float) -> float:
    """Mean change of a pixel from frame to frame, in levels of grey of 255. 0 for a single frame."""
    greys = grey(frames)
    return float(np.abs(np.diff(greys, axis=0)).mean()) if len(frames) > 1 else 0.0


def sharpness(frames: np.ndarray, fps: float) -> float:
    """Variance of the Laplacian of grey levels, mean over frames: below about 100 looks soft."""
    cv2 = opencv()
    return float(np.mean([cv2.Laplacian(image, cv2.CV_32F).var() for image in grey(frames)]))


def brightness(frames: np.ndarray, fps: float) -> float:
    """Mean level of grey, from 0 to 255."""
    return float(grey(frames).mean())


def contrast(frames: np.ndarray, fps: float) -> float:
    """Standard deviation of the levels of grey in a frame, mean over frames."""
    return float(grey(frames).std(axis=(1, 2)).mean())


def text_area(frames: np.ndarray, fps: float) -> float:
    """Share of the picture, in percent, in which lettering is found: the mean over a few frames."""
    cv2 = opencv()
    detect = text_detector()
    chosen = frames[np.linspace(0, len(frames) - 1, min(TEXT_FRAMES, len(frames))).round().astype(int)]
    areas = []
    for frame in chosen:
        found = detect(frame[..., ::-1]).boxes  # it takes BGR
        area = sum(cv2.contourArea(np.asarray(box, np.float32)) for box in (() if found is None else found))
        areas.append(min(1.0, area / (frame.shape[0] * frame.shape[1])))
    return 100 * float(np.mean(areas))


SCORES: Mapping[str, Callable[[np.ndarray, float], float]] = {
    "motion": motion,
    "difference": difference,
    "sharpness": sharpness,
    "brightness": brightness,
    "contrast": contrast,
    "text_area": text_area,
}


def grey(frames: np.ndarray) -> np.ndarray:
    """uint8 [T H W 3] to float32 [T H W], from 0 to 255."""
    return frames.astype(np.float32) @ GREY


def own_packages(scores: Sequence[str]) -> None:
    """Raises UserError for a package that the scores need and that is not there."""
    if {"motion", "sharpness", "text_area"} & set(scores):
        opencv()
    if "text_area" in scores:
        text_detector()


@cache
def opencv() -> Any:
    """OpenCV on one thread. Raises UserError."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(f"OpenCV cannot be loaded ({error}): pip install 'stdit[prepare]'") from None
    cv2.setNumThreads(1)
    return cv2


@cache
def text_detector() -> Callable[..., Any]:
    """A detector of lettering, whose weights lie in its package. Raises UserError."""
    try:
        import onnxruntime  # noqa: F401 (it runs the detector)
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError(f"text_area needs rapidocr ({error}): pip install 'stdit[ocr]'") from None
    engine = RapidOCR(
        params={
            "Global.log_level": "error",
            "Det.limit_type": "max",  # enlarged, as by default, it takes much longer and sees lettering everywhere
            "Det.limit_side_len": 960,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
    return partial(engine, use_det=True, use_cls=False, use_rec=False)


@cache
def own_scorer(name: str) -> Callable[[np.ndarray], Any]:
    """The user's function "module:function", with the current folder among those that modules are looked for in.

    Raises UserError.
    """
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise UserError(f"--scorer {name}: must be module:function, such as my_scores:aesthetic")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"--scorer {name}: {module_name} cannot be imported ({error!r})") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"--scorer {name}: {module_name} has no function {function_name}")
    return function


def own_scores(name: str, frames: np.ndarray) -> dict[str, float]:
    """What the user's function says of a clip, which is left out where it fails. Raises LeftOut and UserError."""
    function = own_scorer(name)
    try:
        answer = function(frames)
    except Exception as error:
        raise LeftOut(f"scorer {name} failed: {type(error).__name__}: {error}") from error
    named = answer if isinstance(answer, Mapping) else {name.partition(":")[2]: answer}
    scores = {}
    for key, value in named.items():
        if not (isinstance(key, str) and key.isidentifier()) or key in RESERVED:
            raise UserError(
                f"--scorer {name} gives {key!r}: a score needs a name of its own, such as aesthetic"
            )
        number = math.nan
        with contextlib.suppress(TypeError, ValueError):
            number = float(value)
        if not math.isfinite(number):
            raise LeftOut(f"scorer {name} failed: {key} = {value!r} is no number")
        scores[key] = number
    return scores
