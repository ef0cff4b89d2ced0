"""Every clip and caption encoded once, kept in memory and in one file, so that training reads no video.

Letters: N clips of a bucket, B batch, C T' H' W' latents, U different captions, L text tokens, E width of
text states.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from stdit.data.dataset import Batch, SkipTally, describe, middle_window, to_video
from stdit.data.decode import DecodeError
from stdit.data.manifest import Skipped
from stdit.data.plan import BatchPlan
from stdit.errors import UserError
from stdit.parallel.mesh import Mesh

if TYPE_CHECKING:  # these import diffusers, which takes seconds
    from stdit.codecs.base import VideoCodec
    from stdit.codecs.text import TextEncoder

FORMAT = "stdit-cache-1"
CLIPS_AT_ONCE = 8
CAPTIONS_AT_ONCE = 64


@dataclass
class MemoryCache:
    """Latents of all clips of a plan that could be read, and text states of their captions, on the CPU."""

    latents: list[torch.Tensor]
    """For each bucket float32 [N C T' H' W']."""
    rows: list[torch.Tensor]
    """For each bucket int64 [N]: places in `Assignment.clips`."""
    text_states: torch.Tensor
    """float32 [sum of L, E]: the tokens of all captions, end to end."""
    text_offsets: torch.Tensor
    """int64 [U + 1]: where each caption begins in text_states."""
    captions: list[str]
    """The U different captions."""
    skipped: list[Skipped]

    def text(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """States float32 [B L E] and mask bool [B L] (True = token), padded with zeros to the longest."""
        if not hasattr(self, "_places"):
            self._places = {caption: place for place, caption in enumerate(self.captions)}
        bounds = [self.text_offsets[self._places[caption] :][:2].tolist() for caption in captions]
        length = max(end - begin for begin, end in bounds)
        states = torch.zeros(len(captions), length, self.text_states.shape[1])
        mask = torch.zeros(len(captions), length, dtype=torch.bool)
        for b, (begin, end) in enumerate(bounds):
            states[b, : end - begin] = self.text_states[begin:end]
            mask[b, : end - begin] = True
        return states, mask


def precompute(
    plan: BatchPlan,
    codec: "VideoCodec",
    text_encoder: "TextEncoder",
    cache_file: Path,
    device: torch.device | str = "cpu",
    max_skipped_share: float = 1.0,
    progress: bool = True,
) -> MemoryCache:
    """Encodes every clip of the plan, or reads them from `cache_file` when that was made from the same
    things.

    One entry a clip: of a clip longer than its bucket's window the middle, of one with another aspect ratio
    the centre. Random windows and crops need `data.cache none`.

    The file counts as the same when the codec, the text encoder, the buckets, and for each clip path, size,
    time of change and caption are. It is written aside and renamed; a damaged one is made anew.

    Raises UserError when too many clips cannot be read, or the file cannot be written.
    """
    fingerprint = _fingerprint(plan, codec, text_encoder)
    tally = SkipTally(plan.assignment.kept, max_skipped_share)
    cache = _load(cache_file, fingerprint, plan)
    if cache is None:
        latents, rows, skipped = _encode_clips(plan, codec, device, tally, progress)
        captions = _captions(plan)
        states, offsets = _encode_captions(captions, text_encoder, progress)
        cache = MemoryCache(latents, rows, states, offsets, captions, skipped)
        _save(cache, cache_file, fingerprint)
    tally.add(cache.skipped)
    return cache


class EncodedBatches:
    """As `VideoBatches`, from a cache: latents float32 [B C T' H' W'], text_states [B L E], text_mask [B L]
    for video.

    The same plan gives the same clips in the same order; one that could not be read when the cache was made
    gives way to the next of its bucket.
    """

    def __init__(self, plan: BatchPlan, cache: MemoryCache, mesh: Mesh = Mesh()) -> None:  # noqa: B008
        self.plan, self.cache, self.mesh = plan, cache, mesh
        self._places = [{int(row): place for place, row in enumerate(rows)} for rows in cache.rows]

    def __call__(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Batches of the steps in [start_step, stop_step), without end when stop_step is None."""
        for step in itertools.count(start_step) if stop_step is None else range(start_step, stop_step):
            yield self.batch(step)

    def batch(self, step: int) -> Batch:
        planned = self.plan.batch(step)
        places = self._places[planned.bucket_index]
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
        mine = [used[row] for row in self.mesh.rows(len(used))]
        batch = describe(self.plan, planned, mine) | {"replaced": replaced}
        states, mask = self.cache.text(batch["text"])
        latents = self.cache.latents[planned.bucket_index][[places[index] for index in mine]]
        return batch | {"latents": latents, "text_states": states, "text_mask": mask}


def _captions(plan: BatchPlan) -> list[str]:
    """Different captions of the clips that train, in the order of the manifest."""
    indices = sorted(int(index) for members in plan.assignment.members for index in members)
    return list(dict.fromkeys(plan.assignment.clips[index].text for index in indices))


def _encode_clips(
    plan: BatchPlan, codec: "VideoCodec", device: torch.device | str, tally: SkipTally, progress: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[Skipped]]:
    latents, rows, skipped = [], [], []
    bar = tqdm(
        total=plan.assignment.kept, desc="encoding clips", unit="clip", disable=None if progress else True
    )
    with bar, torch.no_grad():
        for bucket, members in zip(plan.assignment.buckets, plan.assignment.members, strict=True):
            shape = (codec.channels, *codec.latent_shape(bucket.num_frames, bucket.height, bucket.width))
            encoded = torch.empty(len(members), *shape)
            done: list[int] = []
            for chunk in np.array_split(members, range(CLIPS_AT_ONCE, len(members), CLIPS_AT_ONCE)):
                frames = []
                for index in chunk.tolist():
                    try:
                        frames.append(middle_window(plan.assignment.clips[index], bucket))
                        done.append(index)
                    except DecodeError as error:
                        skipped.append(Skipped(error.path, error.reason))
                        tally.add(skipped[-1:])
                if frames:
                    video = to_video(torch.stack(frames).to(device))
                    encoded[len(done) - len(frames) : len(done)] = codec.encode(video).float().cpu()
                bar.update(len(chunk))
            latents.append(encoded[: len(done)])
            rows.append(torch.tensor(done, dtype=torch.int64))
    return latents, rows, skipped


def _encode_captions(
    captions: list[str], encoder: "TextEncoder", progress: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens end to end [sum of L, E] and offsets [U + 1]; captions of like length are encoded together."""
    order = sorted(range(len(captions)), key=lambda place: (len(captions[place]), place))
    states: list[torch.Tensor] = [torch.empty(0)] * len(captions)
    bar = tqdm(
        total=len(captions), desc="encoding captions", unit="caption", disable=None if progress else True
    )
    with bar, torch.no_grad():
        for begin in range(0, len(order), CAPTIONS_AT_ONCE):
            chunk = order[begin : begin + CAPTIONS_AT_ONCE]
            encoded, mask = encoder.encode([captions[place] for place in chunk])
            for place, tokens, present in zip(chunk, encoded.float().cpu(), mask.bool().cpu(), strict=True):
                states[place] = tokens[present]
            bar.update(len(chunk))
    offsets = torch.tensor([0, *itertools.accumulate(len(tokens) for tokens in states)], dtype=torch.int64)
    return torch.cat(states), offsets


def _fingerprint(plan: BatchPlan, codec: "VideoCodec", text_encoder: "TextEncoder") -> str:
    digest = hashlib.sha256()

    def add(*parts: object) -> None:
        digest.update(json.dumps(parts).encode() + b"\n")

    add(FORMAT, codec.fingerprint(), text_encoder.fingerprint())
    for bucket, members in zip(plan.assignment.buckets, plan.assignment.members, strict=True):
        add(bucket.num_frames, bucket.height, bucket.width, bucket.fps)
        for index in members.tolist():
            clip = plan.assignment.clips[index]
            with contextlib.suppress(OSError):  # a file that has gone is reported when it is read
                add(*clip.media.state())
            add(index, str(clip.media), clip.text, clip.start, clip.num_frames, clip.fps)
    return digest.hexdigest()


def _save(cache: MemoryCache, file: Path, fingerprint: str) -> None:
    tensors = {"text.states": cache.text_states, "text.offsets": cache.text_offsets}
    for k, (latents, rows) in enumerate(zip(cache.latents, cache.rows, strict=True)):
        tensors |= {f"latents.{k}": latents.contiguous(), f"rows.{k}": rows}
    metadata = {"fingerprint": fingerprint, "skipped": json.dumps(cache.skipped)}
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, aside, metadata)
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        aside.replace(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the cache {file} ({error}): make room, or set data.cache none"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def _load(file: Path, fingerprint: str, plan: BatchPlan) -> MemoryCache | None:
    """None when there is no file, it is damaged, or was made from other things."""
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("fingerprint") != fingerprint:
                return None
            count = range(len(plan.assignment.buckets))
            return MemoryCache(
                [stored.get_tensor(f"latents.{k}") for k in count],
                [stored.get_tensor(f"rows.{k}") for k in count],
                stored.get_tensor("text.states"),
                stored.get_tensor("text.offsets"),
                _captions(plan),
                [Skipped(*entry) for entry in json.loads(metadata["skipped"])],
            )
    except (OSError, SafetensorError):
        return None
