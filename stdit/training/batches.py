"""Batches for training: loaded, encoded (as they are needed, or from the cache) and timed."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from stdit.codecs import build_codec, build_text_encoder
from stdit.codecs.cached_text import CachedTextEncoder
from stdit.codecs.padding import unpad_states
from stdit.data.batch import EncodedBatch
from stdit.data.cache.batches import DiskBatches, MemoryBatches, MemoryCache
from stdit.data.cache.encode import EncodeSummary, encode_plan, encode_view
from stdit.data.cache.keys import remembered
from stdit.data.cache.reader import CachedReader, Makers
from stdit.data.cache.store import CacheStore
from stdit.data.clip_tensors import to_video
from stdit.data.dataset import video_loader
from stdit.data.skips import SkipFile, SkipList, SkipTally
from stdit.data.workers import cores_of_process, count_workers
from stdit.parallel.processes.mesh import Mesh
from stdit.parallel.processes.step_exchange import StepExchange
from stdit.training.build import RunComponents, RunInputs
from stdit.training.data_stalls import timed_batches

Batches = Callable[[int, int], Iterator[EncodedBatch]]
"""From (first step, last step + 1) to this rank's part of each batch, in order."""


def build_batches(
    parts: RunComponents, folder: Path, mesh: Mesh, exchange: StepExchange | None = None
) -> Batches:
    """Return this rank's part of each batch: loaded, encoded and timed. Every rank must call this.

    With a cache, the parts release the text encoder and what only encoding needs of the codec; states of the
    validation prompts stay.

    Args:
        folder: of the run; ``skipped.jsonl`` lists the clips that fail.
        exchange: of the training steps; None: the batches are not trained on.

    Raises:
        UserError: while encoding, or iterating, if too many clips cannot be read.
    """
    workers = workers_of(parts, mesh.device, mesh.dp)
    data = replace(parts.config.data, workers=workers)
    if parts.config.data.workers == "auto":
        print(f"data.workers = auto: {workers}", flush=True)
    listed = SkipFile(folder / "skipped.jsonl") if mesh.is_main else SkipList()
    tally = SkipTally(parts.plan.assignment.files, data.max_skipped_share, listed)
    batches = BATCHES[data.cache](parts, workers, tally, exchange or StepExchange(mesh))
    return lambda start, stop: timed_batches(batches(start, stop), data, warns=mesh.is_main)


def workers_of(inputs: RunInputs, device: torch.device | str, dp: int = 1) -> int:
    """Return the number of loader processes of this process.

    Args:
        device: of the training; on a CPU, PyTorch's threads keep as many cores busy.
        dp: ranks among which each batch is divided.
    """
    data = inputs.config.data
    busy = torch.get_num_threads() if torch.device(device).type == "cpu" else 1
    return count_workers(data, inputs.plan, cores_of_process() - busy, dp, remembered(data))


def _uncached(parts: RunComponents, workers: int, tally: SkipTally, exchange: StepExchange) -> Batches:
    """Decode and encode each batch when it is needed."""
    data, mesh = parts.config.data, exchange.mesh
    pin_memory = mesh.device.type == "cuda"
    loader = video_loader(
        parts.plan,
        workers,
        data.crop,
        pin_memory=pin_memory,
        mesh=mesh,
        flip=data.flip,
        tally=tally,
        exchange=exchange,
    )
    chunk = parts.config.trainer.micro_batch_size

    def encode(start_step: int, stop_step: int) -> Iterator[EncodedBatch]:
        for raw in loader(start_step, stop_step):
            assert raw.content is not None, "the loader raises if it is"
            began, video = time.perf_counter(), to_video(raw.content)
            latents = [
                parts.codec.encode(part.to(mesh.device, non_blocking=True))
                for part in video.split(chunk or len(video))
            ]
            batch = raw.encoded(torch.cat(latents), *parts.text_encoder.encode(raw.info.captions))
            batch.timings.encoding = time.perf_counter() - began
            yield batch

    return encode


def _from_memory(parts: RunComponents, workers: int, tally: SkipTally, exchange: StepExchange) -> Batches:
    """Encode everything before the first step, each rank its share, and hold it in memory."""
    reader, mesh = reader_of(parts, workers), exchange.mesh

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
    return MemoryBatches(reader, cache, mesh, pin_memory=mesh.device.type == "cuda")


def _from_disk(parts: RunComponents, workers: int, tally: SkipTally, exchange: StepExchange) -> Batches:
    """Read each batch from the cache when it is needed; encode and store what it lacks."""
    _release(parts)

    def encode_text(caption: str) -> torch.Tensor:
        return next(unpad_states(*parts.text_encoder.encode([caption])))

    mesh = exchange.mesh
    pin_memory = mesh.device.type == "cuda"
    encode = partial(encode_view, parts.codec, device=mesh.device)
    return DiskBatches(reader_of(parts, workers), encode, encode_text, tally, pin_memory, mesh, exchange)


BATCHES: dict[str, Callable[[RunComponents, int, SkipTally, StepExchange], Batches]] = {
    "none": _uncached,
    "memory": _from_memory,
    "disk": _from_disk,
}


def reader_of(inputs: RunInputs, workers: int = 0) -> CachedReader:
    """Return a reader of the run's cache, for a number of loader processes."""
    makers = Makers(inputs.codec.encoding_fingerprint(), inputs.text_encoder.fingerprint())
    data = replace(inputs.config.data, workers=workers)
    return CachedReader(inputs.plan, data, CacheStore(data.cache_folder()), makers)


def _release(parts: RunComponents) -> None:
    """Release what only encoding needs; it is loaded again if the cache lacks something, and for the pipeline."""
    config = parts.config
    if config.text_encoder.name != "stored":  # which holds no encoder
        prompts, reload = config.validation.prompts, partial(build_text_encoder, config.text_encoder)
        parts.text_encoder = CachedTextEncoder(parts.text_encoder, prompts, reload)
    parts.codec.release_encoder(partial(build_codec, config.codec))
