"""Looking after a cache folder: is all of it whole, and what can go."""

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from stdit.data.cache.shards import DamagedShard, Entry, Shard, Writer, is_held, open_values, read_shard
from stdit.data.cache.store import shard_files
from stdit.errors import UserError

LEFTOVER_SECONDS = 3600
"""A file written aside that has not changed for so long, and that no process holds, was left by a dead one.

The lock is what counts where clocks jump; the age, where a file system has no locks."""


@dataclass
class VerifySummary:
    """What a cache folder holds."""

    folder: Path
    shards: int = 0
    entries: int = 0
    bytes: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    """Why, by file name."""

    def __str__(self) -> str:
        head = f"{self.folder}: {self.shards} shards, {self.entries} entries, {self.bytes / 1e6:,.1f} MB"
        return "\n".join([head, *(f"  broken: {name}: {why}" for name, why in self.broken.items())])


@dataclass
class PruneSummary:
    """What was, or would be, removed."""

    folder: Path
    dry_run: bool
    files: dict[str, str] = field(default_factory=dict)
    """Why, by file name: removed, or written again without what is not needed."""
    entries: int = 0
    """Entries that go, those in broken files not counted."""
    kept: int = 0
    bytes: int = 0
    """On disk that are freed."""

    def __str__(self) -> str:
        gone = f"{self.entries} entries and {self.bytes / 1e6:,.1f} MB"
        verb = "would go" if self.dry_run else "are gone"
        head = f"{self.folder}: {gone} {verb}, {self.kept} entries stay"
        return "\n".join([head, *(f"  {name}: {why}" for name, why in self.files.items())])


def verify(folder: Path) -> VerifySummary:
    """Read every byte of every shard and check it. Raises UserError if there is no such folder."""
    summary = VerifySummary(folder)
    for file in _files(folder):
        summary.shards += 1
        summary.bytes += file.stat().st_size
        try:
            shard = read_shard(file)
        except DamagedShard as error:
            summary.broken[file.name] = str(error)
            continue
        summary.entries += len(shard.keys)
        if broken := len(shard.keys) - len(_whole_rows(shard)):
            summary.broken[file.name] = f"{broken} of its {len(shard.keys)} entries have changed since"
    return summary


def prune(folder: Path, wanted: Collection[bytes] | None = None, dry_run: bool = False) -> PruneSummary:
    """Remove broken shards and entries, what dead processes left, and entries that are not wanted.

    A shard that loses some of its entries is written anew without them before the old file goes, so that nothing that
    is kept is ever absent. Training that reads the folder meanwhile encodes again what it misses.

    Args:
        wanted: keys of the entries to keep; None: all.
        dry_run: remove nothing.

    Raises:
        UserError: no such folder, or the disk refuses.
    """
    summary = PruneSummary(folder, dry_run)
    for file in [*_files(folder), *_leftovers(folder)]:
        size, freed, kept = file.stat().st_size, file.stat().st_size, []
        if file.name.startswith("."):
            why = "left by a process that ended"
        else:
            try:
                shard = read_shard(file)
            except DamagedShard as error:
                why = f"broken: {error}"
            else:
                whole = _whole_rows(shard)
                kept = [row for row in whole if wanted is None or shard.keys[row].tobytes() in wanted]
                count = len(shard.keys)
                summary.entries += count - len(kept)
                summary.kept += len(kept)
                if len(kept) == count:
                    continue
                reasons = [f"{count - len(whole)} broken"] if len(whole) < count else []
                reasons += [f"{len(whole) - len(kept)} not wanted"] if len(kept) < len(whole) else []
                why = f"{' and '.join(reasons)} of {count} entries"
                freed = size * (count - len(kept)) // count
        summary.files[file.name] = why
        summary.bytes += freed
        if not dry_run:
            _remove(file, [] if not kept else _entries(shard, kept))
    return summary


def _remove(file: Path, kept: list[Entry]) -> None:
    """Delete a file, once what is kept of it is in a new one. Raises UserError."""
    try:
        with Writer(file.parent) as writer:
            for entry in kept:
                writer.add(entry)
        file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{file} cannot be removed ({error.strerror}): check who may write there") from error


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give that of a cache (data.cache_dir)")
    return sorted(shard_files(folder))


def _leftovers(folder: Path) -> list[Path]:
    old = time.time() - LEFTOVER_SECONDS
    aside = (*folder.glob(".*.tmp"), *folder.glob(".tmp*"))  # the latter were names of the library's own
    return sorted(file for file in aside if _is_left(file, old))


def _is_left(file: Path, old: float) -> bool:
    try:
        return file.is_file() and file.stat().st_mtime < old and not is_held(file)
    except FileNotFoundError:  # it has just got its name
        return False


def _whole_rows(shard: Shard) -> list[int]:
    """Entries whose bytes are those that were written."""
    try:
        values = open_values(shard.file)
        return [row for row in range(len(shard.keys)) if shard.read(values, row) is not None]
    except (OSError, SafetensorError):
        return []


def _entries(shard: Shard, rows: list[int]) -> list[Entry]:
    values = open_values(shard.file)
    read = ((row, shard.read(values, row)) for row in rows)
    return [
        Entry(shard.kind, shard.maker, shard.keys[row].tobytes(), value)  # type: ignore[arg-type]
        for row, value in read
        if value is not None
    ]
