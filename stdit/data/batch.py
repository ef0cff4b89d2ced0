"""A batch on its way from the files to a training step: raw, then encoded; with the seconds that each stage took.

Every rank has its own part of the global batch. Letters: B samples of this rank's part, C T' H' W' latents, L text
tokens, E width of text states.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from stdit.data.manifest.reading import Skipped


class Pinnable(Protocol):
    """A value that can be copied into page-locked memory, from which copies to a GPU are asynchronous."""

    def pin_memory(self) -> Self: ...


Content = TypeVar("Content", bound=Pinnable)


@dataclass
class Timings:
    """Seconds that one batch took on this rank."""

    waiting: float = 0.0
    """The main process waited for the batch, encoding included."""
    reading: float = 0.0
    """The reader process (the main process, without workers) read and decoded it."""
    computing: float = 0.0
    """The part of `reading` in which the reader's thread used a CPU; in the rest it waited for the disk or a CPU."""
    encoding: float = 0.0
    """The main process encoded clips and captions."""


@dataclass
class ReadFailures:
    """Clips of this rank's part of a batch that could not be read."""

    skipped: list[Skipped]
    """Each with the reason."""
    replaced: int
    """Samples that other clips of the bucket stand in for."""
    exhausted_bucket: str | None
    """The bucket in which too few readable clips are left to fill the batch; None if the batch is complete."""


@dataclass(eq=False)
class BatchInfo:
    """Which samples make up this rank's part of a batch, and their sizes."""

    step: int
    """The training step, from 0."""
    batch_size: int
    """Samples in the global batch, of which B are in this part."""
    captions: list[str]
    """B captions."""
    clip_indices: Tensor
    """int64 [B]: places of the clips in `plan.assignment.clips`."""
    fps: Tensor
    """float32 [B]: frames per second."""
    height: Tensor
    """float32 [B]: pixels of the video."""
    width: Tensor
    """float32 [B]: pixels of the video."""


@dataclass(eq=False)
class RawBatch(Generic[Content]):
    """This rank's part of a batch as a reader process hands it over: read, not yet encoded."""

    info: BatchInfo
    content: Content | None
    """What the reader made: frames uint8 [B T 3 H W], or `stdit.data.cache.reader.CachedContent`. None if
    `failures.exhausted_bucket` is set."""
    failures: ReadFailures | None = None
    """None if every planned clip could be read."""
    replaced: int = 0
    """Samples of the global batch that other clips stand in for; known once the ranks have exchanged `failures`."""
    timings: Timings = field(default_factory=Timings)

    def pin_memory(self) -> "RawBatch[Content]":
        """Return the batch in page-locked memory; called by `torch.utils.data.DataLoader`."""
        tensors = {name: getattr(self.info, name).pin_memory() for name in ("fps", "height", "width")}
        content = None if self.content is None else self.content.pin_memory()
        return replace(self, info=replace(self.info, **tensors), content=content)

    def encoded(self, latents: Tensor, text_states: Tensor, text_mask: Tensor) -> "EncodedBatch":
        """Return the batch with what its content was encoded to."""
        return EncodedBatch(
            **vars(self.info),
            latents=latents,
            text_states=text_states,
            text_mask=text_mask,
            replaced=self.replaced,
            timings=self.timings,
        )


@dataclass(eq=False)
class EncodedBatch(BatchInfo):
    """This rank's part of a batch as a training step takes it."""

    latents: Tensor
    """float32 [B C T' H' W']"""
    text_states: Tensor
    """float32 [B L E]"""
    text_mask: Tensor
    """[B L]: nonzero where there is a token."""
    replaced: int = 0
    """Samples of the global batch whose planned clip could not be read, so that another stands in."""
    timings: Timings = field(default_factory=Timings)

    def rows(self, rows: slice | Sequence[int]) -> "EncodedBatch":
        """Return some samples of this part; `batch_size` stays that of the global batch."""
        chosen = range(len(self.captions))[rows] if isinstance(rows, slice) else rows
        tensors = {name: getattr(self, name)[rows] for name in ("clip_indices", *MODEL_INPUTS)}
        return replace(self, captions=[self.captions[row] for row in chosen], **tensors)

    def pin_memory(self) -> "EncodedBatch":
        """Return the batch with what the model takes in page-locked memory; it must lie on the CPU."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in MODEL_INPUTS})

    def to(self, device: torch.device, non_blocking: bool = False) -> "EncodedBatch":
        """Return the batch with what the model takes on a device.

        Args:
            non_blocking: do not wait for the copies of tensors that lie in page-locked memory.
        """
        tensors = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in MODEL_INPUTS}
        return replace(self, **tensors)


MODEL_INPUTS = ("latents", "text_states", "text_mask", "fps", "height", "width")
"""Tensors of an `EncodedBatch` that go to the model's device."""
