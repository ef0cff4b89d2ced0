"""Verify a cache folder, and prune what is broken or no longer used."""

import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from stdit.checkpoint_files import verify
from stdit.data.cache.codec_fitting import CODECS_FOLDER
from stdit.data.cache.shards import (
    CacheEntry,
    DamagedShardError,
    Shard,
    ShardWriter,
    is_locked,
    open_values,
    read_shard,
)
from stdit.data.cache.store import shard_files
from stdit.errors import UserError

LEFTOVER_SECONDS = 3600
"""A temporary file that is older than this, and that no process has locked, was left behind by a dead process.

The lock decides if clocks are wrong; the age, if the file system has no locks."""


@dataclass
class VerifySummary:
    """What a cache folder contains."""

    folder: Path
    shards: int = 0
    entries: int = 0
    codecs: int = 0
    """Fitted ones."""
    bytes: int = 0
    """Of the shards."""
    broken: dict[str, str] = field(default_factory=dict)
    """From the name of a file or of a codec's folder to the reason."""

    def __str__(self) -> str:
        head = (
            f"{self.folder}: {self.shards} shards, {self.entries} entries, {self.bytes / 1e6:,.1f} MB, "
            f"{self.codecs} fitted codecs"
        )
        return "\n".join([head, *(f"  broken: {name}: {why}" for name, why in self.broken.items())])


@dataclass
class PruneSummary:
    """What was removed, or would be."""

    folder: Path
    dry_run: bool
    files: dict[str, str] = field(default_factory=dict)
    """From the name of a file or of a codec's folder, which is removed or rewritten, to the reason."""
    entries: int = 0
    """Removed entries, without those in broken shards."""
    codecs: int = 0
    """Removed fitted codecs."""
    kept: int = 0
    """Entries."""
    bytes: int = 0
    """On disk that are freed."""

    def __str__(self) -> str:
        verb = "would be removed" if self.dry_run else "removed"
        removed = f"{self.entries} entries and {self.codecs} fitted codecs ({self.bytes / 1e6:,.1f} MB)"
        head = f"{self.folder}: {removed} {verb}, {self.kept} entries kept"
        return "\n".join([head, *(f"  {name}: {why}" for name, why in self.files.items())])


def verify_cache(folder: Path) -> VerifySummary:
    """Read and check every byte of every shard, and the fitted codecs. Raises UserError if there are none."""
    summary = VerifySummary(folder)
    shards, codecs = _list_shards(folder), _list_codecs(folder)
    if not (shards or codecs):
        raise UserError(
            f"{folder} holds no cache, neither encoded clips nor a fitted codec: name the folder of a cache "
            "(data.cache_dir; without it, stdit-cache beside the manifest)"
        )
    for file in shards:
        summary.shards += 1
        summary.bytes += file.stat().st_size
        try:
            shard = read_shard(file)
        except DamagedShardError as error:
            summary.broken[file.name] = str(error)
            continue
        summary.entries += len(shard.keys)
        if broken := len(shard.keys) - len(_intact_rows(shard)):
            summary.broken[file.name] = f"{broken} of its {len(shard.keys)} entries have changed since"
    for codec in codecs:
        summary.codecs += 1
        if reason := _codec_damage(codec):
            summary.broken[f"{CODECS_FOLDER}/{codec.name}"] = reason
    return summary


def prune_cache(
    folder: Path,
    wanted: Collection[bytes] | None = None,
    wanted_codecs: Collection[str] | None = None,
    dry_run: bool = False,
) -> PruneSummary:
    """Remove broken shards, entries and codecs, files left by dead processes, and what is not wanted.

    A shard that loses some of its entries is rewritten without them before the old file is removed, so that kept
    entries can be read at any time. Training that reads the folder meanwhile encodes again what it misses.

    Args:
        wanted: keys of the entries to keep; None: all.
        wanted_codecs: names of the fitted codecs to keep (`codec_fitting.fitted_name`); None: all.
        dry_run: remove nothing.

    Raises:
        UserError: if there is no such folder, or files cannot be removed.
    """
    summary = PruneSummary(folder, dry_run)
    for file in [*_list_shards(folder), *_find_leftovers(folder)]:
        size, freed, kept = file.stat().st_size, file.stat().st_size, []
        if file.name.startswith("."):
            reason = "left by a process that ended"
        else:
            try:
                shard = read_shard(file)
            except DamagedShardError as error:
                reason = f"broken: {error}"
            else:
                intact = _intact_rows(shard)
                kept = [row for row in intact if wanted is None or shard.keys[row].tobytes() in wanted]
                count = len(shard.keys)
                summary.entries += count - len(kept)
                summary.kept += len(kept)
                if len(kept) == count:
                    continue
                reasons = [f"{count - len(intact)} broken"] if len(intact) < count else []
                reasons += [f"{len(intact) - len(kept)} not wanted"] if len(kept) < len(intact) else []
                reason = f"{' and '.join(reasons)} of {count} entries"
                freed = size * (count - len(kept)) // count
        summary.files[file.name] = reason
        summary.bytes += freed
        if not dry_run:
            _replace_shard(file, [] if not kept else _read_entries(shard, kept))
    _prune_codecs(summary, wanted_codecs)
    return summary


def _prune_codecs(summary: PruneSummary, wanted: Collection[str] | None) -> None:
    """Remove fitted codecs that are broken, left half-written, or not wanted. Raises UserError."""
    old = time.time() - LEFTOVER_SECONDS
    for codec in _list_codecs(summary.folder, hidden=True):
        if codec.name.startswith("."):
            if codec.stat().st_mtime >= old:
                continue
            reason = "left by a process that ended"
        elif damage := _codec_damage(codec):
            reason = f"broken: {damage}"
        elif wanted is not None and codec.name not in wanted:
            reason = "a fitted codec that is not wanted"
        else:
            continue
        summary.files[f"{CODECS_FOLDER}/{codec.name}"] = reason
        summary.codecs += 1
        summary.bytes += sum(file.stat().st_size for file in codec.rglob("*") if file.is_file())
        if not summary.dry_run:
            try:
                shutil.rmtree(codec)
            except OSError as error:
                raise _not_removable(codec, error) from error


def _replace_shard(file: Path, kept: list[CacheEntry]) -> None:
    """Delete a file after its kept entries were written to a new one. Raises UserError."""
    try:
        with ShardWriter(file.parent) as writer:
            for entry in kept:
                writer.add(entry)
        file.unlink(missing_ok=True)
    except OSError as error:
        raise _not_removable(file, error) from error


def _not_removable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be removed ({error.strerror}): check its permissions")


def _list_shards(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name that of a cache (data.cache_dir)")
    return sorted(shard_files(folder))


def _list_codecs(folder: Path, hidden: bool = False) -> list[Path]:
    """Return the folders of fitted codecs; `hidden`: and those that are being written."""
    folders = (path for path in (folder / CODECS_FOLDER).glob("*") if path.is_dir())
    return sorted(path for path in folders if hidden or not path.name.startswith("."))


def _codec_damage(folder: Path) -> str | None:
    """Return why a fitted codec must not be loaded; None if its files are as they were written."""
    try:
        verify(folder, kind="codec", way_out="it will be fitted again")
    except (OSError, UserError) as error:
        return str(error)
    return None


def _find_leftovers(folder: Path) -> list[Path]:
    """Return temporary files that no living process writes."""
    old = time.time() - LEFTOVER_SECONDS
    found = []
    for file in (*folder.glob(".*.tmp"), *folder.glob(".tmp*")):  # the latter are those of the library
        try:
            if file.is_file() and file.stat().st_mtime < old and not is_locked(file):
                found.append(file)
        except FileNotFoundError:  # it was renamed just now
            continue
    return sorted(found)


def _intact_rows(shard: Shard) -> list[int]:
    """Return the entries whose bytes have not changed since they were written."""
    try:
        values = open_values(shard.file)
        return [row for row in range(len(shard.keys)) if shard.read(values, row) is not None]
    except (OSError, SafetensorError):
        return []


def _read_entries(shard: Shard, rows: list[int]) -> list[CacheEntry]:
    values = open_values(shard.file)
    read = ((row, shard.read(values, row)) for row in rows)
    return [
        CacheEntry(shard.kind, shard.maker, shard.keys[row].tobytes(), value)  # type: ignore[arg-type]
        for row, value in read
        if value is not None
    ]
