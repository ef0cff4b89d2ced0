"""Conditioning frames of a request: of uploads, and of videos that are finished."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stdit.errors import UserError
from stdit.pipelines.conditions import FrameCondition
from stdit.pipelines.requests import Request
from stdit.serve.errors import RequestError
from stdit.serve.queue.catalog import OfferedModel

MAX_CONDITIONS = 32
FindFrames = Callable[[str, str], Path]
"""Maps "upload" or "video" and an id to a file; raises RequestError if there is none."""
_CONDITION_FIELDS = {
    "upload": str,
    "video": str,
    "frame": int,
    "length": int,
    "strength": float,
    "source_frame": int,
}


def read_conditions(
    entries: Any, model: OfferedModel, request: Request, find_frames: FindFrames
) -> tuple[FrameCondition, ...]:
    """Return the conditioning frames of a request, each inside the video and in its source.

    Raises:
        RequestError: if a file is not there or no video, frames do not fit, or an entry has another form.
    """
    if not isinstance(entries, list) or not all(isinstance(one, Mapping) for one in entries):
        raise RequestError(
            'conditions: must be a list such as [{"upload": "ID", "frame": 0}].', param="conditions"
        )
    if len(entries) > MAX_CONDITIONS:
        raise RequestError(
            f"conditions: has {len(entries)} entries: at most {MAX_CONDITIONS} are used.", param="conditions"
        )
    settings = request.settings.resolved(model.settings)
    num_frames, fps = int(settings["num_frames"]), float(settings["fps"])
    total = request.segments.resolved(num_frames, model.codec).total_frames(num_frames)
    found = []
    for place, entry in enumerate(entries):
        try:
            found.append(_read_condition(entry, total, fps, find_frames))
        except RequestError as error:
            field = f".{error.param}" if error.param in _CONDITION_FIELDS else ""
            raise RequestError(str(error), param=f"conditions[{place}]{field}") from None
    return tuple(found)


def _read_condition(
    entry: Mapping[str, Any], total: int, fps: float, find_frames: FindFrames
) -> FrameCondition:
    for name, value in entry.items():
        kind = _CONDITION_FIELDS.get(name)
        right = isinstance(value, (int, float) if kind is float else kind) if kind else False
        if kind is None or (value is not None and (not right or isinstance(value, bool))):
            words = {str: "a text", int: "a whole number", float: "a number"}
            rule = f"must be {words[kind]}" if kind else f"use {', '.join(_CONDITION_FIELDS)}"
            raise RequestError(f"conditions: {name:.40} = {value!r:.80}: {rule}.", param=name)
    sources = [name for name in ("upload", "video") if entry.get(name) is not None]
    if len(sources) != 1:
        raise RequestError("conditions: each needs either the id of an upload or that of a video.")
    file = find_frames(sources[0], entry[sources[0]])
    skip, length, strength = entry.get("source_frame") or 0, entry.get("length"), entry.get("strength")
    try:
        if skip < 0:
            available = FrameCondition(str(file), 0).resolved(10**6, fps).length
            assert available is not None
            skip = max(0, available + skip)
        strength = 1.0 if strength is None else float(strength)
        condition = FrameCondition(str(file), entry.get("frame") or 0, length, strength, skip)
        return condition.resolved(total, fps)
    except UserError as error:
        message = str(error).replace(str(file), f"its {sources[0]}")
        field = _field_of_condition(message)
        if field is not None:
            message = f"{field} = {entry.get(field)}: {message.partition(': ')[2]}"
        raise RequestError(message, param=field) from None


def _field_of_condition(message: str) -> str | None:
    """Return the field of conditioning frames that an error of the command line is about."""
    words = {"its strength must": "strength", "its length must": "length", "choose one of them": "frame"}
    words |= {"begin earlier": "length", "leave the length out": "length"}
    return next((field for text, field in words.items() if text in message), None)
