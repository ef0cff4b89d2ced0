"""The table of a large manifest, kept in a file, so that a run that goes on need not read its rows again.

Known by the manifest's content and by how it was read: a changed one is read anew.
"""

import contextlib
import json
import logging
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from stdit.checkpoint_files import apply_umask
from stdit.data.manifest.clips import NUMBER_COLUMNS, Clips, Strings
from stdit.data.manifest.scan import Scan

INDEX_FORMAT = "stdit-clips-1"
LEAST_ROWS = 50_000
"""Fewer are read in no time."""
MOST_UNREAD = 10_000
STRINGS = ("paths", "texts", "members")

logger = logging.getLogger(__name__)


def manifest_key(manifest: str, *reading: object) -> str | None:
    """A hash of a manifest's bytes and of how it is read; None if it is no local file."""
    if not os.path.isfile(manifest):
        return None
    digest = xxhash.xxh3_128(json.dumps([INDEX_FORMAT, *reading]).encode())
    with open(manifest, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def load(file: Path, key: str) -> Scan | None:
    """What `save` kept; None if there is none, it is damaged, or of another key."""
    try:
        with safe_open(file, framework="numpy") as stored:
            about = stored.metadata() or {}
            if about.get("key") != key:
                return None
            facts = json.loads(about["facts"])
            strings: dict[str, Any] = {
                name: Strings.of(
                    stored.get_tensor(f"{name}.utf8").tobytes(), stored.get_tensor(f"{name}.offsets")
                )
                for name in (*STRINGS, *(f"extra.{name}" for name in facts["extra"]))
            }
            clips = Clips(
                **{name: strings[name] for name in STRINGS},
                **{name: _single(stored.get_tensor(name)) for name in NUMBER_COLUMNS},
                roots=tuple(facts["roots"]),
                extra={name: strings[f"extra.{name}"] for name in facts["extra"]},
            )
            unread = {int(place): (fields, refused) for place, (fields, refused) in facts["unread"].items()}
            return Scan(clips, stored.get_tensor("places"), unread)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None  # it is made anew


def save(file: Path, key: str, scan: Scan) -> None:
    """Keep a scan, written aside and renamed; of few rows, or with many unread ones, it is not worth it.

    Where the disk refuses, a warning says so.
    """
    if scan.total < LEAST_ROWS or len(scan.unread) > MOST_UNREAD:
        return
    clips = scan.clips
    tensors: dict[str, np.ndarray] = {"places": scan.places}
    named = {name: getattr(clips, name) for name in STRINGS}
    for name, strings in (
        named | {f"extra.{name}": strings for name, strings in clips.extra.items()}
    ).items():
        tensors[f"{name}.utf8"] = np.frombuffer(strings.utf8, np.uint8)
        tensors[f"{name}.offsets"] = strings.offsets
    for name in NUMBER_COLUMNS:
        column = getattr(clips, name)
        tensors[name] = np.ascontiguousarray(column[:1] if column.strides == (0,) else column)
    facts = {"roots": clips.roots, "extra": list(clips.extra), "unread": scan.unread}
    aside = file.with_name(f".{file.name}.{secrets.token_hex(6)}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, aside, {"key": key, "facts": json.dumps(facts)})
        apply_umask(aside)
        aside.replace(file)
    except (OSError, SafetensorError) as error:
        logger.warning(
            "%s cannot be written (%s): the manifest is read again when the run goes on", file, error
        )
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def _single(column: np.ndarray) -> Any:
    """The value of a column that holds but one."""
    return column[0] if len(column) == 1 else column
