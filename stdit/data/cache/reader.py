"""Samples of clips from the cache, or decoded where it lacks them, in whatever process they are needed.

Letters: B batch, C T' H' W' latents, L text tokens, E width of text states.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from stdit.codecs.padding import pad_states
from stdit.data.buckets import Bucket
from stdit.data.cache.keys import Contents, latents_key, text_key
from stdit.data.cache.shards import Entry
from stdit.data.cache.store import Store
from stdit.data.config import DataConfig
from stdit.data.dataset import Batch, Sample, read_view
from stdit.data.decoding.decode import DecodeError
from stdit.data.manifest.clips import Clip
from stdit.data.plan import BatchPlan, PlannedBatch
from stdit.data.views import AugmentedView, augmented_view, count_augmented_views

REMEMBERED = 1 << 16
"""Clips whose keys a process keeps in memory."""


class Makers(NamedTuple):
    """Fingerprints of what made the entries that are wanted."""

    codec: str
    text_encoder: str


class Wanted(NamedTuple):
    """A view of a clip, and the key of its latents."""

    view: AugmentedView
    key: bytes


@dataclass
class CachedReader:
    """Takes one of a clip's views in each step; decodes it if its latents are not stored."""

    plan: BatchPlan
    config: DataConfig
    store: Store
    makers: Makers
    contents: Contents = field(init=False)
    _stored: dict[tuple[int, int], list[Wanted]] = field(default_factory=dict, init=False, repr=False)
    """Of bucket and clip, once found in the store: then the file is not looked at again. Bounded."""

    def __post_init__(self) -> None:
        self.contents = Contents(self.store)

    def wanted(self, clip: Clip, bucket: Bucket) -> tuple[list[Wanted], list[Entry]]:
        """All views of a clip, each once, and what is to be remembered of the file. Raises DecodeError."""
        try:
            content, new = self.contents.of(clip.media)
        except OSError as error:
            raise DecodeError(clip.media, error.strerror or str(error)) from error
        count = count_augmented_views(self.config, clip.text)
        views = dict.fromkeys(augmented_view(self.config, number, clip, bucket) for number in range(count))
        wanted = [Wanted(view, latents_key(content, view, bucket, self.makers.codec)) for view in views]
        return wanted, [] if new is None else [new]

    def number(self, step: int, index: int, count: int) -> int:
        """Which of its views item `index` of a step's batch is, drawn evenly."""
        if count == 1:
            return 0
        generator = torch.Generator().manual_seed(self.plan.crop_seed(step, index))
        return int(torch.randint(count, (1,), generator=generator))

    def read(self, planned: PlannedBatch, index: int, clip_index: int) -> Sample:
        place = planned.bucket_index, clip_index
        views, new = self._stored.get(place, []), list[Entry]()
        if not views:
            views, new = self.wanted(self.plan.assignment.clips[clip_index], planned.bucket)
        view, key = views[self.number(planned.step, index, len(views))]
        latents = self.store.get("latents", key)
        if latents is not None:
            if len(self._stored) < REMEMBERED and not new:
                self._stored[place] = views
            return Sample(clip_index, latents=latents, new=new)
        frames = read_view(self.plan.assignment.clips[clip_index], planned.bucket, view)
        return Sample(clip_index, frames=frames, key=key, new=new)

    def collate(self, samples: Sequence[Sample], captions: Sequence[str]) -> Batch:
        """Latents [B C T' H' W'], text_states [B L E] and text_mask [B L]; or what `DiskBatches` makes them of.

        Where latents are lacking: which rows are fresh, with their keys and frames, and what is stored of the others.
        Where text states are: those of each caption, or None.
        """
        fresh = [row for row, sample in enumerate(samples) if sample.latents is None]
        texts = [self.store.get("texts", text_key(caption, self.makers.text_encoder)) for caption in captions]
        batch: Batch = {"new": [entry for sample in samples for entry in sample.new]}
        stored = _stacked([sample.latents for sample in samples])
        if fresh:
            batch |= {"fresh": fresh, "keys": [samples[row].key for row in fresh], "stored": stored}
            batch["frames"] = _stacked([sample.frames for sample in samples])
        else:
            batch["latents"] = stored
        found = [states for states in texts if states is not None]
        if len(found) < len(texts):
            return batch | {"texts": texts}
        batch["text_states"], batch["text_mask"] = pad_states(found)
        return batch


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Those that are there as one, which travels between processes at the price of one; None of none."""
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(there) if there else None
