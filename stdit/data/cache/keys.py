"""What an entry is known by: a hash of everything that decides its value, and of nothing else.

So a cache cannot be stale: with another file, codec, caption or size, other entries are asked for.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
import xxhash

from stdit.data.buckets import Bucket
from stdit.data.cache.shards import Entry
from stdit.data.cache.store import Store
from stdit.data.config import DataConfig
from stdit.data.decoding.media import Media
from stdit.data.manifest.clips import Clip
from stdit.data.views import AugmentedView

DECODING = 1
"""To be raised when decoding or resizing gives other pixels than before."""


def digest(*facts: object) -> bytes:
    """16 bytes that stand for facts that JSON can hold."""
    return xxhash.xxh3_128_digest(json.dumps(facts, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def latents_key(content: bytes, view: AugmentedView, bucket: Bucket, codec: str) -> bytes:
    """Of the latents of a view of a file, made by the codec with this fingerprint."""
    size = (bucket.num_frames, float(bucket.fps), bucket.height, bucket.width)
    where = (round(view.start, 6), round(view.down, 6), round(view.across, 6), view.mirrored)
    return digest("latents", DECODING, content.hex(), where, size, codec)


def text_key(caption: str, encoder: str) -> bytes:
    """Of the states of a caption, made by the text encoder with this fingerprint."""
    return digest("texts", caption, encoder)


@dataclass
class Contents:
    """Hashes of the bytes of files, remembered by name, size and time of change so that they are read once."""

    store: Store

    def known(self, media: Media) -> tuple[bytes, bytes | None]:
        """By what a file's hash is remembered, and the hash, None if it is not. Raises OSError."""
        key = digest("contents", media.name, *media.state())
        value = self.store.get("contents", key)
        return key, None if value is None else value.numpy().tobytes()

    def of(self, media: Media) -> tuple[bytes, Entry | None]:
        """The hash of a file's bytes, and what is to be remembered if that is new. Raises OSError."""
        key, content = self.known(media)
        if content is not None:
            return content, None
        content = hash_bytes(media)
        return content, Entry("contents", "", key, torch.frombuffer(bytearray(content), dtype=torch.uint8))


def hash_bytes(media: Media) -> bytes:
    """XXH3-128 of a file's bytes. Raises OSError."""
    running = xxhash.xxh3_128()
    with media.open() as file:
        while chunk := file.read(1 << 22):
            running.update(chunk)
    return running.digest()


def remembered(config: DataConfig) -> Callable[[Clip], bool]:
    """Return a function that says whether the cache knows the hash of a clip's file.

    Only files that were decoded are hashed, so such a clip is readable and need not be opened to check.
    """
    if config.cache == "none":
        return lambda clip: False
    contents = Contents(Store(config.cache_folder()))

    def known(clip: Clip) -> bool:
        try:
            return contents.known(clip.media)[1] is not None
        except OSError:
            return False

    return known
