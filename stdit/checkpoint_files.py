"""Checkpoint folders with a ``meta.json`` that has the size and hash of every other file.

A checkpoint is written under a temporary name, sealed with `write_manifest`, and renamed with `publish`; a reader
calls `verify` or `newest_whole`. Everything here reads JSON and bytes only: nothing in a checkpoint is unpickled.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import xxhash

from stdit.errors import UserError

META = "meta.json"
FORMAT = 2
"""Version of the layout of folders that are written, and the only one that is read."""
_STEP_FOLDER = re.compile(r"step-(\d+)")


class NewerFormatError(UserError):
    """A checkpoint of a newer version, which must not be skipped in favour of an older one."""


def hash_bytes(content: bytes) -> str:
    """Return the hash that `hash_file` returns, of bytes."""
    return f"xxh3:{xxhash.xxh3_128(content).hexdigest()}"


def hash_file(path: Path) -> str:
    """Return ``xxh3:<32 hex digits>`` of a file (XXH3-128: detects flipped bits; it is no signature)."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return f"xxh3:{digest.hexdigest()}"


def seal_files(folder: Path, paths: Iterable[Path]) -> dict[str, Any]:
    """Flush files of ``folder`` to disk; return size and hash of each, as read back, by relative name."""
    files = {}
    for path in sorted(paths):
        _fsync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "hash": hash_file(path)}
    return files


def write_manifest(folder: Path, meta: dict[str, Any], files: dict[str, Any] | None = None) -> None:
    """Write ``meta.json``: ``meta`` plus the files in ``folder``, and flush it.

    Args:
        files: what `seal_files` returned; None: seal all files that are there.

    Raises:
        OSError: if the disk fails, so call it before `publish`.
    """
    if own := {"files", "format"} & meta.keys():
        raise ValueError(f"meta has the keys {own}, which write_manifest fills in: give them other names.")
    if files is None:
        files = seal_files(
            folder, (path for path in folder.rglob("*") if path.is_file() and path != folder / META)
        )
    text = json.dumps({**meta, "format": FORMAT, "files": files}, indent=1, sort_keys=True) + "\n"
    (folder / META).write_text(text, encoding="utf-8")
    _fsync(folder / META)
    for directory in {(folder / name).parent for name in files} | {folder}:
        _fsync(directory)


def publish(aside: Path, folder: Path) -> None:
    """Rename a sealed folder and flush its parent. Raises FileExistsError if ``folder`` exists."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists")
    os.rename(aside, folder)
    _fsync(folder.parent)


def read_json(file: Path, what: str) -> dict[str, Any]:
    """Read an object from a JSON file.

    Raises:
        UserError: missing or malformed.
    """
    if not file.is_file():
        raise UserError(f"{str(file.parent)!r} is not {what}: it has no {file.name}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(file)!r} is not JSON ({error}): it is damaged, save it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{str(file)!r} holds no JSON object: it is damaged, save it again")
    return content


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the manifest of a sealed folder; its files are not read. Raises UserError if it is missing or
    damaged."""
    path = folder / META
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder} is not a folder: give one like .../checkpoints/step-00001000.")
    if not path.is_file():
        raise UserError(
            f"checkpoint {folder} has no {META}: it is empty or was never finished. Use another one."
        )
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
        f"checkpoint {folder} has the format {found}, of an older stdit, and this one reads {FORMAT}: resume with "
        "that version, or sample from its run's pipeline/ and start a new run from that (--init_from)."
    )


def verify(folder: Path, needed: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """Check those files of ``folder`` that are ``needed`` (by relative name) against the manifest; return it.

    Raises:
        UserError: naming the first file that is missing, has another size or content, or is not listed.
    """
    meta = read_meta(folder)
    way_out = "use another checkpoint, or delete this folder to resume from the one before it"
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


def apply_umask(path: Path) -> None:
    """Give a file, or the safetensors in a folder, the mode of any new file: they are made readable by the owner
    only."""
    mode = 0o666 & ~_umask()
    for file in [path] if path.is_file() else path.rglob("*.safetensors"):
        file.chmod(mode)


def _umask() -> int:
    """Return the umask of the process without changing it: ``os.umask`` would, for all threads and for a moment."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(next(line for line in status.splitlines() if line.startswith("Umask:")).split()[1], 8)
    except (OSError, StopIteration):  # not Linux
        with tempfile.TemporaryDirectory() as folder:
            descriptor = os.open(Path(folder) / "probe", os.O_CREAT | os.O_WRONLY, 0o666)
            try:
                return 0o666 & ~os.fstat(descriptor).st_mode
            finally:
                os.close(descriptor)


def is_whole(folder: Path) -> bool:
    """Return whether all files of a sealed folder are as they were written."""
    try:
        verify(folder)
    except UserError:
        return False
    return True


def step_of(folder: Path) -> int | None:
    """Return the step in a name such as ``step-00001000``; None for other names (also ``step-00001000.tmp``)."""
    match = _STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def newest_whole(
    checkpoints: Path, needed: Callable[[str], bool] = lambda name: True
) -> tuple[Path | None, list[str]]:
    """Return the newest ``step-N`` folder under ``checkpoints`` that verifies, and why newer ones do not.

    Raises:
        NewerFormatError: if one of the newer ones was written by a newer version.
    """
    skipped: list[str] = []
    folders = [folder for folder in checkpoints.glob("step-*") if step_of(folder) is not None]
    for folder in sorted(folders, key=lambda folder: step_of(folder) or 0, reverse=True):
        try:
            verify(folder, needed)
        except NewerFormatError:
            raise
        except UserError as error:
            skipped.append(str(error))
        else:
            return folder, skipped
    return None, skipped


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
