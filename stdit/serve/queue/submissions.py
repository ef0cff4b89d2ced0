"""From the fields of a request to a video that a worker can make, checked as the command line checks it."""

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from stdit.errors import UserError
from stdit.pipelines.conditions import FrameCondition
from stdit.pipelines.config import PROMPT_SETTINGS, SampleConfig
from stdit.pipelines.prompts import PROMPT_TYPES, prompt_line
from stdit.pipelines.requests import Request, check_requests, plan_requests
from stdit.pipelines.segments import Segments
from stdit.pipelines.untrained import warn_of_missing_trigger, warn_of_untrained
from stdit.serve.errors import RequestError
from stdit.serve.queue.captured_warnings import captured_warnings
from stdit.serve.queue.catalog import Catalog, OfferedModel
from stdit.serve.queue.request_conditions import FindFrames, read_conditions
from stdit.serve.queue.request_loras import check_architecture, read_loras
from stdit.serve.queue.request_values import MAX_SEGMENTS, check_numbers, check_texts
from stdit.suggestions import nearest_name

MAX_WORK = 2**31
"""Pixels of all frames that the segments of a video have together."""
_MOST_WARNINGS = 20
_INSTEAD = {
    "input_reference": "send it as a file in a form (multipart/form-data), or name an upload in conditions.",
    "checkpoint": "use model, the name of one that GET /v1/models lists.",
}
"""What to use instead of fields that requests do not have, or not as a text."""
_ALIASES = {"height": "size", "width": "size", "num_frames": "seconds"}
"""Fields by the names that OpenAI's API has for them: an error names the one that was sent."""
_NOT_OFFERED = ("image", "condition", "lora", "reference_path", "mask_strategy")
"""Settings of a prompt that name files: requests have `loras` and `conditions` instead."""
OWN_FIELDS = ("prompt", "model", "seed", "loras", "conditions", "any_size", "size", "seconds")
FIELDS = (*OWN_FIELDS, *(name for name in PROMPT_SETTINGS if name not in _NOT_OFFERED))
"""What a request may have."""
FIELD_TYPES = PROMPT_TYPES | {
    "loras": (list,),
    "conditions": (list,),
    "any_size": (bool,),
    "seconds": (str, int, float),
}
"""Types of their values; what is not listed is text."""


@dataclass(frozen=True)
class Submission:
    """A video that was asked for, after all checks."""

    model: OfferedModel
    request: Request
    body: dict[str, Any]
    """All that was asked, with the seed: the same body makes the same video."""
    warnings: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of the pipeline call."""
        return self.request.settings.resolved(self.model.settings)

    @property
    def segments(self) -> Segments:
        """Its segments, with their overlap."""
        return self.request.segments.resolved(int(self.settings["num_frames"]), self.model.codec)

    @property
    def total_frames(self) -> int:
        """Frames of the whole video."""
        return self.segments.total_frames(int(self.settings["num_frames"]))

    @property
    def batch(self) -> str:
        """A text that is equal for requests that can share a batch."""
        shared = f"{self.model.name} {self.request.shared()}"
        return hashlib.sha256(shared.encode()).hexdigest()

    @property
    def work(self) -> float:
        """Pixels x model calls, to which the time of a video is about proportional."""
        settings, segments = self.settings, self.request.segments.count
        halves = 1 if settings["guidance_scale"] == 1 or self.model.transformer.get("guidance_range") else 2
        calls = settings["num_inference_steps"] * halves + 4 * settings["refine_pairs"]
        return float(settings["num_frames"] * settings["height"] * settings["width"] * calls * segments)

    def shown(self, text: str) -> str:
        """Return a text with the numbers of conditioning frames instead of their files, which are the server's."""
        # the longest first: they hold the shorter ones
        names: tuple[Callable[[FrameCondition], str], ...] = (
            lambda one: f"condition {one}",
            lambda one: f"conditioning frames {one.source}",
            lambda one: str(one.source),
        )
        for name in names:
            for number, one in enumerate(self.request.conditions, 1):
                text = text.replace(name(one), f"condition {number}")
        return text

    def facts(self) -> dict[str, Any]:
        """Return what is known of the video before it is made."""
        settings, frames = self.settings, self.total_frames
        return {
            "prompt": self.body["prompt"],
            "seed": self.request.seed,
            "num_frames": frames,
            "height": settings["height"],
            "width": settings["width"],
            "fps": settings["fps"],
            "warnings": list(self.warnings),
        }


def read_submission(fields: Mapping[str, Any], catalog: Catalog, find_frames: FindFrames) -> Submission:
    """Check the fields of a request; return the video that they ask for.

    Raises:
        RequestError: for a field that is unknown or breaks its rule, in the words of the command line.
    """
    try:
        return _read_submission(fields, catalog, find_frames)
    except RequestError as error:
        sent = _ALIASES.get(error.param or "", "")
        if fields.get(sent) is None:
            raise
        message = f"{sent} = {fields[sent]!r:.80}: {error}"
        raise RequestError(message, error.status, sent, error.error_code) from None


def _read_submission(fields: Mapping[str, Any], catalog: Catalog, find_frames: FindFrames) -> Submission:
    values = {name: value for name, value in fields.items() if value is not None}
    for name in values:
        if name not in FIELDS:
            nearest = nearest_name(name, FIELDS)
            hint = f"did you mean {nearest}?" if nearest else f"use {', '.join(FIELDS)}."
            hint = _INSTEAD.get(name, hint)
            raise RequestError(f"{name:.80} is not a field: {hint}", param=name[:80], code="unknown_field")
    check_numbers(values)
    check_texts(values)
    model = catalog.model(values.get("model"))
    values = _without_aliases(values, model)
    own = {name: values.pop(name) for name in ("loras", "conditions", "any_size", "model") if name in values}
    if not isinstance(own.get("any_size", False), bool):
        raise RequestError(f"any_size = {own['any_size']!r:.80}: must be true or false.", param="any_size")
    try:
        line = prompt_line(dict(values))
    except UserError as error:
        raise _at_field(error) from None
    seed = secrets.randbelow(2**31) if line.seed is None else line.seed
    loras = read_loras(own.get("loras", []), catalog)
    settings = {name: getattr(line, name) for name in PROMPT_SETTINGS if name not in _NOT_OFFERED}
    with captured_warnings() as warnings:
        try:
            if (count := line.segments or 1) > MAX_SEGMENTS:
                raise RequestError(
                    f"segments = {count}: must be at most {MAX_SEGMENTS}: use fewer.", param="segments"
                )
            config = SampleConfig(**settings, prompt=[line.prompt], seed=seed, lora=loras)
            [request] = plan_requests(config)
            _check_work(request, model)
            conditions = read_conditions(own.get("conditions", []), model, request, find_frames)
            request = replace(request, conditions=conditions)
            codec = model.codec if request.segments.count > 1 else None
            warnings += check_requests(
                [request], model.settings, codec, model.transformer.get("guidance_range")
            )
            if not own.get("any_size"):
                _check_size(request, model)
            check_architecture(request.loras, own.get("loras", []), model)
        except RequestError:
            raise
        except UserError as error:
            raise _at_field(error) from None
        warn_of_untrained(
            [request], model.settings, (model.settings.get("flow") or {}).get("conditioning", {})
        )
        warn_of_missing_trigger([request.prompt], model.settings.get("trigger"), model.name)
    body = dict(values) | own | {"prompt": line.prompt, "model": model.name, "seed": seed}
    found = Submission(model, request, body)
    return replace(found, warnings=tuple(map(found.shown, warnings[:_MOST_WARNINGS])))


def _without_aliases(values: dict[str, Any], model: OfferedModel) -> dict[str, Any]:
    """Return the fields with ``size`` and ``seconds``, which OpenAI's API has, as height, width and num_frames."""
    values = dict(values)
    size, seconds = values.pop("size", None), values.pop("seconds", None)
    if size is not None:
        found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size, re.ASCII) if isinstance(size, str) else None
        if found is None or "height" in values or "width" in values:
            raise RequestError(
                f"size = {size!r:.80}: must be WIDTHxHEIGHT, such as 64x64, of at most 5 digits each, without height "
                "and width.",
                param="size",
            )
        values |= {"width": int(found[1]), "height": int(found[2])}
    if seconds is not None:
        try:
            number = 0.0 if isinstance(seconds, bool) else float(seconds)
        except (TypeError, ValueError):
            number = 0.0
        if not 0 < number <= 3600 or "num_frames" in values:
            raise RequestError(
                f"seconds = {seconds!r:.80}: must be a number above 0, at most 3600, without num_frames.",
                param="seconds",
            )
        fps = values.get("fps", model.settings["fps"])
        frames = number * float(fps if isinstance(fps, int | float) and 0 < fps < 1000 else 1)
        wanted = [max(1, round(frames) + step) for step in (0, *range(-8, 9))]
        natural = [one for one in wanted if model.natural_frames(one) == one]
        values["num_frames"] = min(natural or wanted, key=lambda one: abs(one - frames))
    return values


def _check_work(request: Request, model: OfferedModel) -> None:
    """Raise RequestError for a video so large that even an estimate of what it takes would take long."""
    settings, segments = request.settings.resolved(model.settings), request.segments.count
    frames, height, width = (int(settings[name]) for name in ("num_frames", "height", "width"))
    if segments * frames * height * width <= MAX_WORK:
        return
    times = f" x segments = {segments}" if segments > 1 else ""
    most = MAX_WORK // (segments * height * width)
    way_out = f"use num_frames = {most} or fewer" if most else "use a smaller height and width"
    raise RequestError(
        f"num_frames = {frames}, height = {height}, width = {width}: num_frames x height x width{times} must be at "
        f"most {MAX_WORK:,}: {way_out}{', or a smaller height and width' if most else ''}.",
        param="num_frames" if most else "height",
    )


def _check_size(request: Request, model: OfferedModel) -> None:
    """Raise RequestError for a size that the model was not made for, where that is known."""
    settings = request.settings.resolved(model.settings)
    frames, height, width = (int(settings[name]) for name in ("num_frames", "height", "width"))
    way_out = "or send any_size = true to try it"
    trained = model.trained_sizes
    if trained and (height, width) not in {(one["height"], one["width"]) for one in trained}:
        known = sorted({f"{one['width']}x{one['height']}" for one in trained})
        raise RequestError(
            f"height = {height}, width = {width}: the model was not trained on {width}x{height}: use "
            f"{' or '.join(known[:5])}, {way_out}.",
            param="height",
        )
    for name, value in (("height", height), ("width", width)):
        if value % model.multiple:
            below = max(model.multiple, value // model.multiple * model.multiple)
            raise RequestError(
                f"{name} = {value}: this model makes multiples of {model.multiple} pixels: use {below} or "
                f"{below + model.multiple}, {way_out}.",
                param=name,
            )
    known_lengths = {int(model.settings["num_frames"]), *(one["num_frames"] for one in model.trained_sizes)}
    if frames not in known_lengths and (natural := model.natural_frames(frames)) != frames:
        raise RequestError(
            f"num_frames = {frames}: the codec of this model makes {natural} frames from its latents, and some would "
            f"be cut off: use {natural}, {way_out}.",
            param="num_frames",
        )


def _at_field(error: UserError) -> RequestError:
    """Return an error of the command line as one of the field that it is about."""
    message = str(error).removeprefix("prompt 0: ")
    named = [name for name in re.findall(r"\w+", message.partition(":")[0]) if name in FIELDS]
    return RequestError(message, param=named[0] if named else None)


def hash_request(fields: Mapping[str, Any]) -> str:
    """Return a hash of what a client sent, by which a repeated request is known."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()
