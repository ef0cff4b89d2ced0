"""Look up entries by key in a cache folder. The shards hold the keys: there is no index file that could be stale."""

import logging
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from torch import Tensor

from stdit.data.cache.shards import SUFFIX, DamagedShardError, EntryKind, Shard, open_values, read_shard

logger = logging.getLogger(__name__)

OPEN_SHARDS = 256
"""Shards that are mapped into memory at a time."""


class CacheStore:
    """Finds entries by key in a folder of shards, including those that other processes add meanwhile.

    It can be sent to worker processes. Damaged shards, and entries whose bytes have changed, are ignored with a
    warning.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: dict[str, Shard] = {}
        """By file name."""
        self.damaged: dict[str, str] = {}
        """Why shards are ignored, by file name."""
        self._seen: int | None = None
        self._tables: dict[str, _Table] = {}
        self._open: OrderedDict[str, Tensor] = OrderedDict()
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}

    def refresh(self) -> None:
        """Find shards that were added or removed since the last call; costs one `stat` of the folder if none was."""
        try:
            changed = self.folder.stat().st_mtime_ns
        except OSError:
            changed = None
        if changed == self._seen:
            return
        self._seen = changed
        names = {file.name for file in shard_files(self.folder)}
        gone, new = self.shards.keys() - names, names - self.shards.keys() - self.damaged.keys()
        for name in gone:
            del self.shards[name]
            self._open.pop(name, None)
        for name in sorted(new):
            try:
                self.shards[name] = read_shard(self.folder / name)
            except DamagedShardError as error:
                self._ignore(name, str(error))
        if gone or new:
            self._tables = {}

    def count(self, kind: EntryKind) -> Counter[str]:
        """Return the number of entries of a kind, by maker."""
        counted: Counter[str] = Counter()
        for shard in self.shards.values():
            if shard.kind == kind:
                counted[shard.maker] += len(shard.keys)
        return counted

    def has(self, kind: EntryKind, key: bytes, check: bool = False) -> bool:
        """Return whether an entry is stored; `check` verifies its bytes, too."""
        return self.get(kind, key) is not None if check else self._table(kind).place(key) >= 0

    def get(self, kind: EntryKind, key: bytes) -> Tensor | None:
        """Return the tensor of an entry; None if it is not stored."""
        self.refresh()
        while (place := (table := self._table(kind)).place(key)) >= 0:
            shard, row = table.shards[table.shard[place]], int(table.row[place])
            try:
                value = shard.read(self._mapped(shard.file), row)
            except (OSError, SafetensorError) as error:
                self._ignore(shard.file.name, str(error))
                del self.shards[shard.file.name]
                self._tables = {}
                continue
            if value is not None:
                return value
            logger.warning("cache %s: an entry has changed since it was written: ignored", shard.file)
            table.gone.add(place)
        return None

    def _table(self, kind: EntryKind) -> "_Table":
        if kind not in self._tables:
            self._tables[kind] = _Table([shard for shard in self.shards.values() if shard.kind == kind])
        return self._tables[kind]

    def _mapped(self, file: Path) -> Tensor:
        if file.name not in self._open:
            while len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)
            self._open[file.name] = open_values(file)
        self._open.move_to_end(file.name)
        return self._open[file.name]

    def _ignore(self, name: str, reason: str) -> None:
        self.damaged[name] = reason
        logger.warning("cache %s is damaged (%s): ignored", self.folder / name, reason)


class _Table:
    """Index of all entries of a kind, sorted by the first half of their keys."""

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards
        keys = np.concatenate([np.empty((0, 2), np.uint64), *(_halves(shard.keys) for shard in shards)])
        order = np.argsort(keys[:, 0], kind="stable")
        self.keys = keys[order]
        self._firsts = np.ascontiguousarray(self.keys[:, 0])
        lengths = [len(shard.keys) for shard in shards]
        self.shard = np.repeat(np.arange(len(shards), dtype=np.int32), lengths)[order]
        rows = [np.arange(length, dtype=np.int32) for length in lengths]
        self.row = np.concatenate([np.empty(0, np.int32), *rows])[order]
        self.gone: set[int] = set()

    def place(self, key: bytes) -> int:
        """Return the place of a key; -1 if it is not stored."""
        first, second = np.frombuffer(key, np.uint64).tolist()
        place = int(self._firsts.searchsorted(np.uint64(first)))
        while place < len(self.keys) and self.keys[place, 0] == first:
            if self.keys[place, 1] == second and place not in self.gone:
                return place
            place += 1  # the same entry written twice, or a half that two keys share
        return -1


def _halves(keys: np.ndarray) -> np.ndarray:
    """Convert uint8 [N 16] to uint64 [N 2]."""
    return np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)


def shard_files(folder: Path) -> list[Path]:
    """Return the files that are, or should be, shards."""
    return [file for file in folder.glob(f"*{SUFFIX}") if not file.name.startswith(".")]
