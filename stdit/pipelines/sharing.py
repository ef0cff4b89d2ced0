"""How many ranks had best share the videos that are asked for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import ceil
from typing import TYPE_CHECKING, Any

from stdit.models.config import STDiTConfig
from stdit.models.size import batch_load, held_bytes
from stdit.parallel.sequence.planner import (
    ParallelDims,
    SpChoice,
    Workload,
    activation_bytes,
    choose_sp,
    divisors,
    idle_warning,
)
from stdit.pipelines.config import SampleConfig

if TYPE_CHECKING:
    from stdit.pipelines.pipeline import STDiTPipeline


@dataclass
class Videos:
    """The videos that a pipeline is to make, and what they take."""

    pipe: "STDiTPipeline"
    settings: Sequence[Mapping[str, Any]]
    """Of each video, complete."""
    config: SampleConfig

    def choice(self, processes: int, memory: int) -> SpChoice:
        """How many of the processes had best share a video, when each may use so many bytes.

        As few as memory allows, but so many that no process is without a video, if the videos have the frames.
        """
        ranks = processes // self.config.parallel.cfg
        degrees = divisors(ranks)
        spread = next(sp for sp in degrees if ranks // sp <= len(self.settings))
        longest = max(load.frames for load in self._loads(1))
        least = min(spread, max(sp for sp in degrees if sp <= longest))
        return choose_sp({sp: self.memory(ParallelDims(ranks, sp)) for sp in degrees if sp >= least}, memory)

    def warnings(self, sp: int, processes: int) -> list[str]:
        """What a user should know about so many ranks that share a video."""
        shortest = min(self._loads(1), key=lambda load: load.frames)
        return idle_warning(
            "a video", shortest.frames, ParallelDims(processes // self.config.parallel.cfg, sp)
        )

    def memory(self, split: ParallelDims) -> int:
        """Estimated bytes of a rank: weights, the activations of a block, and pixels; a codec's own not."""
        pipe = self.pipe
        at_once = min(self.config.batch_size, ceil(len(self.settings) / split.dp))
        pixels = max(one["num_frames"] * one["height"] * one["width"] for one in self.settings)
        weights = held_bytes(pipe.transformer, pipe.codec, pipe.text_encoder)
        activations = max(
            activation_bytes(load, ParallelDims(split.sp, split.sp)) for load in self._loads(at_once)
        )
        return weights + activations + at_once * 3 * 4 * pixels

    def _loads(self, at_once: int) -> Iterator[Workload]:
        """What so many videos of each kind ask of the model; guidance on one rank doubles them."""
        transformer = self.pipe.transformer
        model = STDiTConfig(**{field.name: transformer.config[field.name] for field in fields(STDiTConfig)})
        for one in self.settings:
            shape = self.pipe.codec.latent_shape(one["num_frames"], one["height"], one["width"])
            rows = at_once * (2 if one["guidance_scale"] != 1 and self.config.parallel.cfg == 1 else 1)
            yield batch_load(model, shape, rows, element_size=transformer.dtype.itemsize, saved="nothing")
