"""Keys of cache entries: a hash of everything that an entry's value depends on, and of nothing else.

So a cache cannot be stale: another file, codec, caption or size has another key.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
import xxhash

from stdit.data.buckets import Bucket
from stdit.data.cache.shards import CacheEntry
from stdit.data.cache.store import CacheStore
from stdit.data.config import DataConfig
from stdit.data.decoding.media import Media
from stdit.data.manifest.clips import Clip
from stdit.data.views import AugmentedView

DECODING_VERSION = 2
"""Raise it when decoding or resizing gives other pixels than before."""


def digest(*values: object) -> bytes:
    """Return a hash of 16 bytes of values that JSON can hold."""
    return xxhash.xxh3_128_digest(json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def latents_key(
    content: bytes, view: AugmentedView, bucket: Bucket, codec: str, field_order: str = ""
) -> bytes:
    """Return the key of the latents of a view of a file, encoded by the codec with this fingerprint.

    Args:
        field_order: as the manifest states it; empty if it does not.
    """
    size = (bucket.num_frames, float(bucket.fps), bucket.height, bucket.width)
    where = (round(view.start, 6), round(view.down, 6), round(view.across, 6), view.mirrored)
    stated = (field_order,) if field_order else ()
    return digest("latents", DECODING_VERSION, content.hex(), where, size, codec, *stated)


def text_key(caption: str, encoder: str) -> bytes:
    """Return the key of the states of a caption, encoded by the text encoder with this fingerprint."""
    return digest("texts", caption, encoder)


@dataclass
class FileHashes:
    """Hashes of files, kept in the cache by name, size and modification time, so that each is hashed once."""

    store: CacheStore

    def known(self, media: Media) -> tuple[bytes, bytes | None]:
        """Return the key of a file's hash, and the hash if it is stored, otherwise None. Raises OSError."""
        key = digest("contents", media.name, *media.state())
        value = self.store.get("contents", key)
        return key, None if value is None else value.numpy().tobytes()

    def of(self, media: Media) -> tuple[bytes, CacheEntry | None]:
        """Return the hash of a file, and an entry to store if it is new. Raises OSError."""
        key, content = self.known(media)
        if content is not None:
            return content, None
        content = hash_media(media)
        return content, CacheEntry(
            "contents", "", key, torch.frombuffer(bytearray(content), dtype=torch.uint8)
        )


def hash_media(media: Media) -> bytes:
    """Return XXH3-128 of a file's bytes. Raises OSError."""
    running = xxhash.xxh3_128()
    with media.open() as file:
        while chunk := file.read(1 << 22):
            running.update(chunk)
    return running.digest()


def remembered(config: DataConfig) -> Callable[[Clip], bool]:
    """Return a function that says whether the cache has the hash of a clip's file.

    Only files that were decoded are hashed, so such a clip is readable and need not be opened to check.
    """
    if config.cache == "none":
        return lambda clip: False
    hashes = FileHashes(CacheStore(config.cache_folder()))

    def known(clip: Clip) -> bool:
        try:
            return hashes.known(clip.media)[1] is not None
        except OSError:
            return False

    return known
