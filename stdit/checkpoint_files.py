"""Folders that prove themselves whole: a ``meta.json`` with the size and hash of every other file.

A checkpoint is written aside, sealed with `write_manifest`, and renamed with `publish`; a reader calls
`verify` or `newest_whole`. Everything here reads JSON and bytes only: nothing in a checkpoint is unpickled.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import xxhash

from stdit.errors import UserError

META = "meta.json"
FORMAT = 2
"""Of the folders that are written, and the only one that is read."""
STEP_FOLDER = re.compile(r"step-(\d+)")


class NewerFormatError(UserError):
    """A checkpoint that is whole, as far as this version can tell, and must not be passed over."""


def hash_bytes(content: bytes) -> str:
    """As `hash_file`, of bytes."""
    return f"xxh3:{xxhash.xxh3_128(content).hexdigest()}"


def hash_file(path: Path) -> str:
    """``xxh3:<32 hex digits>`` of a file's bytes (XXH3-128: finds flipped bits; not a signature)."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return f"xxh3:{digest.hexdigest()}"


def sealed(folder: Path, paths: Iterable[Path]) -> dict[str, Any]:
    """Flush files of ``folder`` to disk; returns the size and hash of each, as read again, by relative name."""
    files = {}
    for path in sorted(paths):
        _fsync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "hash": hash_file(path)}
    return files


def write_manifest(folder: Path, meta: dict[str, Any], files: dict[str, Any] | None = None) -> None:
    """Write ``meta.json``: ``meta`` plus what is in ``folder``, and flush it.

    Args:
        files: what `sealed` gave; none: seal all that is there.

    Raises:
        OSError: when the disk refuses, so call it before `publish`.
    """
    if own := {"files", "format"} & meta.keys():
        raise ValueError(f"meta has the keys {own}, which write_manifest fills in: give them other names.")
    if files is None:
        files = sealed(
            folder, (path for path in folder.rglob("*") if path.is_file() and path != folder / META)
        )
    text = json.dumps({**meta, "format": FORMAT, "files": files}, indent=1, sort_keys=True) + "\n"
    (folder / META).write_text(text, encoding="utf-8")
    _fsync(folder / META)
    for directory in {(folder / name).parent for name in files} | {folder}:
        _fsync(directory)


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
    except (ValueError, RecursionError) as error:
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
    except (ValueError, RecursionError) as error:
        message = f"checkpoint {folder}: {META} is not valid JSON ({error}): use another checkpoint."
        raise UserError(message) from None
    if not isinstance(meta, dict) or not isinstance(meta.get("files"), dict):
        raise UserError(f"checkpoint {folder}: {META} lists no files: use another checkpoint.")
    if meta.get("format") != FORMAT:
        raise _other_format(folder, meta)
    return meta


def _other_format(folder: Path, meta: dict[str, Any]) -> UserError:
    found, versions = meta.get("format", 1), meta.get("versions")
    version = versions.get("stdit", "?") if isinstance(versions, dict) else "?"
    if isinstance(found, int) and found > FORMAT:
        return NewerFormatError(
            f"checkpoint {folder} was written by a newer stdit, {version}: its format is {found}, and this one reads "
            f"{FORMAT}. Update stdit, or use another checkpoint."
        )
    return UserError(
        f"checkpoint {folder} has the format {found}, of an older stdit, and this one reads {FORMAT}: go on with "
        "that version, or sample from its run's pipeline/ and start a new run from that (--init_from)."
    )


def verify(folder: Path, needed: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """Check the files of ``folder`` that are ``needed`` (by relative name) against the manifest; return it.

    Raises UserError naming the first file that is missing, of another size, or of other content, or weights that
    nothing lists.
    """
    meta = read_meta(folder)
    way_out = "use another checkpoint, or delete this folder to go on from the one before it"
    for name, entry in meta["files"].items():
        path = folder / name
        if "\0" in name or not isinstance(entry, dict):
            raise UserError(f"checkpoint {folder}: {META} has no size and hash of {name!r}: {way_out}.")
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
    for path in folder.rglob("*.safetensors"):
        if (name := path.relative_to(folder).as_posix()) not in meta["files"] and needed(name):
            raise UserError(f"checkpoint {folder}: {META} does not list {name}: {way_out}.")
    return meta


def share(path: Path) -> None:
    """Give a file, or those in a folder, the rights of any new file: safetensors are made for their owner alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    for file in [path] if path.is_file() else path.rglob("*.safetensors"):
        file.chmod(0o666 & ~umask)


def is_whole(folder: Path) -> bool:
    """Whether all files of a sealed folder are as they were written."""
    try:
        verify(folder)
    except UserError:
        return False
    return True


def step_of(folder: Path) -> int | None:
    """The step in a name such as ``step-00001000``; None for any other name (``step-00001000.tmp`` too)."""
    match = STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def newest_whole(
    checkpoints: Path, needed: Callable[[str], bool] = lambda name: True
) -> tuple[Path | None, list[str]]:
    """The newest ``step-N`` folder under ``checkpoints`` that verifies, and why newer ones do not.

    Raises:
        NewerFormatError: if one that is newer was written by a newer version.
    """
    passed_over: list[str] = []
    folders = [folder for folder in checkpoints.glob("step-*") if step_of(folder) is not None]
    for folder in sorted(folders, key=lambda folder: step_of(folder) or 0, reverse=True):
        try:
            verify(folder, needed)
        except NewerFormatError:
            raise
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
