"""Names and files of a run folder, read so that nothing in it is an error. Imports no torch."""

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from stdit.errors import UserError
from stdit.pipelines.sources import MODEL_INDEX, pipeline_step
from stdit.serve.json_values import sendable, whole_number, whole_text

CONFIG, METRICS = "config.yaml", "metrics.jsonl"
_MOST_CONFIG = 1 << 18
"""Bytes of a config."""
_STEP = re.compile(r"step-(\d{1,18})", re.ASCII)
_MOST_NAME = 200


def is_run_name(name: str) -> bool:
    """Return whether a text can be the name of one folder: no separators, control characters or dot at its start."""
    return (
        0 < len(name) <= _MOST_NAME
        and not name.startswith(".")
        and not any(one in "/\\" or unicodedata.category(one) in ("Cc", "Cs") for one in name)
    )


def is_run_folder(folder: Path) -> bool:
    """Return whether a folder is that of a run: it has a config, metrics, or checkpoints."""
    return any((folder / name).exists() for name in (CONFIG, METRICS, "checkpoints"))


def read_run_config(file: Path) -> tuple[dict[str, Any], str | None]:
    """Return the settings of a config, as JSON can hold them, and what is wrong with it.

    Raises:
        OSError: if it cannot be read.
    """
    if not file.is_file() or file.stat().st_size > _MOST_CONFIG:
        return {}, f"{file.name} is no config: it is no file, or has more than {_MOST_CONFIG} bytes"
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return sendable(found), None
        return {}, f"{file.name} holds no settings"
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return {}, f"{file.name} is damaged ({whole_text(' '.join(str(error).split()))[:200]})"


def exported_step(run: Path) -> int | None:
    """Return the step of the exported pipeline of a run, -1 if that does not say; None if there is none."""
    try:
        step = whole_number(pipeline_step(run / "pipeline"))
    except (UserError, OSError):
        return None if not (run / "pipeline" / MODEL_INDEX).is_file() else -1
    return -1 if step is None else step


def sample_folders(run: Path) -> Iterator[tuple[int, Path]]:
    """Yield the folders of the validation videos of a run, with their steps."""
    for name, entry in _entries(run / "samples"):
        if (found := _STEP.fullmatch(name)) and entry.is_dir(follow_symlinks=False):
            yield int(found[1]), Path(entry.path)


def sample_videos_in(folder: Path) -> Iterator[Path]:
    """Yield the mp4 files of a folder."""
    for name, entry in _entries(folder):
        if name.endswith(".mp4") and not name.startswith(".") and entry.is_file(follow_symlinks=False):
            if whole_text(name) == name:
                yield Path(entry.path)


def _entries(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                yield entry.name, entry
    except OSError:  # there is none
        return
