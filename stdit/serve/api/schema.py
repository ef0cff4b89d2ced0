"""The JSON schema of a request for a video, from the settings of the command line and their help texts."""

import dataclasses
import typing
from typing import Any

from stdit.pipelines.config import PROMPT_SETTINGS, PromptSettings
from stdit.serve.queue.request_conditions import MAX_CONDITIONS
from stdit.serve.queue.request_loras import MAX_LORAS
from stdit.serve.queue.request_values import MAX_PROMPT
from stdit.serve.queue.submissions import FIELDS

_JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}
_OWN: dict[str, dict[str, Any]] = {
    "prompt": {
        "type": "string",
        "minLength": 1,
        "maxLength": MAX_PROMPT,
        "description": "What the video shows.",
    },
    "negative_prompt": {"type": "string", "maxLength": MAX_PROMPT},
    "model": {
        "type": "string",
        "description": "Name of a model that /v1/models lists; the default one if missing.",
    },
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1, "description": "Drawn if missing."},
    "any_size": {"type": "boolean", "description": "Also make sizes that the model was not trained on."},
    "size": {
        "type": "string",
        "pattern": r"^\d{1,5}x\d{1,5}$",
        "description": "Width x height, as in OpenAI's API.",
    },
    "seconds": {"type": ["number", "string"], "description": "Length, as in OpenAI's API."},
    "loras": {
        "type": "array",
        "maxItems": MAX_LORAS,
        "items": {
            "type": "object",
            "properties": {
                "id": {"type": "string"},
                "weight": {"type": "number", "minimum": -100, "maximum": 100},
            },
            "required": ["id"],
            "additionalProperties": False,
        },
    },
    "conditions": {
        "type": "array",
        "maxItems": MAX_CONDITIONS,
        "items": {
            "type": "object",
            "properties": {
                "upload": {"type": "string", "description": "Id of an upload."},
                "video": {"type": "string", "description": "Id of a finished video."},
                "frame": {"type": ["integer", "null"], "description": "Where it begins; -1: the last frame."},
                "length": {"type": ["integer", "null"], "minimum": 1},
                "strength": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
                "source_frame": {
                    "type": ["integer", "null"],
                    "description": "First frame used; negative: from its end.",
                },
            },
            "additionalProperties": False,
        },
    },
}


def submission_schema() -> dict[str, Any]:
    """Return what OpenAPI says of the body of a request for a video."""
    hints = typing.get_type_hints(PromptSettings)
    properties = {name: _OWN.get(name) or _schema_of(hints[name]) for name in FIELDS}
    assert set(properties) >= set(PROMPT_SETTINGS) & set(FIELDS)
    whole = {
        "type": "object",
        "properties": properties,
        "required": ["prompt"],
        "additionalProperties": False,
    }
    file = {"input_reference": {"type": "string", "format": "binary"}}
    form = {**whole, "properties": properties | file}
    content = {"application/json": {"schema": whole}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


def _schema_of(hint: Any) -> dict[str, Any]:
    """Return the JSON schema of a setting's type."""
    if hint in _JSON_TYPES:
        return {"type": _JSON_TYPES[hint]}
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return {"enum": list(parts)}
    if origin is list:
        return {"type": "array", "items": _schema_of(parts[0])}
    if origin is tuple:
        return {
            "type": "array",
            "items": _schema_of(parts[0]),
            "minItems": len(parts),
            "maxItems": len(parts),
        }
    if hint is type(None):
        return {"type": "null"}
    assert not dataclasses.is_dataclass(hint)
    return {"anyOf": [_schema_of(part) for part in parts]}
