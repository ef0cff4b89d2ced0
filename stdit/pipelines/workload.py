"""Memory of sampling, and the number of sequence-parallel ranks that it needs (``--parallel.sp auto``)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from stdit.models.config import STDiTConfig
from stdit.models.size import batch_load, tensor_bytes
from stdit.parallel.sequence.planner import (
    ParallelDims,
    SpChoice,
    Workload,
    activation_bytes,
    choose_sp,
    divisors,
    idle_warning,
)
from stdit.pipelines.config import SampleConfig, guides_refinement

if TYPE_CHECKING:
    from stdit.pipelines.pipeline import STDiTPipeline


@dataclass
class SamplingWorkload:
    """The videos that a pipeline will generate, and an estimate of their memory."""

    pipe: "STDiTPipeline"
    settings: Sequence[Mapping[str, Any]]
    """Complete settings of each video."""
    config: SampleConfig

    def choose_sp(self, world_size: int, memory: int) -> SpChoice:
        """Choose how many ranks share a video if each has ``memory`` bytes.

        As few as memory allows, but enough that no rank is without a video, as far as the videos have frames.
        """
        ranks = world_size // self.config.parallel.cfg
        degrees = divisors(ranks)
        spread = next(sp for sp in degrees if ranks // sp <= len(self.settings))
        longest = max(load.frames for load in self._loads(1))
        least = min(spread, max(sp for sp in degrees if sp <= longest))
        return choose_sp({sp: self.memory(ParallelDims(ranks, sp)) for sp in degrees if sp >= least}, memory)

    def idle_warnings(self, sp: int, world_size: int) -> list[str]:
        """Return a warning if ranks idle because a video has fewer frames than ranks."""
        shortest = min(self._loads(1), key=lambda load: load.frames)
        return idle_warning(
            "a video", shortest.frames, ParallelDims(world_size // self.config.parallel.cfg, sp)
        )

    def memory(self, split: ParallelDims) -> int:
        """Estimate the bytes per rank: weights, activations of one block, and pixels; not those in the codec."""
        pipe = self.pipe
        batch_size = min(self.config.batch_size, ceil(len(self.settings) / split.dp))
        pixels = max(one["num_frames"] * one["height"] * one["width"] for one in self.settings)
        weights = tensor_bytes(pipe.transformer, pipe.codec, pipe.prompt_encoder)
        activations = max(
            activation_bytes(load, ParallelDims(split.sp, split.sp)) for load in self._loads(batch_size)
        )
        return weights + activations + batch_size * 3 * 4 * pixels

    def _loads(self, batch_size: int) -> Iterator[Workload]:
        """Yield the load of a batch of each video on the model; guidance on one rank doubles the batch."""
        transformer = self.pipe.transformer
        model = STDiTConfig.read(transformer.config)
        for one in self.settings:
            shape = self.pipe.codec.latent_shape(one["num_frames"], one["height"], one["width"])
            guided = one["guidance_scale"] != 1 or guides_refinement(one)
            rows = batch_size * (2 if guided and self.config.parallel.cfg == 1 else 1)
            yield batch_load(model, shape, rows, element_size=transformer.dtype.itemsize, saved="nothing")
