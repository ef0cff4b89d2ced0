"""Settings of the data: which clips, in which sizes, read how. Light to import: no decoder, no torch."""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from stdit.data.decoding.media import is_url
from stdit.errors import UserError

LARGEST = 16384
"""Frames of a clip, pixels of a side, clips of a batch: more of any is a slip of the keyboard."""

RESOLUTIONS = ("144p", "240p", "360p", "480p", "720p", "1080p")
ASPECT_RATIOS = ("21:9", "16:9", "3:2", "4:3", "1:1", "3:4", "2:3", "9:16")
"""Width to height: the usual ones; any other will do as well."""
LENGTHS = {"image": 1, "2s": 51, "4s": 102, "8s": 204, "16s": 408}
"""Frames of Open-Sora v1.2's lengths: whole chunks of 17, at 24 frames per second."""


@dataclass
class BucketConfig:
    """One size of clip, and how many of them make a batch."""

    num_frames: int = 16
    """Frames of a clip; 1 trains on single images."""
    fps: float = 8.0
    """Frames per second that clips are resampled to."""
    height: int | None = None
    """Pixels; give height and width, or resolution (none of them: 256 x 256)."""
    width: int | None = None
    """Pixels; give height and width, or resolution."""
    resolution: str | None = None
    """"240p" (the area of 240 lines at 16:9, as in Open-Sora) or "256" (the area of 256 x 256 pixels)."""
    aspect_ratio: str | list[str] = "16:9"
    """width:height, with `resolution`; a list makes a bucket for each."""
    batch_size: int = 1
    """Clips in one step, over all ranks."""
    max_tokens: int | None = None
    """Instead of batch_size: as many clips as have this many tokens (patches of latents) together, but at least one;
    over all ranks."""
    windows: int = 1
    """Most windows that one clip serves in an epoch: a clip n times as long as the bucket's is divided into n parts,
    at most so many, which do not overlap; 1: one window, anywhere in the clip."""
    keep_probability: float = 1.0
    """Share of the clips that could fill this bucket that it takes; the others go to a smaller one."""

    def validate(self) -> None:
        """Raises UserError for an impossible value."""
        for name in ("num_frames", "batch_size", "windows"):
            value = getattr(self, name)
            if not 1 <= value <= LARGEST:
                raise UserError(f"data.buckets: {name} is {value}; it must be from 1 to {LARGEST}")
        if self.max_tokens is not None and self.batch_size != 1:
            raise UserError(
                f"data.buckets: batch_size is {self.batch_size} and max_tokens is {self.max_tokens}; give one of them"
            )
        if self.max_tokens is not None and not 1 <= self.max_tokens <= 2**53:
            raise UserError(
                f"data.buckets: max_tokens is {self.max_tokens}; it must be from 1 to 2^53 (leave it out to say "
                "batch_size)"
            )
        if not 0.01 <= self.fps <= 1000:
            raise UserError(
                f"data.buckets: fps is {self.fps}; it must be from 0.01 to 1000 frames per second"
            )
        if not 0 < self.keep_probability <= 1:
            raise UserError(
                f"data.buckets: keep_probability is {self.keep_probability}; it must be above 0 and "
                "at most 1 (remove the bucket to take none)"
            )
        self.size()

    def size(self) -> tuple[int, int]:
        """(height, width) in pixels. Raises UserError."""
        height, width = self.height, self.width
        if self.resolution is not None:
            if height is not None or width is not None:
                raise UserError(
                    f"data.buckets: resolution {self.resolution!r} beside height {height} and width {width}; "
                    "give either resolution or both of height and width"
                )
            assert isinstance(self.aspect_ratio, str), "DataConfig makes a bucket for each"
            height, width = resolve_size(self.resolution, self.aspect_ratio)
        elif height is None and width is None:
            height = width = 256
        if height is None or width is None:
            raise UserError(
                f"data.buckets: height is {height} and width is {width}; give both, or a resolution such as "
                '"240p"'
            )
        if not (1 <= height <= LARGEST and 1 <= width <= LARGEST):
            raise UserError(
                f"data.buckets: frames of {width}x{height} pixels (width x height); each must be from 1 to {LARGEST}"
            )
        return height, width


@dataclass
class SourceConfig:
    """One of several sets of clips."""

    manifest: str = ""
    """As data.manifest."""
    root: str | None = None
    """As data.root."""
    weight: float = 1.0
    """How often each of its clips comes in an epoch: 2 is twice, 0.5 every other time on average."""


@dataclass
class DataConfig:
    """Which clips to train on and how to read them."""

    manifest: str = ""
    """CSV, JSON lines or Parquet with path,text and any of num_frames,fps,height,width,start,end,aesthetic,motion,
    camera; a folder of videos with .txt captions; or tar shards, such as shards/{000..099}.tar or s3://bucket/*.tar."""
    root: str | None = None
    """Folder (or URL) that paths are relative to and that no file may lie outside; default: the manifest's folder."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Several sets of clips, each with manifest, root and weight, in place of manifest and root."""
    caption_scores: list[Literal["aesthetic", "motion", "camera"]] = field(default_factory=list)
    """Columns that follow each caption that has them, in Open-Sora's words: "aesthetic score: 6.5."."""
    buckets: list[BucketConfig] = field(default_factory=lambda: [BucketConfig()])
    """Sizes to train on; a clip goes to the largest that it can fill."""
    allow_upscale: bool = False
    """Let clips with fewer pixels, or a lower frame rate, than the bucket's fill it."""
    crop: Literal["center", "random"] = "center"
    """Where to cut what does not fit the bucket's aspect ratio."""
    workers: int = 0
    """Loader processes; 0 reads in the training process."""
    max_skipped_share: float = 1.0
    """Share of the files that may fail to decode before the run stops; 1: it stops when none of a bucket is left
    (a bucket of which none can be read at the start is left out)."""
    cache: Literal["none", "memory", "disk"] = "none"
    """Encode clips and captions once, and keep them in files. memory: all before the first step, then held in memory;
    disk: each when a batch first needs it, and read as batches need them."""
    cache_dir: str | None = None
    """Folder of the cache, which runs may share; none: stdit-cache in the folder of the (first) manifest."""
    views: int = 1
    """Of each clip that the cache keeps: the middle, and further windows (and, with crop random, crops)."""
    flip: bool = False
    """Show clips mirrored half of the time, unless their caption has a word for a side, or for writing."""

    def __post_init__(self) -> None:
        self.buckets = [
            replace(bucket, aspect_ratio=ratio)
            for bucket in self.buckets
            for ratio in (
                [bucket.aspect_ratio] if isinstance(bucket.aspect_ratio, str) else bucket.aspect_ratio
            )
        ]

    def all_sources(self) -> list[SourceConfig]:
        """What to read: `sources`, or the one of manifest and root."""
        return self.sources or [SourceConfig(self.manifest, self.root)]

    def validate(self) -> None:
        """Raises UserError for an impossible value."""
        if not self.manifest and not self.sources:
            raise UserError(
                "data.manifest is empty: give a CSV with the columns path,text, or a folder of videos with "
                ".txt captions beside them"
            )
        if self.sources and (self.manifest or self.root):
            given = "manifest" if self.manifest else "root"
            raise UserError(f"data.{given} beside data.sources: name it there, as a source of its own")
        for source in self.sources:
            if not source.manifest:
                raise UserError("data.sources: manifest is empty; each source needs one")
            if not 0.001 <= source.weight <= 1000:
                raise UserError(
                    f"data.sources: weight is {source.weight} for {source.manifest}; it must be from 0.001 to 1000 "
                    "(leave the source out to take none)"
                )
        if not self.buckets:
            raise UserError(
                "data.buckets is empty: give at least one, with num_frames, fps, height, width, batch_size"
            )
        for bucket in self.buckets:
            bucket.validate()
        if self.workers < 0:
            raise UserError(f"data.workers is {self.workers}; it must be 0 (in process) or more")
        if not 1 <= self.views <= 1000:
            raise UserError(f"data.views is {self.views}; it must be from 1 to 1000")
        if self.cache == "none" and self.views > 1:
            raise UserError(
                f"data.views = {self.views} and data.cache = none: without a cache every sample has a window of its "
                "own; leave data.views out, or set data.cache disk"
            )
        if self.cache != "none":
            self.cache_folder()
        if self.cache != "none" and self.crop == "random" and self.views == 1:
            raise UserError(
                f"data.cache = {self.cache} and data.crop = random: of each clip data.views = 1 is kept, the middle; "
                "set data.views to 4, say, or data.crop = center, or data.cache = none"
            )
        if not 0 <= self.max_skipped_share <= 1:
            raise UserError(f"data.max_skipped_share is {self.max_skipped_share}; it must be between 0 and 1")

    def cache_folder(self) -> Path:
        """Where the cache lies: with the (first) data set, so that it serves every run on it and moves along.

        Raises UserError if that is not on this machine.
        """
        if self.cache_dir:
            return Path(self.cache_dir)
        first = self.all_sources()[0].manifest
        if is_url(first):
            raise UserError(f"data.cache = {self.cache}, but {first} is no local folder: set data.cache_dir")
        above = Path(re.split(r"[{*\[]", first, maxsplit=1)[0])  # all shards of a pattern
        return (above if above.is_dir() else above.parent) / "stdit-cache"


def resolve_size(resolution: str, aspect_ratio: str = "16:9", multiple: int = 2) -> tuple[int, int]:
    """(height, width) in pixels of the named area and aspect ratio (width:height), each a multiple of
    `multiple`.

    "240p" is the area of 240 lines at 16:9 whatever the ratio, so that one resolution costs about the same in
    every ratio (the buckets of Open-Sora v1.2); "256" is the area of 256 x 256. Raises UserError.
    """
    lines = resolution.removesuffix("p")
    if not (lines.isascii() and lines.isdigit() and 0 < float(lines) <= LARGEST):
        raise UserError(
            f'resolution {resolution!r} is unknown: give lines with a p, such as "144p", "240p" or '
            '"720p", or a square side such as "256"'
        )
    width_part, _, height_part = aspect_ratio.partition(":")
    try:
        ratio = float(width_part) / float(height_part)
    except (ValueError, ZeroDivisionError):
        ratio = 0.0
    if not 0.01 <= ratio <= 100:
        raise UserError(
            f'aspect_ratio {aspect_ratio!r} is unknown: give width:height, such as "16:9" or "1:1"'
        )
    area = int(lines) ** 2 * (16 / 9 if resolution.endswith("p") else 1)
    sides = (math.sqrt(area / ratio), math.sqrt(area * ratio))
    height, width = (max(multiple, round(side / multiple) * multiple) for side in sides)
    return height, width
