"""Cache the table of a large manifest in a file, so that a resumed run need not parse its rows again.

Keyed by the content of the manifest and by how it is read: a changed manifest is read again.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from stdit.atomic_files import atomic_write
from stdit.data.manifest.clips import NUMBER_COLUMNS, Clips, Strings
from stdit.data.manifest.scan import Scan
from stdit.hashing import hash_arrays
from stdit.umask import apply_umask

_FORMAT = "stdit-clips-2"
MIN_ROWS = 50_000
"""Smaller manifests are read fast enough."""
MAX_UNREAD = 10_000
"""Above this number of incomplete rows, caching saves little."""
_STRINGS = ("paths", "texts", "members")

logger = logging.getLogger(__name__)


def manifest_key(manifest: str, *reading: object) -> str | None:
    """Return a hash of a manifest's bytes and of how it is read; None if it is no local file."""
    if not os.path.isfile(manifest):
        return None
    digest = xxhash.xxh3_128(json.dumps([_FORMAT, *reading]).encode())
    with open(manifest, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def load_scan(file: Path, key: str) -> Scan | None:
    """Return a saved scan; None if there is none, or it is damaged or has another key."""
    try:
        with safe_open(file, framework="numpy") as stored:
            about = stored.metadata() or {}
            if about.get("key") != key:
                return None
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        if about.get("hash") != hash_arrays({"key": key, "facts": about["facts"]}, tensors):
            return None
        facts = json.loads(about["facts"])
        clips = clips_of_tensors(tensors, facts["roots"], facts["extra"])
        unread = {int(place): (fields, refused) for place, (fields, refused) in facts["unread"].items()}
        return Scan(clips, tensors["places"], unread)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None  # the manifest is read again


def save_scan(file: Path, key: str, scan: Scan) -> None:
    """Save a scan atomically, unless it has few rows or many incomplete ones; warn if the disk refuses."""
    if scan.total < MIN_ROWS or len(scan.unread) > MAX_UNREAD:
        return
    clips = scan.clips
    tensors = tensors_of_clips(clips) | {"places": scan.places}
    facts = json.dumps({"roots": clips.roots, "extra": list(clips.extra), "unread": scan.unread})
    about = {"key": key, "facts": facts, "hash": hash_arrays({"key": key, "facts": facts}, tensors)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary:
            save_file(tensors, temporary, about)
            apply_umask(temporary)
    except (OSError, SafetensorError) as error:
        logger.warning("%s cannot be written (%s): a resumed run will read the manifest again", file, error)


def tensors_of_clips(clips: Clips) -> dict[str, np.ndarray]:
    """Return the columns of a table as arrays by name, for a file; a column of one value has one entry."""
    tensors: dict[str, np.ndarray] = {}
    named = {name: getattr(clips, name) for name in _STRINGS}
    for name, strings in (
        named | {f"extra.{name}": strings for name, strings in clips.extra.items()}
    ).items():
        tensors[f"{name}.utf8"] = np.frombuffer(strings.utf8, np.uint8)
        tensors[f"{name}.offsets"] = strings.offsets
    for name in NUMBER_COLUMNS:
        column = getattr(clips, name)
        alike = column.strides == (0,) or (column[:1] == column).all()
        tensors[name] = np.ascontiguousarray(column[:1] if alike else column)
    return tensors


def clips_of_tensors(
    tensors: Mapping[str, np.ndarray], roots: Sequence[str | None] = (None,), extra: Sequence[str] = ()
) -> Clips:
    """Return the table that `tensors_of_clips` was given.

    Raises:
        KeyError, ValueError: if an array is missing or malformed.
    """
    strings: dict[str, Any] = {
        name: Strings.of(tensors[f"{name}.utf8"].tobytes(), tensors[f"{name}.offsets"])
        for name in (*_STRINGS, *(f"extra.{name}" for name in extra))
    }
    return Clips(
        **{name: strings[name] for name in _STRINGS},
        **{name: _single(tensors[name]) for name in NUMBER_COLUMNS},
        roots=tuple(roots),
        extra={name: strings[f"extra.{name}"] for name in extra},
    )


def _single(column: np.ndarray) -> Any:
    """Return the value of a column with a single one, else the column."""
    return column[0] if len(column) == 1 else column
