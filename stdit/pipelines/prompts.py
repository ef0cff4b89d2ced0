"""Files of prompts: .txt, .csv and .jsonl. Imports nothing heavy."""

import csv
import difflib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from stdit.errors import UserError
from stdit.pipelines.config import PromptSettings, check_seed


@dataclass
class PromptLine(PromptSettings):
    """One prompt and the settings of its own; what is not set is as for all prompts."""

    prompt: str = ""
    """The caption."""
    seed: int | None = None
    """Seed of this prompt's first sample."""
    extra: dict[str, str] = field(default_factory=dict)
    """Columns of a csv that are no settings: written beside the video, and otherwise unused."""


INTEGERS = ("num_frames", "height", "width", "num_inference_steps", "seed", "parts", "overlap")
NUMBERS = ("fps", "guidance_scale", "guidance_rescale", "shift")
ENTRIES: dict[str, tuple[type, ...]] = {
    "condition": (str,),
    "then": (str,),
    "guidance_interval": (int, float),
}
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(INTEGERS, (int,)),
    **dict.fromkeys(NUMBERS, (int, float)),
    **dict.fromkeys(ENTRIES, (list,)),
    "close": (bool,),
    "extra": (dict,),
}
"""Types of the values in a .jsonl file; what is not named is text."""
KEYS = tuple(f.name for f in fields(PromptLine))


def read_prompts(file: str | Path) -> list[PromptLine]:
    """Read prompts and their settings.

    - ``.txt``: one prompt a line; blank lines and lines that begin with # are skipped.
    - ``.csv``: a header with a column ``prompt``; columns named like settings set them (empty: not set);
      other columns are kept in ``extra``, unless they look like a misspelt setting.
    - ``.jsonl``: an object a line, whose keys are ``prompt``, settings, and ``extra``.

    Raises:
        UserError: for a file that is missing, empty or malformed, with the number of the line.
    """
    path = Path(file)
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise UserError(f"prompts file {path}: its name must end in {', '.join(readers)}.")
    if not path.is_file():
        raise UserError(f"prompts file {path}: there is no such file.")
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
        _count_from(path.parent, line, f"{path}, prompt {number}: ")
    return lines


def _count_from(folder: Path, line: PromptLine, where: str) -> None:
    """Let the paths of given frames count from a folder. Raises UserError for those that lead out of it."""
    if line.image:
        line.image = _inside(folder, line.image, where)
    if line.reference_path:
        paths = [path.strip() for path in line.reference_path.split(";")]
        line.reference_path = ";".join(_inside(folder, path, where) for path in paths if path)
    line.condition = [_inside(folder, text, where) for text in line.condition]


def _inside(folder: Path, text: str, where: str) -> str:
    """A path, after which may stand an @ and where its frames go, from a folder that it must not lead out of."""
    try:
        inside = all(
            (folder / part).resolve().is_relative_to(folder.resolve())
            for part in (text, text.rpartition("@")[0])
        )
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, a name too long, a loop of links
        raise UserError(f"{where}{text!r} is no path ({error}).") from None
    if not inside:
        raise UserError(
            f"{where}{text!r} lies outside of {folder}, the folder of the prompts file, where nothing is opened for "
            "it: put it there, or give it by --image or --condition."
        )
    return str(folder / text)


def _read_txt(path: Path, text: str) -> list[PromptLine]:
    lines = (line.strip() for line in text.splitlines())
    return [PromptLine(prompt=line) for line in lines if line and not line.startswith("#")]


def _read_csv(path: Path, text: str) -> list[PromptLine]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    known = set(KEYS) - {"extra"}
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
            result.append(_line({**values, "extra": extra}, where))
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
        for key in set(values) - set(KEYS):
            nearest = difflib.get_close_matches(key, KEYS, 1, 0.5)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"use {', '.join(KEYS)}."
            raise UserError(f"{where}unknown key {key!r}: {hint}")
        result.append(_line({name: value for name, value in values.items() if value is not None}, where))
    return result


def _csv_value(name: str, value: str, where: str) -> Any:
    """A csv field as the setting wants it; a list is written as in .jsonl, or is its one entry."""
    read: Callable[[str], Any]
    if name in INTEGERS:
        read, words = int, "a whole number"
    elif name in NUMBERS:
        read, words = float, "a number"
    elif name == "close":
        read, words = {"true": True, "false": False}.__getitem__, "true or false"
    elif name in ENTRIES and value.startswith("[") and value.endswith("]"):
        read, words = json.loads, 'a list such as ["a", "b"]'
    else:
        return value
    try:
        return read(value)
    except (ValueError, KeyError, RecursionError):
        raise UserError(f"{where}{name} = {value[:200]!r}: must be {words}.") from None


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _line(values: dict[str, Any], where: str) -> PromptLine:
    """Check types and ranges of the settings of one line."""
    for name in ("condition", "then"):
        if isinstance(values.get(name), str):
            values[name] = [values[name]]
    for name, value in values.items():
        kinds = KINDS.get(name, (str,))
        if not _is(value, kinds) or (name in ENTRIES and not all(_is(one, ENTRIES[name]) for one in value)):
            words = " or ".join(kind.__name__ for kind in kinds)
            of = " of " + " or ".join(kind.__name__ for kind in ENTRIES[name]) if name in ENTRIES else ""
            raise UserError(f"{where}{name} = {value!r}: must be {words}{of}.")
    if not str(values.get("prompt", "")).strip():
        raise UserError(f"{where}the prompt is empty: write one, or delete the line.")
    line = PromptLine(**values)
    line.check(where)
    if line.seed is not None:
        check_seed(line.seed, where)
    return line
