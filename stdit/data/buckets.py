"""Buckets: the sizes of clips that are trained on. A batch has one size."""

from dataclasses import dataclass, replace

from stdit.data.config import BucketConfig


@dataclass(frozen=True)
class Bucket:
    """Clips of one size: frames, pixels, frames per second; `batch_size` of them are one step."""

    num_frames: int
    height: int
    width: int
    fps: float
    batch_size: int = 1
    keep_probability: float = 1.0
    max_windows: int = 1
    """Most parts that one clip is split_into_windows into."""
    max_tokens: int | None = None
    """Of a batch; what fits is known once codec and model are: see `sized`."""
    tokens: int | None = None
    """Of a clip, once known."""

    @classmethod
    def from_config(cls, config: BucketConfig) -> "Bucket":
        """Raises UserError for an impossible value."""
        config.validate()
        height, width = config.size()
        return cls(
            config.num_frames,
            height,
            width,
            config.fps,
            config.batch_size,
            config.keep_probability,
            config.max_windows,
            config.max_tokens,
        )

    def sized(self, tokens: int) -> "Bucket":
        """The bucket when a clip has so many tokens: max_tokens, if given, says how many are a batch."""
        size = self.batch_size if self.max_tokens is None else max(1, self.max_tokens // tokens)
        return replace(self, batch_size=size, tokens=tokens)

    @property
    def volume(self) -> int:
        """Frames x pixels of a frame."""
        return self.num_frames * self.height * self.width

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width} at {self.fps:g} fps"
