"""Memory of sampling, and the number of sequence-parallel ranks that it needs (``--parallel.sp auto``)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

from stdit.models.broadcast import Ranges
from stdit.models.config import STDiTConfig
from stdit.models.size import batch_load, tensor_bytes
from stdit.parallel.processes.mesh import parallel_dims
from stdit.parallel.sequence.planner import (
    ParallelDims,
    SpChoice,
    Workload,
    activation_bytes,
    choose_sp,
    describe_grid,
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

        As few as memory allows, but enough that no rank is without a video.
        """
        ranks = world_size // self.config.parallel.cfg
        degrees = divisors(ranks)
        spread = next(sp for sp in degrees if ranks // sp <= len(self.settings))
        return choose_sp({sp: self.memory(self._split(ranks, sp)) for sp in degrees if sp >= spread}, memory)

    def _split(self, ranks: int, sp: int) -> ParallelDims:
        return parallel_dims(self.config.parallel, ranks, sp, self.pipe.mesh.device.type == "cpu")

    def grid_lines(self, sp: int, world_size: int) -> list[str]:
        """Return how the ranks of a video divide those of each size, and warnings about idle ranks."""
        if sp == 1:
            return []
        split = self._split(world_size // self.config.parallel.cfg, sp)
        alone = replace(split, processes=sp)
        lines: dict[str, None] = {}
        for one, load in zip(self.settings, self._loads(self._batch_size(split)), strict=True):
            size = f"{one['num_frames']}x{one['height']}x{one['width']}"
            lines[f"parallel.grid of {size}: {describe_grid(load, alone)}"] = None
            lines |= dict.fromkeys(idle_warning(f"a video of {size}", load, alone))
        return list(lines)

    def memory(self, split: ParallelDims) -> int:
        """Estimate the bytes per rank: weights, activations of one block, and pixels; not those in the codec."""
        pipe = self.pipe
        batch_size = self._batch_size(split)
        pixels = max(one["num_frames"] * one["height"] * one["width"] for one in self.settings)
        weights = tensor_bytes(pipe.transformer, pipe.codec, pipe.prompt_encoder)
        activations = max(
            activation_bytes(load, replace(split, processes=split.sp)) + self._kept_bytes(one, load, split)
            for one, load in zip(self.settings, self._loads(batch_size), strict=True)
        )
        return weights + activations + batch_size * 3 * 4 * pixels

    def _kept_bytes(self, settings: Mapping[str, Any], load: Workload, split: ParallelDims) -> int:
        """Return the bytes of attention that later steps use again: one output of a block each."""
        if not settings["pab"]:
            return 0
        ranges = Ranges(*settings["pab"])
        kept = sum(
            steps > 1 and (part != "cross" or block.cross_attn is not None)
            for block in self.pipe.transformer.blocks
            for part, steps in ranges.of_parts(block.kind).items()
        )
        tokens = ceil(load.frames * load.patches / split.sp)
        return kept * load.clips * tokens * load.width * load.element_size

    def _batch_size(self, split: ParallelDims) -> int:
        """Return how many videos a group of ranks makes at once."""
        return min(self.config.batch_size, ceil(len(self.settings) / split.dp))

    def _loads(self, batch_size: int) -> Iterator[Workload]:
        """Yield the load of a batch of each video on the model; guidance on one rank doubles the batch."""
        transformer = self.pipe.transformer
        model = STDiTConfig.read(transformer.config)
        for one in self.settings:
            shape = self.pipe.codec.latent_shape(one["num_frames"], one["height"], one["width"])
            guided = model.guidance_range is None and (one["guidance_scale"] != 1 or guides_refinement(one))
            rows = batch_size * (2 if guided and self.config.parallel.cfg == 1 else 1)
            yield batch_load(model, shape, rows, element_size=transformer.dtype.itemsize, saved="nothing")
