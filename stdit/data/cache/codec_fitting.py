"""Fit a codec to a data set, and keep it in the cache so that it is fitted once."""

import logging
import secrets
import shutil
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from stdit.data.cache.keys import DECODING_VERSION, FileHashes, digest
from stdit.data.cache.shards import CacheEntry, ShardWriter
from stdit.data.cache.store import CacheStore
from stdit.data.clip_tensors import middle_window, to_video
from stdit.data.config import DataConfig
from stdit.data.decoding.decode import DecodeError
from stdit.data.plan import BatchPlan
from stdit.errors import UserError
from stdit.umask import apply_umask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from stdit.codecs.base import VideoCodec

logger = logging.getLogger(__name__)

CODECS_FOLDER = "codecs"
"""In the cache folder: a folder per fitted codec."""


def fit_codec(codec: Any, plan: BatchPlan, config: DataConfig) -> "VideoCodec":
    """Fit a codec to the middle of the first clips, or load it if it was fitted to the same ones before.

    Args:
        codec: with `fit`, and `fit_clips`, the number of clips that it is fitted to.

    Raises:
        UserError: if the clips cannot be used, or the cache cannot be written.
    """
    from stdit.codecs.base import CODEC_FILE, VideoCodec

    if config.cache == "none":
        codec.fit(_videos(plan, []))
        return codec
    folder, (name, new) = config.cache_folder(), _identify(codec, plan, config)
    saved = folder / CODECS_FOLDER / name
    if (saved / CODEC_FILE).is_file():
        try:
            return VideoCodec.from_pretrained(saved)
        except UserError as error:
            logger.warning("a fitted codec is damaged: %s Fitting it again.", error)
            shutil.rmtree(saved, ignore_errors=True)
    unreadable: list[str] = []
    codec.fit(_videos(plan, unreadable))
    if not unreadable:  # otherwise it was fitted to other clips than its name says
        with ShardWriter(folder) as writer:
            for entry in new:
                writer.add(entry)
        staging = saved.with_name(f".{name}.{secrets.token_hex(6)}.tmp")
        try:
            codec.save_pretrained(staging)
            apply_umask(staging)
            if not saved.exists():
                staging.rename(saved)
        except OSError as error:
            raise UserError(f"cannot write to the cache {folder} ({error}): make room on the disk") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return codec


def fitted_name(codec: Any, plan: BatchPlan, config: DataConfig) -> str:
    """Return the name under which `fit_codec` keeps a codec: a hash of its settings and of the clips."""
    return _identify(codec, plan, config)[0]


def _identify(codec: Any, plan: BatchPlan, config: DataConfig) -> tuple[str, list[CacheEntry]]:
    """Return the name of a fitted codec, and hashes of files that the cache does not have yet."""
    hashes, clips, new = FileHashes(CacheStore(config.cache_folder())), [], []
    for index, k in islice(_in_order(plan), codec.fit_clips):
        clip, bucket = plan.assignment.clips[index], plan.assignment.buckets[k]
        try:
            content, entry = hashes.of(clip.media)
        except OSError:
            continue
        new += [] if entry is None else [entry]
        clips.append((content.hex(), clip.start, clip.num_frames, clip.fps, str(bucket)))
    settings = codec.name, list(codec.stride), codec.channels, codec.fit_clips
    return digest("codec", DECODING_VERSION, settings, clips).hex(), new


def _videos(plan: BatchPlan, unreadable: list[str]) -> "Iterator[Tensor]":
    """Yield float videos [3 T H W] of the clips, in the order of the manifest; collect those that cannot be read."""
    for index, k in _in_order(plan):
        try:
            frames = middle_window(plan.assignment.clips[index], plan.assignment.buckets[k])
        except DecodeError as error:  # reported and counted when it would be trained on
            unreadable.append(error.path)
        else:
            yield to_video(frames[None])[0]


def _in_order(plan: BatchPlan) -> "Iterator[tuple[int, int]]":
    """Yield (clip, bucket) in the order of the manifest."""
    members = plan.assignment.members
    rows, buckets = np.concatenate(members), np.repeat(np.arange(len(members)), [len(m) for m in members])
    for place in np.argsort(rows, kind="stable").tolist():
        yield int(rows[place]), int(buckets[place])
