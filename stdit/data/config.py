"""Settings of the data: which clips, in which sizes, read how. Imports no torch and no decoder."""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from stdit.data.decoding.limits import MAX_DIMENSION
from stdit.data.decoding.media import is_url
from stdit.data.manifest.config import RegularisationConfig, SourceConfig
from stdit.errors import UserError

RESOLUTIONS = ("144p", "240p", "360p", "480p", "720p", "1080p")
ASPECT_RATIOS = ("21:9", "16:9", "3:2", "4:3", "1:1", "3:4", "2:3", "9:16")
"""Common values of width:height; any other is allowed."""
LENGTHS = {"image": 1, "2s": 51, "4s": 102, "8s": 204, "16s": 408}
"""Numbers of frames of Open-Sora v1.2's lengths: multiples of 17, at 24 frames per second."""


@dataclass
class BucketConfig:
    """One size of clips, and how many of them make a batch."""

    num_frames: int = 16
    """Frames of a clip; 1 trains on single images."""
    fps: float = 8.0
    """Frames per second to which clips are resampled."""
    height: int | None = None
    """Pixels; give height and width, or resolution (default: 256 x 256)."""
    width: int | None = None
    """Pixels; give height and width, or resolution."""
    resolution: str | None = None
    """"240p" (the area of 240 lines at 16:9, as in Open-Sora) or "256" (the area of 256 x 256 pixels)."""
    aspect_ratio: str | list[str] = "16:9"
    """width:height, used with `resolution`; a list makes one bucket per ratio."""
    batch_size: int = 1
    """Clips per step, summed over all ranks."""
    max_tokens: int | None = None
    """Alternative to batch_size: the batch has as many clips as fit into this many tokens (patches of latents), at
    least one; summed over all ranks."""
    max_windows: int = 1
    """Most temporal windows that one clip gives per epoch: a clip n times as long as the bucket is split into
    min(n, max_windows) equal parts that do not overlap. 1: one window, anywhere in the clip."""
    keep_probability: float = 1.0
    """Share of the clips that fit this bucket which it takes; the rest go to a smaller bucket."""

    def validate(self) -> None:
        """Raise UserError for an impossible value."""
        for name in ("num_frames", "batch_size", "max_windows"):
            value = getattr(self, name)
            if not 1 <= value <= MAX_DIMENSION:
                raise UserError(f"data.buckets: {name} is {value}; it must be from 1 to {MAX_DIMENSION}")
        if self.max_tokens is not None and self.batch_size != 1:
            raise UserError(
                f"data.buckets: batch_size is {self.batch_size} and max_tokens is {self.max_tokens}; give one of them"
            )
        if self.max_tokens is not None and not 1 <= self.max_tokens <= 2**53:
            raise UserError(
                f"data.buckets: max_tokens is {self.max_tokens}; it must be from 1 to 2^53 (remove it to use "
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
        """Return (height, width) in pixels. Raises UserError."""
        height, width = self.height, self.width
        if self.resolution is not None:
            if height is not None or width is not None:
                raise UserError(
                    f"data.buckets: resolution {self.resolution!r} beside height {height} and width {width}; "
                    "give either resolution or both of height and width"
                )
            assert isinstance(self.aspect_ratio, str), "DataConfig makes one bucket per ratio"
            height, width = resolve_size(self.resolution, self.aspect_ratio)
        elif height is None and width is None:
            height = width = 256
        if self.resolution is None and self.aspect_ratio != BucketConfig.aspect_ratio:
            raise UserError(
                f"data.buckets: aspect_ratio {self.aspect_ratio!r} belongs to a resolution, not to height and width: "
                "leave it out, or give a resolution"
            )
        if height is None or width is None:
            raise UserError(
                f"data.buckets: height is {height} and width is {width}; give both, or a resolution such as "
                '"240p"'
            )
        if not (1 <= height <= MAX_DIMENSION and 1 <= width <= MAX_DIMENSION):
            raise UserError(
                f"data.buckets: frames of {width}x{height} pixels (width x height); each must be from 1 to "
                f"{MAX_DIMENSION}"
            )
        return height, width

    def multiplied(self, factor: int) -> "BucketConfig":
        """Return the bucket with batches `factor` times as large, in clips or in tokens."""
        if self.max_tokens is not None:
            return replace(self, max_tokens=factor * self.max_tokens)
        return replace(self, batch_size=factor * self.batch_size)


@dataclass
class DataConfig:
    """Which clips to train on and how to read them."""

    manifest: str = ""
    """CSV, JSON lines or Parquet with path,text and any of num_frames,fps,height,width,start,end,aesthetic,motion,
    camera; a folder of videos with .txt captions; or tar shards, such as shards/{000..099}.tar or s3://bucket/*.tar."""
    root: str | None = None
    """Folder (or URL) that paths are relative to; no file outside it is opened; default: the manifest's folder."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Several sets of clips, each with manifest, root and weight, instead of manifest and root."""
    regularisation: RegularisationConfig = field(default_factory=RegularisationConfig)
    """Clips beside those of the manifest or the sources, mixed in at a fixed share."""
    caption_scores: list[Literal["aesthetic", "motion", "camera"]] = field(default_factory=list)
    """Columns to append to the captions of clips that have them, in Open-Sora's words: "aesthetic score: 6.5."."""
    trigger: str | None = None
    """Trigger word, such as sks, that prompts then use for what the clips show: it is put into each caption, where
    that has {trigger}, else before it. Captions that have it already stay as they are."""
    buckets: list[BucketConfig] = field(default_factory=lambda: [BucketConfig()])
    """Sizes to train on; a clip goes to one that it can fill: see bucket_choice."""
    batch_multiplier: int = 1
    """Multiplies batch_size or max_tokens of every bucket, to use a recipe for one GPU on several."""
    allow_upscale: bool = False
    """Let clips with fewer pixels, or a lower frame rate, than the bucket's fill it."""
    bucket_choice: Literal["aspect", "size"] = "aspect"
    """aspect: a clip goes to the largest bucket of those that cut least of its picture; size: to the largest that it
    can fill, in the nearest aspect ratio of its resolution, as in Open-Sora."""
    max_crop: float = 1.0
    """Largest share of a clip's picture that may be cut for a bucket's aspect ratio; a clip that would lose more goes
    to another bucket, or is dropped. 1: any."""
    crop: Literal["center", "random"] = "center"
    """Where to crop clips that have another aspect ratio than the bucket."""
    workers: int | Literal["auto"] = 0
    """Loader processes; 0 reads in the training process; auto: as many as decode the batches in time, but no more
    than there are cores that training does not use. Batches are the same for any number."""
    max_skipped_share: float = 1.0
    """Share of the files that may fail to decode before the run stops; 1: it stops when none of a bucket is left
    (a bucket of which no clip can be read at the start is dropped)."""
    cache: Literal["none", "memory", "disk"] = "none"
    """Encode clips and captions once, and keep them in files. memory: all before the first step, then held in memory;
    disk: each when a batch first needs it, and read as batches need them."""
    cache_dir: str | None = None
    """Folder of the cache, which several runs may share; default: stdit-cache beside the (first) manifest."""
    augmented_views: int = 1
    """How many views of each clip the cache keeps: the middle, and further temporal windows (and crops, with crop
    random)."""
    flip: bool = False
    """Mirror half of the clips, except those whose caption has a word for a side or for writing."""

    def __post_init__(self) -> None:
        self.buckets = [
            replace(bucket, aspect_ratio=ratio)
            for bucket in self.buckets
            for ratio in (
                [bucket.aspect_ratio] if isinstance(bucket.aspect_ratio, str) else bucket.aspect_ratio
            )
        ]

    def all_sources(self) -> list[SourceConfig]:
        """Return `sources`, or the one source of `manifest` and `root`."""
        return self.sources or [SourceConfig(self.manifest, self.root)]

    def with_manifest(self, manifest: str, root: str | None = None) -> "DataConfig":
        """Return the settings with the clips of another manifest alone."""
        return replace(self, manifest=manifest, root=root, sources=[], regularisation=RegularisationConfig())

    def multiplied_buckets(self) -> list[BucketConfig]:
        """Return the buckets with `batch_multiplier` applied."""
        return [bucket.multiplied(self.batch_multiplier) for bucket in self.buckets]

    def largest_batch_size(self) -> list[int]:
        """Return the largest batch_size in a list; an empty list if it depends on tokens.

        Which buckets have clips is not known before the manifest is read, but if no bucket is large enough for all
        ranks, a run can fail at once.
        """
        buckets = self.multiplied_buckets()
        return [] if any(bucket.max_tokens for bucket in buckets) else [max(b.batch_size for b in buckets)]

    def validate(self) -> None:
        """Raise UserError for an impossible value."""
        if not self.manifest and not self.sources:
            raise UserError(
                "data.manifest is empty: give a CSV with the columns path,text, or a folder of videos with "
                ".txt captions beside them"
            )
        if self.sources and (self.manifest or self.root):
            given = "manifest" if self.manifest else "root"
            raise UserError(
                f"data.{given} beside data.sources: move it into data.sources, as a source of its own"
            )
        for source in self.sources:
            source.validate()
        self.regularisation.validate()
        if self.trigger is not None and (not self.trigger or self.trigger != self.trigger.strip()):
            raise UserError(
                f"data.trigger = {self.trigger!r}: must be a word or phrase without spaces around it, such as sks; "
                "for none, leave it out"
            )
        if not self.buckets:
            raise UserError(
                "data.buckets is empty: give at least one, with num_frames, fps, height, width, batch_size"
            )
        if not 1 <= self.batch_multiplier <= MAX_DIMENSION:
            raise UserError(
                f"data.batch_multiplier is {self.batch_multiplier}; it must be from 1 to {MAX_DIMENSION}"
            )
        for bucket in self.buckets:
            bucket.validate()
        if self.batch_multiplier > 1:
            for bucket in self.multiplied_buckets():
                if bucket.batch_size > MAX_DIMENSION:
                    raise UserError(
                        f"data.batch_multiplier = {self.batch_multiplier}: batches of {bucket.batch_size} clips; at "
                        f"most {MAX_DIMENSION}: use a smaller multiplier"
                    )
        if not 0 <= self.max_crop <= 1:
            raise UserError(
                f"data.max_crop is {self.max_crop}; it must be between 0 (nothing may be cut) and 1 (no limit)"
            )
        if self.workers != "auto" and self.workers < 0:
            raise UserError(f"data.workers is {self.workers}; it must be auto, 0 (in process) or more")
        if not 1 <= self.augmented_views <= 1000:
            raise UserError(f"data.augmented_views is {self.augmented_views}; it must be from 1 to 1000")
        if self.cache == "none" and self.augmented_views > 1:
            raise UserError(
                f"data.augmented_views = {self.augmented_views} and data.cache = none: without a cache every sample "
                "has its own window; remove data.augmented_views, or set data.cache disk"
            )
        if self.cache != "none":
            self.cache_folder()
        if self.cache != "none" and self.crop == "random" and self.augmented_views == 1:
            raise UserError(
                f"data.cache = {self.cache} and data.crop = random, but data.augmented_views = 1 keeps only the "
                "middle of each clip; set data.augmented_views to 4, for example, or data.crop = center, or "
                "data.cache = none"
            )
        if not 0 <= self.max_skipped_share <= 1:
            raise UserError(f"data.max_skipped_share is {self.max_skipped_share}; it must be between 0 and 1")

    def cache_folder(self) -> Path:
        """Return the folder of the cache: `cache_dir`, or beside the (first) manifest, so that all its runs share it.

        Raises UserError if the manifest is a URL.
        """
        if self.cache_dir:
            return Path(self.cache_dir)
        first = self.all_sources()[0].manifest
        if is_url(first):
            raise UserError(f"data.cache = {self.cache}, but {first} is no local folder: set data.cache_dir")
        above = Path(re.split(r"[{*\[]", first, maxsplit=1)[0])  # the part before any pattern of shards
        return (above if above.is_dir() else above.parent) / "stdit-cache"


def resolve_size(resolution: str, aspect_ratio: str = "16:9", multiple: int = 2) -> tuple[int, int]:
    """Return (height, width) in pixels of a named area and aspect ratio (width:height).

    "240p" is the area of 240 lines at 16:9, whatever the ratio, so that one resolution costs about the same in every
    ratio (the buckets of Open-Sora v1.2); "256" is the area of 256 x 256.

    Args:
        multiple: of which height and width are multiples.

    Raises UserError if the resolution or the ratio is unknown.
    """
    lines = resolution.removesuffix("p")
    if not (lines.isascii() and lines.isdigit() and 0 < float(lines) <= MAX_DIMENSION):
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
