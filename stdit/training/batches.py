"""Batches of latents and text states for training, encoded as they are needed, or from the cache."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stdit.codecs import build_codec, build_text_encoder
from stdit.codecs.cached_text import CachedTextEncoder
from stdit.codecs.padding import unpad_states
from stdit.data.cache.batches import DiskBatches, EncodedBatches, MemoryCache
from stdit.data.cache.encode import EncodeSummary, encode_plan, encode_view
from stdit.data.cache.reader import CachedReader, Makers
from stdit.data.cache.store import Store
from stdit.data.dataset import VideoBatches
from stdit.data.skips import SkipFile, SkipList, SkipTally
from stdit.parallel.processes.mesh import Mesh
from stdit.training.build import Inputs, Parts
from stdit.training.data_stalls import watched

Batches = Callable[[int, int], Iterator[dict[str, Any]]]
"""From (first step, last step + 1) to batches with latents and text states, in order."""


def build_batches(parts: Parts, folder: Path, mesh: Mesh) -> Batches:
    """This rank's part of each batch, as latents. Every rank calls this alike.

    With a cache, the parts let go of the text encoder and of what only encoding needs of the codec; states of the
    validation prompts stay.

    Args:
        folder: of the run; lists the clips that fail in ``skipped.jsonl``.

    Raises:
        UserError: while encoding, or iterating, when too many clips cannot be read.
    """
    data = parts.config.data
    listed = SkipFile(folder / "skipped.jsonl") if mesh.is_main else SkipList()
    tally = SkipTally(parts.plan.assignment.files, data.max_skipped_share, listed)
    batches = BATCHES[data.cache](parts, tally, mesh)
    return lambda start, stop: watched(batches(start, stop), data, speaks=mesh.is_main)


def _fresh(parts: Parts, tally: SkipTally, mesh: Mesh) -> Batches:
    """Decoded and encoded as they are needed."""
    pin_memory = mesh.device.type == "cuda"
    data = parts.config.data
    videos = VideoBatches(
        parts.plan, data.workers, data.crop, pin_memory=pin_memory, mesh=mesh, flip=data.flip, tally=tally
    )
    chunk = parts.config.trainer.micro_batch_size

    def encoded(start_step: int, stop_step: int) -> Iterator[dict[str, Any]]:
        for batch in videos(start_step, stop_step):
            began, video = time.monotonic(), batch.pop("video")
            latents = torch.cat([parts.codec.encode(part) for part in video.split(chunk or len(video))])
            states, mask = parts.text_encoder.encode(batch["text"])
            made = {"latents": latents, "text_states": states, "text_mask": mask}
            yield {**batch, **made, "encoding": time.monotonic() - began}

    return encoded


def _from_memory(parts: Parts, tally: SkipTally, mesh: Mesh) -> Batches:
    """All encoded before the first step, each rank its share, and held in memory."""
    reader = reader_of(parts)

    def encode() -> EncodeSummary:
        return encode_plan(
            reader,
            parts.codec,
            parts.text_encoder,
            device=mesh.device,
            part=(mesh.rank, mesh.world_size),
            tally=tally,
            check=True,
            progress=mesh.is_main,
        )

    for summary in mesh.all_gather_objects(mesh.on_all_ranks(encode)):
        mesh.on_all_ranks(partial(tally.add, summary.failed))
    cache = mesh.on_all_ranks(lambda: MemoryCache.read(reader))
    _release(parts)
    return EncodedBatches(reader, cache, mesh)


def _from_disk(parts: Parts, tally: SkipTally, mesh: Mesh) -> Batches:
    """Read as they are needed, and encoded and stored where that was not done yet."""
    _release(parts)

    def encode_text(caption: str) -> torch.Tensor:
        return next(unpad_states(*parts.text_encoder.encode([caption])))

    pin_memory = mesh.device.type == "cuda"
    encode = partial(encode_view, parts.codec, device=mesh.device)
    return DiskBatches(reader_of(parts), encode, encode_text, tally, pin_memory, mesh)


BATCHES: dict[str, Callable[[Parts, SkipTally, Mesh], Batches]] = {
    "none": _fresh,
    "memory": _from_memory,
    "disk": _from_disk,
}


def reader_of(inputs: Inputs) -> CachedReader:
    """What reads the cache of a run."""
    makers = Makers(inputs.codec.fingerprint(), inputs.text_encoder.fingerprint())
    data = inputs.config.data
    return CachedReader(inputs.plan, data, Store(data.cache_folder()), makers)


def _release(parts: Parts) -> None:
    """Let go of what only encoding needs. It is read again if the cache lacks something, and for the pipeline."""
    config = parts.config
    if config.text_encoder.name != "stored":  # which holds no encoder
        prompts, reload = config.validation.prompts, partial(build_text_encoder, config.text_encoder)
        parts.text_encoder = CachedTextEncoder(parts.text_encoder, prompts, reload)
    parts.codec.release_encoder(partial(build_codec, config.codec))
