"""Folders that prove themselves whole: a ``meta.json`` with the size and hash of every other file.

A checkpoint is written aside, sealed with `write_manifest`, and renamed with `publish`; a reader calls
`verify` or `newest_whole`. Everything here reads JSON and bytes only: nothing in a checkpoint is unpickled.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from stdit.errors import UserError

META = "meta.json"
STEP_FOLDER = re.compile(r"step-(\d+)")


def hash_file(path: Path) -> str:
    """``xxh3:<32 hex digits>`` of a file's bytes (XXH3-128: finds flipped bits; not a signature)."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return f"xxh3:{digest.hexdigest()}"


def write_manifest(folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """Flush the files of ``folder`` to disk and write ``meta.json``: ``meta`` plus size and hash of each.

    Returns what was written. Raises OSError when the disk refuses, so call it before `publish`.
    """
    if "files" in meta:
        raise ValueError("meta has a key 'files', which write_manifest fills in: give it another name.")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / META)
    files = {}
    for path in paths:
        _fsync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "hash": hash_file(path)}
    sealed = {**meta, "files": files}
    text = json.dumps(sealed, indent=1, sort_keys=True) + "\n"
    (folder / META).write_text(text, encoding="utf-8")
    _fsync(folder / META)
    for directory in {path.parent for path in paths} | {folder}:
        _fsync(directory)
    return sealed


def publish(aside: Path, folder: Path) -> None:
    """Give a sealed folder its name and flush the parent. Raises FileExistsError rather than replace."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists")
    os.rename(aside, folder)
    _fsync(folder.parent)


def read_json(file: Path, what: str) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        UserError: missing or malformed.
    """
    if not file.is_file():
        raise UserError(f"{str(file.parent)!r} is not {what}: it has no {file.name}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{str(file)!r} is not JSON ({error}): it is damaged, save it anew") from error
    if not isinstance(content, dict):
        raise UserError(f"{str(file)!r} holds no JSON object: it is damaged, save it anew")
    return content


def read_meta(folder: Path) -> dict[str, Any]:
    """The manifest of a sealed folder, its files unread. Raises UserError naming what is wrong."""
    path = folder / META
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder} is not a folder: give one like .../checkpoints/step-00001000.")
    if not path.is_file():
        raise UserError(f"checkpoint {folder} has no {META}: empty, or never finished. Use another one.")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        message = f"checkpoint {folder}: {META} is not valid JSON ({error}): use another checkpoint."
        raise UserError(message) from None
    if not isinstance(meta, dict) or not isinstance(meta.get("files"), dict):
        raise UserError(f"checkpoint {folder}: {META} lists no files: use another checkpoint.")
    return meta


def verify(folder: Path, needed: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """Check the files of ``folder`` that are ``needed`` (by relative name) against the manifest; return it.

    Raises UserError naming the first file that is missing, of another size, or of other content.
    """
    meta = read_meta(folder)
    way_out = "use another checkpoint, or delete this folder to go on from the one before it"
    for name, entry in meta["files"].items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"checkpoint {folder}: {META} names {name!r}, outside the folder: {way_out}.")
        if not needed(name):
            continue
        if not path.is_file():
            raise UserError(f"checkpoint {folder}: {name} is missing: {way_out}.")
        size = path.stat().st_size
        written = entry.get("bytes")
        if size != written:
            raise UserError(
                f"checkpoint {folder}: {name} has {size} bytes, but {written} were written: {way_out}."
            )
        if hash_file(path) != entry.get("hash"):
            raise UserError(f"checkpoint {folder}: {name} has changed since it was written: {way_out}.")
    return meta


def step_of(folder: Path) -> int | None:
    """The step in a name such as ``step-00001000``; None for any other name (``step-00001000.tmp`` too)."""
    match = STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def newest_whole(
    checkpoints: Path, needed: Callable[[str], bool] = lambda name: True
) -> tuple[Path | None, list[str]]:
    """The newest ``step-N`` folder under ``checkpoints`` that verifies, and why newer ones do not."""
    passed_over: list[str] = []
    folders = [folder for folder in checkpoints.glob("step-*") if step_of(folder) is not None]
    for folder in sorted(folders, key=lambda folder: step_of(folder) or 0, reverse=True):
        try:
            verify(folder, needed)
        except UserError as error:
            passed_over.append(str(error))
        else:
            return folder, passed_over
    return None, passed_over


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
