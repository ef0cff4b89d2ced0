"""Encoded batches from the cache: held in memory, or read from its files.

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
from stdit.data.batch import EncodedBatch, RawBatch
from stdit.data.cache.encode import plan_captions
from stdit.data.cache.keys import text_key
from stdit.data.cache.reader import CachedContent, CachedReader
from stdit.data.cache.shards import CacheEntry, EntryKind, ShardWriter
from stdit.data.dataset import Loader, batch_info
from stdit.data.decoding.decode import DecodeError
from stdit.data.skips import SkipTally
from stdit.errors import UserError
from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.processes.step_exchange import StepExchange

logger = logging.getLogger(__name__)

EncodeView = Callable[[Tensor], Tensor]
"""Frames uint8 [T 3 H W] to latents float32 [C T' H' W'], on the CPU."""
EncodeText = Callable[[str], Tensor]
"""A caption to its states float32 [L E], on the CPU."""


@dataclass
class MemoryCache:
    """Latents of all readable clips of a plan, and text states of their captions, on the CPU."""

    latents: list[Tensor]
    """Per bucket float32 [N C T' H' W']."""
    places: list[dict[int, range]]
    """Per bucket, from a clip (its place in `Assignment.clips`) to the rows of its views in latents."""
    texts: dict[str, Tensor]
    """From a caption to its states float32 [L E]."""

    @classmethod
    def read(cls, reader: CachedReader) -> "MemoryCache":
        """Read what `encode_plan` stored of the reader's plan; clips that it could not decode are absent."""
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
        for caption in dict.fromkeys(plan_captions(plan)):
            states = store.get("texts", text_key(caption, reader.makers.text_encoder))
            assert states is not None, "encoded before"
            texts[caption] = states
        return cls(latents, places, texts)


class MemoryBatches:
    """``for batch in batches(start_step)``: this rank's part of each batch, from memory.

    The same plan gives the same clips in the same order; a clip that could not be read when the cache was made is
    replaced by the next of its bucket.
    """

    def __init__(
        self,
        reader: CachedReader,
        cache: MemoryCache,
        mesh: Mesh = Mesh(),  # noqa: B008
        pin_memory: bool = False,
    ) -> None:
        self.reader, self.plan, self.cache = reader, reader.plan, cache
        self.mesh, self.pin_memory = mesh, pin_memory

    def __call__(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[EncodedBatch]:
        """Iterate over the steps in [start_step, stop_step), without end if stop_step is None."""
        for step in itertools.count(start_step) if stop_step is None else range(start_step, stop_step):
            yield self.batch(step)

    def batch(self, step: int) -> EncodedBatch:
        """Return the batch of a step. Raises UserError if no clip of its bucket can be read."""
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
        rows = self.mesh.sample_range(len(used))
        own = [used[row] for row in rows]
        info = batch_info(self.plan, planned, own)
        chosen = [
            places[clip][self.reader.number(step, row, len(places[clip]))]
            for row, clip in zip(rows, own, strict=True)
        ]
        states, mask = pad_states([self.cache.texts[caption] for caption in info.captions])
        batch = EncodedBatch(
            **vars(info),
            latents=self.cache.latents[planned.bucket_index][chosen],
            text_states=states,
            text_mask=mask,
            replaced=sum(a != b for a, b in zip(used, planned.indices, strict=True)),
        )
        return batch.pin_memory() if self.pin_memory else batch


class DiskBatches:
    """As `MemoryBatches`, from the files of the cache; clips and captions that they lack are encoded and added."""

    def __init__(
        self,
        reader: CachedReader,
        encode_view: EncodeView,
        encode_text: EncodeText,
        tally: SkipTally,
        pin_memory: bool = False,
        mesh: Mesh = Mesh(),  # noqa: B008
        exchange: StepExchange | None = None,
    ) -> None:
        self.reader, self.encode_view, self.encode_text = reader, encode_view, encode_text
        self.loader = Loader(reader.plan, reader, tally, reader.workers, pin_memory, mesh, exchange)
        self.writer = ShardWriter(reader.store.folder)
        self._adds = mesh.sp.rank == 0  # ranks that share a video need not all write it

    def __call__(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[EncodedBatch]:
        """Iterate over the steps in [start_step, stop_step), without end if stop_step is None."""
        try:
            for raw in self.loader(start_step, stop_step):
                began = time.perf_counter()
                batch, entries = self._encode(raw)
                for entry in entries:
                    self._add(lambda entry=entry: self.writer.add(entry))  # type: ignore[misc]
                batch.timings.encoding = time.perf_counter() - began
                yield batch.pin_memory() if self.loader.pin_memory else batch
        finally:
            self._add(self.writer.flush)

    def _encode(self, raw: RawBatch[CachedContent]) -> tuple[EncodedBatch, list[CacheEntry]]:
        """Encode what the cache lacks; return the batch, and the entries to add."""
        content, makers = raw.content, self.reader.makers
        assert content is not None, "the loader raises if it is"
        entries, latents, text = list(content.new_entries), content.latents, content.text
        if content.frames_to_encode is not None:
            made = [
                self._entry("latents", makers.codec, key, partial(self.encode_view, frames))
                for key, frames in zip(content.keys_to_encode, content.frames_to_encode, strict=True)
            ]
            entries += made
            encoded = torch.stack([entry.value for entry in made])
            latents = encoded.new_empty(len(raw.info.captions), *encoded.shape[1:])
            latents[content.rows_to_encode] = encoded
            if content.latents is not None:
                stored = sorted({*range(len(latents))} - {*content.rows_to_encode})
                latents[stored] = content.latents
        if text is None:
            states = []
            for caption, found in zip(raw.info.captions, content.caption_states, strict=True):
                if found is None:
                    key = text_key(caption, makers.text_encoder)
                    entries.append(
                        self._entry("texts", makers.text_encoder, key, partial(self.encode_text, caption))
                    )
                    found = entries[-1].value
                states.append(found)
            text = pad_states(states)
        assert latents is not None, "stored or encoded"
        return raw.encoded(latents, *text), entries

    def _entry(self, kind: EntryKind, maker: str, key: bytes, encode: Callable[[], Tensor]) -> CacheEntry:
        """Return the entry that waits to be written under a key, or encode it."""
        return self.writer.waiting.get(key) or CacheEntry(kind, maker, key, encode())

    def _add(self, write: Callable[[], None]) -> None:
        """Add to the cache; if the disk refuses, warn once and train without adding."""
        try:
            if self._adds:
                write()
        except UserError as error:
            logger.warning("%s This run adds no more to it.", error)
            self._adds = False
