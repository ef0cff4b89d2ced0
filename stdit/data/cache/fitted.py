"""Codecs that were fitted to the clips, kept in the cache so that they are fitted once."""

import logging
import secrets
import shutil
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from stdit.checkpoint_files import apply_umask
from stdit.data.cache.keys import DECODING, Contents, digest
from stdit.data.cache.shards import Entry, Writer
from stdit.data.cache.store import Store
from stdit.data.config import DataConfig
from stdit.data.dataset import middle_window, to_video
from stdit.data.decoding.decode import DecodeError
from stdit.data.plan import BatchPlan
from stdit.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from stdit.codecs.base import VideoCodec

logger = logging.getLogger(__name__)


def fitted(codec: Any, plan: BatchPlan, config: DataConfig) -> "VideoCodec":
    """A codec fitted to the middle of the first clips, or the one that was fitted to the same ones before.

    Args:
        codec: with `fit`, and `fit_clips`, the number of clips that it looks at.

    Raises:
        UserError: if the clips will not do.
    """
    from stdit.codecs.base import CODEC_FILE, VideoCodec

    if config.cache == "none":
        codec.fit(_videos(plan, []))
        return codec
    folder, (name, new) = config.cache_folder(), _identity(codec, plan, config)
    saved = folder / "codecs" / name
    if (saved / CODEC_FILE).is_file():
        try:
            return VideoCodec.from_pretrained(saved)
        except UserError as error:
            logger.warning("%s Fitting it again.", error)
            shutil.rmtree(saved, ignore_errors=True)
    unreadable: list[str] = []
    codec.fit(_videos(plan, unreadable))
    if not unreadable:  # otherwise it has seen others than those that its name stands for
        with Writer(folder) as writer:
            for entry in new:
                writer.add(entry)
        aside = saved.with_name(f".{name}.{secrets.token_hex(6)}.tmp")
        try:
            codec.save_pretrained(aside)
            apply_umask(aside)
            if not saved.exists():
                aside.rename(saved)
        except OSError as error:
            raise UserError(f"cannot write to the cache {folder} ({error}): make room on the disk") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return codec


def _identity(codec: Any, plan: BatchPlan, config: DataConfig) -> tuple[str, list[Entry]]:
    """A name that stands for the codec's settings and all that it will see; and hashes of files to be remembered."""
    contents, facts, new = Contents(Store(config.cache_folder())), [], []
    for index, k in islice(_in_order(plan), codec.fit_clips):
        clip, bucket = plan.assignment.clips[index], plan.assignment.buckets[k]
        try:
            content, entry = contents.of(clip.media)
        except OSError:
            continue
        new += [] if entry is None else [entry]
        facts.append((content.hex(), clip.start, clip.num_frames, clip.fps, str(bucket)))
    settings = codec.name, list(codec.stride), codec.channels, codec.fit_clips
    return digest("codec", DECODING, settings, facts).hex(), new


def _videos(plan: BatchPlan, unreadable: list[str]) -> "Iterator[Tensor]":
    """Float videos [3 T H W] of the clips that train, as the manifest has them; names those that cannot be read."""
    for index, k in _in_order(plan):
        try:
            frames = middle_window(plan.assignment.clips[index], plan.assignment.buckets[k])
        except DecodeError as error:  # reported, and counted, where it would be trained on
            unreadable.append(error.path)
        else:
            yield to_video(frames[None])[0]


def _in_order(plan: BatchPlan) -> "Iterator[tuple[int, int]]":
    """(clip, bucket) in the order of the manifest."""
    members = plan.assignment.members
    rows, buckets = np.concatenate(members), np.repeat(np.arange(len(members)), [len(m) for m in members])
    for place in np.argsort(rows, kind="stable").tolist():
        yield int(rows[place]), int(buckets[place])
