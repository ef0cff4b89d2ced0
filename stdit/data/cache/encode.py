"""Encode the clips and captions of a plan that are not in the cache yet."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from stdit.codecs.padding import unpad_states
from stdit.data.cache.keys import text_key
from stdit.data.cache.reader import CachedReader
from stdit.data.cache.shards import CacheEntry, ShardWriter
from stdit.data.clip_tensors import read_view, to_video
from stdit.data.dataset import start_worker
from stdit.data.decoding.decode import DecodeError
from stdit.data.manifest.reading import Skipped, summarise
from stdit.data.plan import BatchPlan
from stdit.data.skips import SkipTally

if TYPE_CHECKING:  # these import diffusers, which takes seconds
    from stdit.codecs.base import VideoCodec
    from stdit.codecs.text import TextEncoder

CAPTIONS_AT_ONCE = 64


@dataclass
class EncodeSummary:
    """What `encode_plan` found and encoded."""

    folder: str
    clips: int = 0
    """Clips of the plan (this process's part)."""
    encoded: int = 0
    """Augmented views that were encoded."""
    stored: int = 0
    """Augmented views that were in the cache already."""
    captions: int = 0
    """Distinct captions."""
    captions_encoded: int = 0
    failed: list[Skipped] = field(default_factory=list)
    """Clips that cannot be read."""
    bytes: int = 0
    """Written to the cache."""
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {self.clips} clips, {self.encoded} views encoded, {self.stored} were in the cache; "
            f"{self.captions} captions, {self.captions_encoded} encoded; {self.bytes / 1e6:,.1f} MB written in "
            f"{self.seconds:.1f} s"
        ]
        if self.failed:
            lines.append(f"{len(self.failed)} clips excluded:")
            lines += summarise(Skipped(path, f"cannot be read: {why}") for path, why in self.failed)
        return "\n".join(lines)


def encode_plan(
    reader: CachedReader,
    codec: "VideoCodec",
    text_encoder: "TextEncoder",
    extra_texts: Iterable[str] = (),
    device: torch.device | str = "cpu",
    part: tuple[int, int] = (0, 1),
    tally: SkipTally | None = None,
    check: bool = False,
    progress: bool = True,
) -> EncodeSummary:
    """Encode every augmented view of every clip of the reader's plan, and every caption, that is not in its store.

    Each clip is encoded by itself, so its latents do not depend on the others. After an interrupt (a signal, a full
    disk), complete shards stay, and the next call resumes from there.

    Args:
        extra_texts: texts to encode beside the captions.
        device: of codec and text encoder.
        part: (k, n): this process encodes every n-th clip and caption, beginning with the k-th. Several processes may
            write to the same cache at once.
        tally: counts the clips that fail, and raises UserError if there are too many.
        check: read stored entries, and encode again those whose bytes have changed.

    Raises:
        UserError: if the cache cannot be written, or too many clips fail.
    """
    began = time.monotonic()
    summary = EncodeSummary(str(reader.store.folder))
    with ShardWriter(reader.store.folder) as writer:
        texts = list(dict.fromkeys([*plan_captions(reader.plan), *extra_texts]))[part[0] :: part[1]]
        _encode_texts(reader, text_encoder, texts, writer, summary, check, progress)
        missing = _MissingClips(reader, part, check)
        _encode_clips(missing, codec, device, writer, summary, tally, progress)
    reader.store.refresh()
    summary.bytes = sum(file.stat().st_size for file in writer.written)
    summary.seconds = time.monotonic() - began
    return summary


class _MissingViews(NamedTuple):
    """The augmented views of a clip that are not stored."""

    stored: int
    keys: list[bytes]
    frames: list[Tensor]
    """uint8 [T 3 H W] each"""
    new: list[CacheEntry]
    failed: Skipped | None


class _MissingClips(Dataset):
    """Item i: the augmented views of the i-th clip that are not stored, decoded."""

    def __init__(self, reader: CachedReader, part: tuple[int, int], check: bool) -> None:
        self.reader, self.check = reader, check
        members = reader.plan.assignment.members
        buckets = np.repeat(np.arange(len(members)), [len(rows) for rows in members])
        pairs = np.stack([buckets, np.concatenate(members)], axis=1)
        self.pairs = pairs[part[0] :: part[1]]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: int) -> _MissingViews:
        k, index = self.pairs[place].tolist()
        assignment = self.reader.plan.assignment
        clip, bucket = assignment.clips[index], assignment.buckets[k]
        try:
            views, new = self.reader.wanted(clip, bucket)
            missing = [
                (view, key) for view, key in views if not self.reader.store.has("latents", key, self.check)
            ]
            frames = [read_view(clip, bucket, view).contiguous() for view, _ in missing]
        except DecodeError as error:
            return _MissingViews(0, [], [], [], Skipped(error.path, error.reason))
        return _MissingViews(len(views) - len(missing), [key for _, key in missing], frames, new, None)


def _encode_clips(
    missing: _MissingClips,
    codec: "VideoCodec",
    device: torch.device | str,
    writer: ShardWriter,
    summary: EncodeSummary,
    tally: SkipTally | None,
    progress: bool,
) -> None:
    loader = DataLoader(
        missing,
        batch_size=None,
        num_workers=missing.reader.workers,
        worker_init_fn=start_worker,
        generator=torch.Generator(),
    )
    maker = missing.reader.makers.codec
    for views in tqdm(loader, desc="encoding clips", unit="clip", disable=None if progress else True):
        summary.clips += 1
        if views.failed is not None:
            summary.failed.append(views.failed)
            if tally is not None:
                tally.add([views.failed])
        for key, frames in zip(views.keys, views.frames, strict=True):
            writer.add(CacheEntry("latents", maker, key, encode_view(codec, frames, device)))
        for entry in views.new:
            writer.add(entry)
        summary.encoded += len(views.keys)
        summary.stored += views.stored


def encode_view(codec: "VideoCodec", frames: Tensor, device: torch.device | str) -> Tensor:
    """Encode frames uint8 [T 3 H W] to latents float32 [C T' H' W'] on the CPU."""
    with torch.no_grad():
        return codec.encode(to_video(frames[None].to(device)))[0].float().cpu()


def _encode_texts(
    reader: CachedReader,
    encoder: "TextEncoder",
    texts: list[str],
    writer: ShardWriter,
    summary: EncodeSummary,
    check: bool,
    progress: bool,
) -> None:
    """Encode the texts that are not stored, in batches of similar length."""
    summary.captions = len(texts)
    maker = reader.makers.text_encoder
    lacking = [text for text in texts if not reader.store.has("texts", text_key(text, maker), check)]
    summary.captions_encoded = len(lacking)
    lacking.sort(key=lambda text: (len(text), text))
    bar = tqdm(
        total=len(lacking), desc="encoding captions", unit="caption", disable=None if progress else True
    )
    with bar, torch.no_grad():
        for begin in range(0, len(lacking), CAPTIONS_AT_ONCE):
            chunk = lacking[begin : begin + CAPTIONS_AT_ONCE]
            for text, states in zip(chunk, unpad_states(*encoder.encode(chunk)), strict=True):
                writer.add(CacheEntry("texts", maker, text_key(text, maker), states))
            bar.update(len(chunk))


def plan_captions(plan: BatchPlan) -> Iterator[str]:
    """Yield the captions of a plan's clips, in the order of the manifest."""
    texts = plan.assignment.clips.texts
    for index in np.sort(np.concatenate(plan.assignment.members)).tolist():
        yield texts[index]


def wanted_keys(reader: CachedReader, extra_texts: Iterable[str] = ()) -> Iterator[bytes]:
    """Yield the keys of all entries that the reader's plan and further texts may use."""
    assignment = reader.plan.assignment
    for bucket, members in zip(assignment.buckets, assignment.members, strict=True):
        for index in members.tolist():
            clip = assignment.clips[index]
            try:
                yield reader.contents.known(clip.media)[0]
                yield from (key for _, key in reader.wanted(clip, bucket)[0])
            except (OSError, DecodeError):
                continue  # a missing file has no entries
    for text in (*plan_captions(reader.plan), *extra_texts):
        yield text_key(text, reader.makers.text_encoder)
