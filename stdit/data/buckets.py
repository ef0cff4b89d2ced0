"""Buckets: the sizes of clips that are trained on. A batch has one size."""

from dataclasses import dataclass, replace

from stdit.data.config import BucketConfig


@dataclass(frozen=True)
class Bucket:
    """One size of clips (frames, pixels, frames per second), `batch_size` of which make a batch."""

    num_frames: int
    height: int
    width: int
    fps: float
    batch_size: int = 1
    keep_probability: float = 1.0
    max_windows: int = 1
    """Most temporal windows that one clip gives per epoch."""
    max_tokens: int | None = None
    """Most tokens of a batch; `sized` turns it into a batch size once codec and model are known."""
    tokens: int | None = None
    """Tokens of one clip, once codec and model are known."""

    @classmethod
    def from_config(cls, config: BucketConfig) -> "Bucket":
        """Make the bucket of its settings. Raises UserError for an impossible value."""
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
        """Return the bucket for clips of `tokens` tokens each; max_tokens, if given, sets the batch size."""
        size = self.batch_size if self.max_tokens is None else max(1, self.max_tokens // tokens)
        return replace(self, batch_size=size, tokens=tokens)

    @property
    def volume(self) -> int:
        """Frames x height x width."""
        return self.num_frames * self.height * self.width

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width} at {self.fps:g} fps"
