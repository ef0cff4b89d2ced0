"""Folders with a manifest, ``meta.json``, that has the size and hash of every other file, and a hash of itself.

A checkpoint is written under a temporary name, sealed with `write_manifest`, and renamed with `publish`; a reader
calls `verify` or `newest_whole`. Pipelines and their components are sealed with `seal_folder`; their readers call
`verify_if_sealed`. Everything here reads JSON and bytes only: nothing in a checkpoint is unpickled.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from stdit.errors import UserError
from stdit.hashing import SEAL, hash_file, sealed_json, unseal

META = "meta.json"
FORMAT = 3
"""Version of the layout of folders that are written, and the only one that is read."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Endings of files that are not read: reading one can run anything."""
_SEALED_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""Of the files that pipelines and their components consist of."""
_CHECKPOINT_WAY_OUT = "use another checkpoint, or delete this folder to resume from the one before it"
_SEALED_WAY_OUT = f"restore it from a copy; if you changed it yourself, delete {META} beside it"
_STEP_FOLDER = re.compile(r"step-(\d+)")


class NewerFormatError(UserError):
    """A checkpoint of a newer version, which must not be skipped in favour of an older one."""


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
    if own := {"files", "format", SEAL} & meta.keys():
        raise ValueError(f"meta has the keys {own}, which write_manifest fills in: give them other names.")
    if files is None:
        files = seal_files(
            folder, (path for path in folder.rglob("*") if path.is_file() and path != folder / META)
        )
    (folder / META).write_text(sealed_json({**meta, "format": FORMAT, "files": files}), encoding="utf-8")
    _fsync(folder / META)
    for directory in {(folder / name).parent for name in files} | {folder}:
        _fsync(directory)


def seal_folder(folder: Path, parts: Iterable[str] = ()) -> None:
    """Write the manifest of a folder that may also hold what others wrote, such as a README.

    Args:
        parts: subfolders whose files are listed, too.

    Raises:
        OSError: if the disk fails.
    """
    places = [folder, *(folder / part for part in parts)]
    files = (path for place in places for path in place.iterdir() if path.is_file() and path != folder / META)
    write_manifest(
        folder, {}, seal_files(folder, (path for path in files if path.suffix in _SEALED_SUFFIXES))
    )


class Sealed:
    """Base of classes that diffusers saves: what ``push_to_hub`` uploads has its manifest, too."""

    def _seal(self, folder: Path) -> None:
        seal_folder(folder)

    def _upload_folder(self, working_dir: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
        self._seal(Path(working_dir))
        return super()._upload_folder(working_dir, *args, **options)  # type: ignore[misc]


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


def read_meta(
    folder: Path, kind: str = "checkpoint", way_out: str = "use another checkpoint"
) -> dict[str, Any]:
    """Return the manifest of a sealed folder; its files are not read.

    The format is only believed if the manifest proves itself: a changed digit must not pass for a newer format.

    Args:
        kind: of the folder, for messages.
        way_out: what to do about a damaged one, for messages.

    Raises:
        UserError: if it is missing, or damaged: any changed byte is detected.
    """
    path = folder / META
    if not folder.is_dir():
        give = "give one like .../checkpoints/step-00001000" if kind == "checkpoint" else way_out
        raise UserError(f"{kind} {folder}: there is no such folder: {give}.")
    if not path.is_file():
        raise UserError(
            f"{kind} {folder}: it has no {META}, so it is empty or was never finished: {way_out}."
        )
    text = path.read_bytes()
    try:
        found = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{kind} {folder}: {META} is not valid JSON ({error}): {way_out}.") from None
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        raise UserError(f"{kind} {folder}: {META} lists no files: {way_out}.")
    if SEAL not in found and found.get("format", 1) in (1, 2):  # of the time before manifests had a hash
        raise _other_format(folder, found)
    try:
        meta = unseal(text)
    except (ValueError, RecursionError):
        raise UserError(f"{kind} {folder}: {META} has changed since it was written: {way_out}.") from None
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


def verify(
    folder: Path,
    needed: Callable[[str], bool] = lambda name: True,
    kind: str = "checkpoint",
    way_out: str = _CHECKPOINT_WAY_OUT,
) -> dict[str, Any]:
    """Check those files of ``folder`` that are ``needed`` (by relative name) against the manifest; return it.

    Args:
        kind: of the folder, for messages.
        way_out: what to do about a damaged one, for messages.

    Raises:
        UserError: naming the first file that is missing, has another size or content, or is not listed.
    """
    meta = read_meta(folder, kind, way_out)
    for name, entry in meta["files"].items():
        path = folder / name
        if "\0" in name or not isinstance(entry, dict):
            raise UserError(f"{kind} {folder}: {META} has no size and hash of {name!r}: {way_out}.")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{kind} {folder}: {META} names {name!r}, outside the folder: {way_out}.")
        if not needed(name):
            continue
        if not path.is_file():
            raise UserError(f"{kind} {folder}: {name} is missing: {way_out}.")
        size = path.stat().st_size
        written = entry.get("bytes")
        if size != written:
            raise UserError(
                f"{kind} {folder}: {name} has {size} bytes, but {written} were written: {way_out}."
            )
        if hash_file(path) != entry.get("hash"):
            raise UserError(f"{kind} {folder}: {name} has changed since it was written: {way_out}.")
    for path in folder.rglob("*.safetensors"):
        if (name := path.relative_to(folder).as_posix()) not in meta["files"] and needed(name):
            raise UserError(f"{kind} {folder}: {META} does not list {name}: {way_out}.")
    return meta


def verify_if_sealed(folder: Path, needed: Callable[[str], bool] = lambda name: True) -> bool:
    """Check a folder that may have been written without a manifest; return whether it has one.

    Raises:
        UserError: as `verify`.
    """
    if not (folder / META).is_file():
        return False
    verify(folder, needed, "folder", _SEALED_WAY_OUT)
    return True


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


def step_folders(checkpoints: Path) -> dict[int, Path]:
    """Return the ``step-N`` folders under ``checkpoints`` by step, newest first; none if it cannot be read."""
    found = {step: path for path in checkpoints.glob("step-*") if (step := step_of(path)) is not None}
    return dict(sorted(found.items(), reverse=True))


def newest_whole(
    checkpoints: Path, needed: Callable[[str], bool] = lambda name: True
) -> tuple[Path | None, list[str]]:
    """Return the newest ``step-N`` folder under ``checkpoints`` that verifies, and why newer ones do not.

    Raises:
        NewerFormatError: if one of the newer ones was written by a newer version.
    """
    skipped: list[str] = []
    for folder in step_folders(checkpoints).values():
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
