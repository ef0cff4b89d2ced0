"""Batches of latents and text states, from memory or from the cache's files.

Letters: N entries of a bucket, B batch, C T' H' W' latents, L text tokens, E width of text states.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stdit.codecs.padding import pad_states
from stdit.data.cache.encode import captions
from stdit.data.cache.keys import text_key
from stdit.data.cache.reader import CachedReader
from stdit.data.cache.shards import Entry, Kind, Writer
from stdit.data.dataset import Batch, Loader, describe
from stdit.data.decoding.decode import DecodeError
from stdit.data.skips import SkipTally
from stdit.errors import UserError
from stdit.parallel.processes.mesh import Mesh

logger = logging.getLogger(__name__)

EncodeView = Callable[[Tensor], Tensor]
"""Frames uint8 [T 3 H W] to latents float32 [C T' H' W'], on the CPU."""
EncodeText = Callable[[str], Tensor]
"""A caption to its states float32 [L E], on the CPU."""


@dataclass
class MemoryCache:
    """Latents of all clips of a plan that could be read, and text states of their captions, on the CPU."""

    latents: list[Tensor]
    """For each bucket float32 [N C T' H' W']."""
    places: list[dict[int, range]]
    """For each bucket, where the views of a clip (its place in `Assignment.clips`) are in latents."""
    texts: dict[str, Tensor]
    """For each caption float32 [L E]."""

    @classmethod
    def read(cls, reader: CachedReader) -> "MemoryCache":
        """What `encode_plan` made of the reader's plan; clips that it could not read are not there."""
        plan, store = reader.plan, reader.store
        latents, places = [], []
        for bucket, members in zip(plan.assignment.buckets, plan.assignment.members, strict=True):
            found: list[Tensor] = []
            place: dict[int, range] = {}
            for index in members.tolist():
                try:
                    views, _ = reader.wanted(plan.assignment.clips[index], bucket)
                except DecodeError:
                    continue
                values = [value for _, key in views if (value := store.get("latents", key)) is not None]
                if len(values) == len(views):
                    place[index] = range(len(found), len(found) + len(values))
                    found += values
            latents.append(torch.stack(found) if found else torch.empty(0))
            places.append(place)
        texts = {}
        for caption in dict.fromkeys(captions(plan)):
            states = store.get("texts", text_key(caption, reader.makers.text_encoder))
            assert states is not None, "encoded before"
            texts[caption] = states
        return cls(latents, places, texts)


class EncodedBatches:
    """Batches from memory: latents float32 [B C T' H' W'], text_states [B L E], text_mask [B L], and `describe`.

    The same plan gives the same clips in the same order; one that could not be read when the cache was made
    gives way to the next of its bucket.
    """

    def __init__(self, reader: CachedReader, cache: MemoryCache, mesh: Mesh = Mesh()) -> None:  # noqa: B008
        self.reader, self.plan, self.cache, self.mesh = reader, reader.plan, cache, mesh

    def __call__(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Batches of the steps in [start_step, stop_step), without end when stop_step is None."""
        for step in itertools.count(start_step) if stop_step is None else range(start_step, stop_step):
            yield self.batch(step)

    def batch(self, step: int) -> Batch:
        planned = self.plan.batch(step)
        places = self.cache.places[planned.bucket_index]
        used = []
        for index, clip_index in enumerate(planned.indices):
            candidates = itertools.chain([clip_index], self.plan.replacements(step, index))
            stand_in = next((candidate for candidate in candidates if candidate in places), None)
            if stand_in is None:
                raise UserError(
                    f"bucket {planned.bucket}: none of its clips can be read: remove it, or repair them"
                )
            used.append(stand_in)
        replaced = sum(a != b for a, b in zip(used, planned.indices, strict=True))
        rows = self.mesh.sample_range(len(used))
        mine = [used[row] for row in rows]
        batch = describe(self.plan, planned, mine) | {"replaced": replaced}
        states, mask = pad_states([self.cache.texts[caption] for caption in batch["text"]])
        chosen = [
            places[clip][self.reader.number(step, row, len(places[clip]))]
            for row, clip in zip(rows, mine, strict=True)
        ]
        latents = self.cache.latents[planned.bucket_index][chosen]
        return batch | {"latents": latents, "text_states": states, "text_mask": mask}


class DiskBatches(Loader):
    """As `EncodedBatches`, from the files of the cache; what they lack is decoded, encoded and added to them.

    encoding, of a batch, is the seconds that went into what was lacking.
    """

    def __init__(
        self,
        reader: CachedReader,
        encode_view: EncodeView,
        encode_text: EncodeText,
        tally: SkipTally,
        pin_memory: bool = False,
        mesh: Mesh = Mesh(),  # noqa: B008
    ) -> None:
        super().__init__(reader.plan, reader, tally, reader.config.workers, pin_memory, mesh)
        self.reader, self.encode_view, self.encode_text = reader, encode_view, encode_text
        self._keeps = mesh.sp.rank == 0  # ranks that share a video need not all write it
        self.writer = Writer(reader.store.folder)

    def __call__(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        try:
            for batch in super().__call__(start_step, stop_step):
                began = time.perf_counter()
                for entry in self._complete(batch):
                    self._keep(lambda entry=entry: self.writer.add(entry))  # type: ignore[misc]
                yield batch | {"encoding": time.perf_counter() - began}
        finally:
            self._keep(self.writer.flush)

    def _complete(self, batch: Batch) -> list[Entry]:
        """Encode what a batch lacks; returns what is to be stored."""
        makers, new = self.reader.makers, batch.pop("new")
        if "fresh" in batch:
            fresh, keys, stored, frames = (batch.pop(name) for name in ("fresh", "keys", "stored", "frames"))
            entries = [
                self._made("latents", makers.codec, key, partial(self.encode_view, one))
                for key, one in zip(keys, frames, strict=True)
            ]
            encoded = torch.stack([entry.value for entry in entries])
            latents = encoded.new_empty(len(batch["text"]), *encoded.shape[1:])
            latents[fresh] = encoded
            if stored is not None:
                latents[sorted({*range(len(latents))} - {*fresh})] = stored
            batch["latents"] = latents
            new += entries
        if "texts" in batch:
            texts, maker = batch.pop("texts"), makers.text_encoder
            for row, caption in enumerate(batch["text"]):
                if texts[row] is None:
                    make = partial(self.encode_text, caption)
                    new.append(self._made("texts", maker, text_key(caption, maker), make))
                    texts[row] = new[-1].value
            batch["text_states"], batch["text_mask"] = pad_states(texts)
        return new

    def _made(self, kind: Kind, maker: str, key: bytes, make: Callable[[], Tensor]) -> Entry:
        """A new entry, unless it is about to be written already."""
        return self.writer.waiting.get(key) or Entry(kind, maker, key, make())

    def _keep(self, write: Callable[[], None]) -> None:
        """Add to the cache; where the disk refuses, training goes on without adding."""
        try:
            if self._keeps:
                write()
        except UserError as error:
            logger.warning("%s This run adds no more to it.", error)
            self._keeps = False
