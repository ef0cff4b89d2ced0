"""Files of prompts: .txt, .csv and .jsonl. Imports no torch."""

import csv
import difflib
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from stdit.errors import UserError
from stdit.lora.config import split_lora
from stdit.pipelines.config import PromptSettings, check_seed
from stdit.suggestions import nearest_name


@dataclass
class PromptLine(PromptSettings):
    """One prompt and its own settings; what is None or empty takes the setting of all prompts."""

    prompt: str = ""
    """The caption."""
    seed: int | None = None
    """Seed of this prompt's first sample."""
    extra: dict[str, str] = field(default_factory=dict)
    """Columns of a csv that are no settings; only written to the metadata of the video."""


_INTEGERS = (
    "num_frames",
    "height",
    "width",
    "num_inference_steps",
    "seed",
    "segments",
    "overlap",
    "refine_pairs",
)
_NUMBERS = ("fps", "guidance_scale", "guidance_rescale", "shift", "refine_level", "refine_guidance_scale")
_LISTS: dict[str, tuple[type, ...]] = {
    "condition": (str,),
    "lora": (str,),
    "segment_prompts": (str,),
    "guidance_interval": (int, float),
    "pab": (int,),
    "pab_timesteps": (int, float),
}
PROMPT_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_INTEGERS, (int,)),
    **dict.fromkeys(_NUMBERS, (int, float)),
    **dict.fromkeys(_LISTS, (list,)),
    "loop": (bool,),
    "extra": (dict,),
    "cache": (str, int, float),
}
"""Types of the values in a .jsonl file, by setting; what is not listed is text."""
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
}
_KEYS = tuple(f.name for f in fields(PromptLine))


def read_prompts(file: str | Path) -> list[PromptLine]:
    """Read prompts and their settings from a file.

    - ``.txt``: one prompt per line; blank lines and lines that begin with # are skipped.
    - ``.csv``: a header with a column ``prompt``; columns named like settings set them (empty: not set);
      other columns are kept in ``extra``, unless they look like a misspelt setting.
    - ``.jsonl``: one object per line, with the keys ``prompt``, settings, and ``extra``.

    Raises:
        UserError: for a missing, empty or malformed file, with the line number.
    """
    path = Path(file)
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise UserError(f"prompts file {path}: its name must end in {', '.join(readers)}.")
    if not os.path.isfile(path):
        what = (
            "it is a folder, pipe or device: name a file."
            if os.path.exists(path)
            else "there is no such file."
        )
        raise UserError(f"prompts file {path}: {what}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompts file {path} is not UTF-8 text ({error.reason}): save it as UTF-8."
        ) from None
    lines = readers[path.suffix.lower()](path, text)
    if not lines:
        raise UserError(f"prompts file {path} holds no prompt: write at least one.")
    for number, line in enumerate(lines, start=1):
        _resolve_paths(path.parent, line, f"{path}, prompt {number}: ")
    return lines


def _resolve_paths(folder: Path, line: PromptLine, where: str) -> None:
    """Make paths of frames and adapters relative to a folder; raise UserError for those outside it."""
    if line.image:
        line.image = _path_inside(folder, line.image, where)
    if line.reference_path:
        paths = [path.strip() for path in line.reference_path.split(";")]
        line.reference_path = ";".join(_path_inside(folder, path, where) for path in paths if path)
    line.condition = [_path_inside(folder, text, where) for text in line.condition]
    for text in line.lora:
        split_lora(text, where)  # an empty name would become that of the folder
    line.lora = [_path_inside(folder, text, where) for text in line.lora]


def _path_inside(folder: Path, text: str, where: str) -> str:
    """Return a path (FILE, FILE@frame... or FILE:weight) relative to a folder; raise UserError if it leads out."""
    try:
        inside = all(
            (folder / part).resolve().is_relative_to(folder.resolve())
            for part in (text, text.rpartition("@")[0], text.rpartition(":")[0])
        )
    except (OSError, ValueError, RuntimeError) as error:  # null byte, name too long, loop of links
        raise UserError(f"{where}{text!r} is no path ({error}).") from None
    if not inside:
        raise UserError(
            f"{where}{text!r} lies outside of {folder}, the folder of the prompts file, which may only name "
            "files inside it: move the file there, or use --image, --condition or --lora."
        )
    return str(folder / text)


def _read_txt(path: Path, text: str) -> list[PromptLine]:
    lines = (line.strip() for line in text.splitlines())
    return [PromptLine(prompt=line) for line in lines if line and not line.startswith("#")]


def _read_csv(path: Path, text: str) -> list[PromptLine]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    known = set(_KEYS) - {"extra"}
    result: list[PromptLine] = []
    try:
        columns = list(reader.fieldnames or [])
        if not columns:
            return []
        if "prompt" not in columns:
            raise UserError(f"{path}, line 1: no column 'prompt' among {', '.join(columns)}.")
        for column in columns:
            if column not in known and (nearest := difflib.get_close_matches(column, known, 1, 0.8)):
                raise UserError(f"{path}, line 1: column {column!r}: did you mean {nearest[0]!r}?")
        for row in reader:
            where = f"{path}, line {reader.line_num}: "
            if None in row or None in row.values():
                raise UserError(f"{where}must have {len(columns)} fields; quote those with commas in them.")
            values = {
                name: _csv_value(name, value, where) for name, value in row.items() if name in known and value
            }
            extra = {name: value for name, value in row.items() if name not in known}
            result.append(prompt_line({**values, "extra": extra}, where))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num + 1}: not valid csv ({error}).") from None
    return result


def _read_jsonl(path: Path, text: str) -> list[PromptLine]:
    result = []
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{path}, line {number}: "
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}not valid JSON ({error}).") from None
        if not isinstance(values, dict):
            raise UserError(f'{where}must be an object, such as {{"prompt": "a red ball"}}.')
        for key in set(values) - set(_KEYS):
            nearest = nearest_name(key, _KEYS)
            hint = f"did you mean {nearest!r}?" if nearest else f"use {', '.join(_KEYS)}."
            raise UserError(f"{where}unknown key {key!r}: {hint}")
        result.append(
            prompt_line({name: value for name, value in values.items() if value is not None}, where)
        )
    return result


def _csv_value(name: str, value: str, where: str) -> Any:
    """Convert a csv field to the type of its setting; a list is written as in .jsonl, or as its only entry."""
    read: Callable[[str], Any]
    if name in _INTEGERS:
        read, words = int, "a whole number"
    elif name in _NUMBERS:
        read, words = float, "a number"
    elif name == "cache" and re.fullmatch(r"[-+.\d].*", value):
        read, words = float, "a word or a number"
    elif name == "loop":
        read, words = {"true": True, "false": False}.__getitem__, "true or false"
    elif name in _LISTS and value.startswith("[") and value.endswith("]"):
        read, words = json.loads, 'a list such as ["a", "b"]'
    else:
        return value
    try:
        return read(value)
    except (ValueError, KeyError, RecursionError):
        raise UserError(f"{where}{name} = {value[:200]!r}: must be {words}.") from None


def _is_instance(value: Any, kinds: tuple[type, ...]) -> bool:
    """Return whether a value has one of the types; bool is no int here."""
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def prompt_line(values: dict[str, Any], where: str = "") -> PromptLine:
    """Return a prompt with its own settings from values as JSON has them.

    Raises:
        UserError: for a wrong type, a value that breaks its rule, or an empty prompt.
    """
    for name in ("condition", "lora", "segment_prompts"):
        if isinstance(values.get(name), str):
            values[name] = [values[name]]
    for name, value in values.items():
        kinds = PROMPT_TYPES.get(name, (str,))
        if not _is_instance(value, kinds) or (
            name in _LISTS and not all(_is_instance(one, _LISTS[name]) for one in value)
        ):
            words = _WORDS[kinds[-1]]
            inner = f" of {'texts' if str in _LISTS[name] else 'numbers'}" if name in _LISTS else ""
            raise UserError(f"{where}{name} = {value!r}: must be {words}{inner}.")
    if not str(values.get("prompt", "")).strip():
        raise UserError(f"{where}the prompt is empty: write one, or delete the line.")
    line = PromptLine(**values)
    line.check(where)
    if line.seed is not None:
        check_seed(line.seed, where)
    return line
