"""Shards: files of entries, each a key of 16 bytes and a tensor. Written aside and renamed, so whole or absent.

A shard is a safetensors file of one kind of entry, made by one maker (the fingerprint of a codec or text encoder):
values [sum of n, ...], entry after entry along the first axis; offsets int64 [N + 1], where each begins; keys uint8
[N 16]; hashes int64 [N], XXH3-64 of each entry's bytes, which finds what a disk has changed. Letter: N entries.
"""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stdit.errors import UserError

FORMAT = "stdit-cache-2"
SUFFIX = ".safetensors"
KEY_BYTES = 16
SHARD_BYTES = 1 << 26
SHARD_SECONDS = 60.0

Kind = Literal["latents", "texts", "contents"]


class DamagedShard(ValueError):
    """A file that is no whole shard; the message is the reason."""


class Entry(NamedTuple):
    """What is to be written."""

    kind: Kind
    maker: str
    key: bytes
    value: Tensor
    """[n, ...]: entries whose sizes differ in the first axis alone share a shard."""


@dataclass(frozen=True)
class Shard:
    """A whole shard on disk, of which the values are read as they are wanted."""

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
        """The tensor of an entry; None if its bytes are not those that were written.

        Args:
            values: the shard's, from `open_values`.
        """
        value = values[int(self.offsets[row]) : int(self.offsets[row + 1])].clone()
        return value if hash_of(value) == self.hashes[row] else None


def open_values(file: Path) -> Tensor:
    """The values of a shard, mapped into memory: read from the file as they are used. Raises OSError or
    SafetensorError."""
    with safe_open(file, framework="pt") as stored:
        return stored.get_tensor("values")


def read_shard(file: Path) -> Shard:
    """Keys and places of a shard's entries. Raises DamagedShard."""
    try:
        with safe_open(file, framework="pt") as stored:
            facts = stored.metadata() or {}
            if facts.get("format") != FORMAT:
                raise DamagedShard(f"of the format {facts.get('format')}, not {FORMAT}")
            keys, offsets, hashes = (
                stored.get_tensor(name).numpy() for name in ("keys", "offsets", "hashes")
            )
            count, size = len(keys), stored.get_slice("values").get_shape()
        steps = np.diff(offsets)
        if keys.shape != (count, KEY_BYTES) or len(hashes) != count or len(offsets) != count + 1:
            raise DamagedShard("its parts do not fit together")
        if count and (offsets[0] != 0 or offsets[-1] != size[0] or steps.min() < 0):
            raise DamagedShard("its entries lie outside it")
        return Shard(file, facts["kind"], facts["maker"], *(part.copy() for part in (keys, offsets, hashes)))
    except DamagedShard:
        raise
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DamagedShard(str(error)) from error


def write_shard(file: Path, entries: Sequence[Entry]) -> None:
    """Write entries of one kind, maker, and shape but for the first axis. Raises OSError or SafetensorError."""
    lengths = [0, *(len(entry.value) for entry in entries)]
    tensors = {
        "values": torch.cat([entry.value for entry in entries]).contiguous(),
        "offsets": torch.tensor(lengths).cumsum(0),
        "keys": torch.frombuffer(bytearray().join(entry.key for entry in entries), dtype=torch.uint8).view(
            -1, KEY_BYTES
        ),
        "hashes": torch.tensor([hash_of(entry.value) for entry in entries]),
    }
    facts = {"format": FORMAT, "kind": entries[0].kind, "maker": entries[0].maker}
    aside = file.with_name(f".{file.name}.tmp")
    content = save(tensors, facts)
    try:
        with held(aside):
            with aside.open("wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            aside.replace(file)
        sync_folder(file.parent)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Make a file, and lock it as long as this process writes it; see `is_held`."""
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:  # Windows
        yield
        return
    with file.open("ab") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            flock(lock, LOCK_EX | LOCK_NB)
        yield


def is_held(file: Path) -> bool:
    """Whether a living process writes a file, as far as its file system has locks; or has just given it its name."""
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


def hash_of(value: Tensor) -> int:
    """XXH3-64 of a tensor's bytes, as int64 has it."""
    unsigned = xxhash.xxh3_64_intdigest(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return unsigned - (1 << 64) if unsigned >> 63 else unsigned


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclass
class Writer:
    """Gathers entries and writes them as shards of bounded size, under names that no other writer has.

    What is gathered is written when it is large, when it is old, and at the end of the `with` block, however that
    ends: an encoding that was cut off loses a minute, or a shard, at most.
    """

    folder: Path
    shard_bytes: int = SHARD_BYTES
    """Values of a shard; a single larger entry has one for itself."""
    seconds: float = SHARD_SECONDS
    """How old what is gathered may get before it is written."""
    written: list[Path] = field(default_factory=list)
    waiting: dict[bytes, Entry] = field(default_factory=dict)
    _name: str = field(default_factory=lambda: secrets.token_hex(6))
    _bytes: int = 0
    _since: float = 0.0

    def add(self, entry: Entry) -> None:
        """Take an entry; one that waits already is left out. Raises UserError when the disk refuses."""
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
        """Write what waits. Raises UserError when the disk refuses; whole shards stay as they are."""
        groups: dict[tuple, list[Entry]] = {}
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
                    "folder elsewhere. What was encoded before is kept, and the same command goes on from there."
                ) from error
            self.written.append(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()
