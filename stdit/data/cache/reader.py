"""Reads latents and text states from the cache, and decodes clips that it lacks; in the main process or in workers.

Letters: B batch, C T' H' W' latents, L text tokens, E width of text states.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from stdit.codecs.padding import pad_states
from stdit.data.buckets import Bucket
from stdit.data.cache.keys import FileHashes, latents_key, text_key
from stdit.data.cache.shards import CacheEntry
from stdit.data.cache.store import CacheStore
from stdit.data.clip_tensors import read_view
from stdit.data.config import DataConfig
from stdit.data.decoding.decode import DecodeError
from stdit.data.manifest.clips import Clip
from stdit.data.plan import BatchPlan, PlannedBatch
from stdit.data.views import AugmentedView, augmented_view, count_augmented_views

REMEMBERED = 1 << 16
"""Clips whose keys a process keeps in memory, at most."""


class Makers(NamedTuple):
    """Fingerprints of the networks whose outputs are read."""

    codec: str
    text_encoder: str


class Wanted(NamedTuple):
    """A view of a clip, and the key of its latents."""

    view: AugmentedView
    key: bytes


class CachedSample(NamedTuple):
    """One clip: its latents, or its frames if they are not stored."""

    latents: Tensor | None
    """float32 [C T' H' W']"""
    frames: Tensor | None
    """uint8 [T 3 H W]"""
    key: bytes
    """Of the latents."""
    new_entries: list[CacheEntry]
    """To be added to the cache: the hash of a file that it had not seen."""


@dataclass
class CachedContent:
    """What the cache has for the samples of a batch, and what has to be encoded because it has not."""

    latents: Tensor | None
    """float32 [B - M C T' H' W']: latents that are stored, in the order of their samples; None if M = B."""
    rows_to_encode: list[int]
    """M samples whose latents are not stored."""
    keys_to_encode: list[bytes]
    """M keys of their latents."""
    frames_to_encode: Tensor | None
    """uint8 [M T 3 H W]: their frames; None if M = 0."""
    text: tuple[Tensor, Tensor] | None
    """Text states float32 [B L E] and mask bool [B L]; None if those of some caption are not stored."""
    caption_states: list[Tensor | None]
    """If `text` is None: of each caption the states float32 [L E] that are stored."""
    new_entries: list[CacheEntry]
    """To be added to the cache."""

    def pin_memory(self) -> "CachedContent":
        """Return the content in page-locked memory."""
        return replace(
            self,
            latents=None if self.latents is None else self.latents.pin_memory(),
            frames_to_encode=None if self.frames_to_encode is None else self.frames_to_encode.pin_memory(),
            text=None if self.text is None else (self.text[0].pin_memory(), self.text[1].pin_memory()),
        )


@dataclass
class CachedReader:
    """Reads one of a clip's views in each step; decodes it if its latents are not stored."""

    plan: BatchPlan
    config: DataConfig
    store: CacheStore
    makers: Makers
    contents: FileHashes = field(init=False)
    _stored: dict[tuple[int, int], list[Wanted]] = field(default_factory=dict, init=False, repr=False)
    """By bucket and clip, once found in the store: then the file is not looked at again. Bounded."""

    def __post_init__(self) -> None:
        self.contents = FileHashes(self.store)

    @property
    def workers(self) -> int:
        """Number of loader processes."""
        assert self.config.workers != "auto", "resolved by stdit.data.workers.count_workers"
        return self.config.workers

    def wanted(self, clip: Clip, bucket: Bucket) -> tuple[list[Wanted], list[CacheEntry]]:
        """Return all views of a clip, each once, and entries to be added for its file. Raises DecodeError."""
        try:
            content, new = self.contents.of(clip.media)
        except OSError as error:
            raise DecodeError(clip.media, error.strerror or str(error)) from error
        count = count_augmented_views(self.config, clip.text)
        views = dict.fromkeys(augmented_view(self.config, number, clip, bucket) for number in range(count))
        wanted = [
            Wanted(view, latents_key(content, view, bucket, self.makers.codec, clip.field_order))
            for view in views
        ]
        return wanted, [] if new is None else [new]

    def number(self, step: int, index: int, count: int) -> int:
        """Draw which of `count` views item `index` of a step's batch is, evenly."""
        if count == 1:
            return 0
        generator = torch.Generator().manual_seed(self.plan.crop_seed(step, index))
        return int(torch.randint(count, (1,), generator=generator))

    def read(self, planned: PlannedBatch, index: int, clip_index: int) -> CachedSample:
        """Read a view's latents, or its frames. Raises DecodeError."""
        place = planned.bucket_index, clip_index
        views, new = self._stored.get(place, []), list[CacheEntry]()
        if not views:
            views, new = self.wanted(self.plan.assignment.clips[clip_index], planned.bucket)
        view, key = views[self.number(planned.step, index, len(views))]
        latents = self.store.get("latents", key)
        if latents is not None:
            if len(self._stored) < REMEMBERED and not new:
                self._stored[place] = views
            return CachedSample(latents, None, key, new)
        frames = read_view(self.plan.assignment.clips[clip_index], planned.bucket, view)
        return CachedSample(None, frames, key, new)

    def collate(self, samples: Sequence[CachedSample], captions: Sequence[str]) -> CachedContent:
        """Put samples together, and read the text states of their captions."""
        rows = [row for row, sample in enumerate(samples) if sample.latents is None]
        states = [
            self.store.get("texts", text_key(caption, self.makers.text_encoder)) for caption in captions
        ]
        stored = [one for one in states if one is not None]
        complete = len(stored) == len(states)
        return CachedContent(
            latents=_stacked([sample.latents for sample in samples]),
            rows_to_encode=rows,
            keys_to_encode=[samples[row].key for row in rows],
            frames_to_encode=_stacked([sample.frames for sample in samples]),
            text=pad_states(stored) if complete else None,
            caption_states=[] if complete else states,
            new_entries=[entry for sample in samples for entry in sample.new_entries],
        )


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Stack those that are not None, since one tensor travels between processes faster than many."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None
