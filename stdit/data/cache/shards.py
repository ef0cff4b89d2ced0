"""Shards: safetensors files of cache entries, each a key of 16 bytes and a tensor, written atomically.

A shard has entries of one kind, made by one maker (the fingerprint of a codec or text encoder), and holds

    values [sum of n, ...]   all entries, concatenated along the first axis
    offsets int64 [N + 1]    where each entry begins
    keys uint8 [N 16]
    hashes int64 [N]         XXH3-64 of each entry's bytes, to detect corruption on disk

The header has a hash of all the rest: format, kind, maker, type and shape of the values, and the other tensors.

Letters: N entries, n length of an entry.
"""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stdit.errors import UserError
from stdit.hashing import hash_arrays, hash_tensor

SHARD_FORMAT = "stdit-cache-3"
SUFFIX = ".safetensors"
KEY_BYTES = 16
SHARD_BYTES = 1 << 26
SHARD_SECONDS = 60.0

EntryKind = Literal["latents", "texts", "contents"]


class DamagedShardError(ValueError):
    """A file that is not a complete shard; the message is the reason."""


class CacheEntry(NamedTuple):
    """A tensor to be written, and its key."""

    kind: EntryKind
    maker: str
    key: bytes
    value: Tensor
    """[n, ...]: entries whose sizes differ only in the first axis can share a shard."""


@dataclass(frozen=True)
class Shard:
    """A shard on disk. Its values are read when they are needed."""

    file: Path
    kind: str
    maker: str
    keys: np.ndarray
    """uint8 [N 16]"""
    offsets: np.ndarray
    """int64 [N + 1]"""
    hashes: np.ndarray
    """int64 [N]"""

    def read(self, values: Tensor, row: int) -> Tensor | None:
        """Return the tensor of an entry; None if its bytes have changed since it was written.

        Args:
            values: of the shard, from `open_values`.
        """
        value = values[int(self.offsets[row]) : int(self.offsets[row + 1])].clone()
        return value if hash_tensor(value) == self.hashes[row] else None


def open_values(file: Path) -> Tensor:
    """Map the values of a shard into memory: they are read from the file when they are used.

    Raises OSError or SafetensorError.
    """
    with safe_open(file, framework="pt") as stored:
        return stored.get_tensor("values")


def read_shard(file: Path) -> Shard:
    """Read keys, offsets and hashes of a shard. Raises DamagedShardError."""
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("format") != SHARD_FORMAT:
                raise DamagedShardError(f"its format is {metadata.get('format')}, not {SHARD_FORMAT}")
            keys, offsets, hashes = (
                stored.get_tensor(name).numpy() for name in ("keys", "offsets", "hashes")
            )
            values = stored.get_slice("values")
            count, size, dtype = len(keys), values.get_shape(), values[:0].dtype
        if metadata.get("hash") != header_hash(metadata, dtype, size, [keys, offsets, hashes]):
            raise DamagedShardError("its header has changed since it was written")
        steps = np.diff(offsets)
        if keys.shape != (count, KEY_BYTES) or len(hashes) != count or len(offsets) != count + 1:
            raise DamagedShardError("its tensors do not fit together")
        if count and (offsets[0] != 0 or offsets[-1] != size[0] or steps.min() < 0):
            raise DamagedShardError("its offsets lie outside its values")
        return Shard(
            file, metadata["kind"], metadata["maker"], *(part.copy() for part in (keys, offsets, hashes))
        )
    except DamagedShardError:
        raise
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DamagedShardError(str(error)) from error


def header_hash(
    metadata: Mapping[str, str], dtype: torch.dtype, shape: Sequence[int], arrays: Sequence[np.ndarray]
) -> str:
    """Return the hash of all of a shard but its values, whose entries have hashes of their own.

    Args:
        metadata: with format, kind and maker.
        dtype, shape: of the values.
        arrays: keys, offsets and hashes.
    """
    facts = {name: metadata[name] for name in ("format", "kind", "maker")}
    return hash_arrays(
        {**facts, "values": [str(dtype), list(shape)]},
        dict(zip(("keys", "offsets", "hashes"), arrays, strict=True)),
    )


def write_shard(file: Path, entries: Sequence[CacheEntry]) -> None:
    """Write entries of the same kind, maker and shape (except the first axis). Raises OSError or SafetensorError."""
    lengths = [0, *(len(entry.value) for entry in entries)]
    tensors: dict[str, Tensor] = {
        "values": torch.cat([entry.value for entry in entries]).contiguous(),
        "offsets": torch.tensor(lengths).cumsum(0),
        "keys": torch.frombuffer(bytearray().join(entry.key for entry in entries), dtype=torch.uint8).view(
            -1, KEY_BYTES
        ),
        "hashes": torch.tensor([hash_tensor(entry.value) for entry in entries]),
    }
    metadata = {"format": SHARD_FORMAT, "kind": entries[0].kind, "maker": entries[0].maker}
    values, *others = (tensors[name] for name in ("values", "keys", "offsets", "hashes"))
    metadata["hash"] = header_hash(metadata, values.dtype, values.shape, [part.numpy() for part in others])
    staging = file.with_name(f".{file.name}.tmp")
    content = save(tensors, metadata)
    try:
        with locked(staging):
            with staging.open("wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            staging.replace(file)
        sync_folder(file.parent)
    finally:
        with contextlib.suppress(OSError):
            staging.unlink()


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Create a file, and lock it while this process writes it; see `is_locked`."""
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:  # Windows
        yield
        return
    with file.open("ab") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            flock(lock, LOCK_EX | LOCK_NB)
        yield


def is_locked(file: Path) -> bool:
    """Return whether a process is writing a file, or has just renamed it; False if the file system has no locks."""
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:  # Windows
        return False
    try:
        with file.open("r+b") as lock:
            flock(lock, LOCK_EX | LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return True
    except OSError:
        return False
    return False


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, on systems that can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclass
class ShardWriter:
    """Collects entries and writes them as shards of bounded size, with names that no other writer uses.

    Entries are written when they are large or old enough, and at the end of the `with` block, however it ends: an
    interrupted encoding loses at most a minute, or a shard.
    """

    folder: Path
    shard_bytes: int = SHARD_BYTES
    """Maximum size of the values; a larger entry gets a shard of its own."""
    seconds: float = SHARD_SECONDS
    """Maximum age of entries that are not yet written."""
    written: list[Path] = field(default_factory=list)
    waiting: dict[bytes, CacheEntry] = field(default_factory=dict)
    _name: str = field(default_factory=lambda: secrets.token_hex(6))
    _bytes: int = 0
    _since: float = 0.0

    def add(self, entry: CacheEntry) -> None:
        """Add an entry, unless its key is waiting already. Raises UserError if it cannot be written."""
        if entry.key in self.waiting:
            return
        size = entry.value.nbytes
        if self.waiting and self._bytes + size > self.shard_bytes:
            self.flush()
        if not self.waiting:
            self._since = time.monotonic()
        self.waiting[entry.key] = entry
        self._bytes += size
        if time.monotonic() - self._since > self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write the waiting entries. Raises UserError if that fails; complete shards stay."""
        groups: dict[tuple, list[CacheEntry]] = {}
        for entry in self.waiting.values():
            alike = (entry.kind, entry.maker, entry.value.dtype, entry.value.shape[1:])
            groups.setdefault(alike, []).append(entry)
        self.waiting, self._bytes = {}, 0
        for (kind, *_), entries in groups.items():
            file = self.folder / f"{kind}-{self._name}-{len(self.written):05d}{SUFFIX}"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_shard(file, entries)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"cannot write to the cache {self.folder} ({error}): make room, or set data.cache_dir to a "
                    "folder elsewhere. What was encoded before is kept, and the same command resumes from there."
                ) from error
            self.written.append(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()
