"""What sampling takes before it begins: model calls, bytes that ranks send, and memory; and the choice of sp.

Letters: B videos of a batch, C latent channels, T' H' W' frames, rows and columns of the latents.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import ceil, prod
from sys import maxsize
from typing import TYPE_CHECKING, Any, NamedTuple

from stdit.codecs.tiling import TilePlan, best_plan, sent_bytes, tiled_bytes
from stdit.models.broadcast import Ranges
from stdit.models.config import STDiTConfig
from stdit.models.size import batch_load, tensor_bytes
from stdit.parallel.processes.mesh import parallel_dims
from stdit.parallel.sequence.planner import (
    FLOAT32_BYTES,
    ParallelDims,
    SpChoice,
    Workload,
    activation_bytes,
    choose_sp,
    describe_grid,
    divisors,
    idle_warning,
)
from stdit.parallel.sequence.traffic import Reused, sent_for_a_clip
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.requests import Request
from stdit.pipelines.runner import batches_of
from stdit.pipelines.schedule import Schedule
from stdit.pipelines.segments import Segments
from stdit.pipelines.steps import attention_broadcast, reused_parts

if TYPE_CHECKING:
    from stdit.pipelines.pipeline import STDiTPipeline

DOUBLE_BYTES = 8
MOMENTS_BYTES = 3 * DOUBLE_BYTES
"""Count, sum and sum of squares of a video's velocity."""
RGB_BYTES = 3 * FLOAT32_BYTES
"""Of a pixel."""
PIXEL_COPIES = 3
"""Copies of the pixels of a batch while finished videos become frames, measured on a CPU."""
LATENT_COPIES = 12
"""Copies of the latents of a batch that the steps hold, at most: noise, sample, velocities, those of a solver."""
SAMPLING_LIBRARIES = 540 * 2**20
"""Bytes of PyTorch and the other libraries in a process on a CPU, measured with the model that comes with stdit."""


@dataclass(frozen=True)
class Videos:
    """Videos with equal settings, segments and adapters: they share batches."""

    settings: dict[str, Any]
    """All of a pipeline call."""
    segments: Segments
    requests: tuple[Request, ...]

    @property
    def size(self) -> str:
        """Frames, height and width of a segment."""
        return "x".join(str(int(self.settings[name])) for name in ("num_frames", "height", "width"))


class SentBytes(NamedTuple):
    """Bytes that one rank sends for a video, all its segments together, if no step is skipped."""

    steps: list[int]
    """In each step of a segment."""
    refinement: int
    """Of a segment."""
    decoding: int
    """To decode a segment."""
    segments: int = 1

    @property
    def total(self) -> int:
        """For the whole video."""
        return self.segments * (sum(self.steps) + self.refinement + self.decoding)


@dataclass
class SamplingWorkload:
    """The videos that a pipeline will generate, and what they take. The pipeline's weights are not used."""

    pipe: "STDiTPipeline"
    requests: Sequence[Request]
    config: SampleConfig
    other_weights: Mapping[str, int] = field(default_factory=dict)
    """Bytes of weights that the pipeline does not hold yet, by what they are."""
    memory_of_process: int = maxsize
    """Bytes that a process may use, on which it may depend how videos are decoded."""
    _known: dict[str, Any] = field(default_factory=dict)

    @property
    def videos(self) -> list[Videos]:
        """The requests, grouped by what they have in common."""
        if "videos" not in self._known:
            self._known["videos"] = list(self._grouped())
        found: list[Videos] = self._known["videos"]
        return found

    def _grouped(self) -> Iterator[Videos]:
        groups: dict[str, list[Request]] = {}
        for request in self.requests:
            groups.setdefault(str(request.shared()), []).append(request)
        for first, *others in groups.values():
            settings = first.settings.resolved(self.pipe.config)
            segments = first.segments.resolved(int(settings["num_frames"]), self.pipe.codec)
            yield Videos(settings, segments, (first, *others))

    def choose_sp(self, world_size: int, memory: int) -> SpChoice:
        """Choose how many ranks share a video if each has ``memory`` bytes.

        As few as memory allows, but enough that no rank is without a video.
        """
        ranks = world_size // self.config.parallel.cfg
        degrees = divisors(ranks)
        spread = next(sp for sp in degrees if ranks // sp <= len(self.requests))
        return choose_sp(
            {sp: self.total(self.split(world_size, sp)) for sp in degrees if sp >= spread}, memory
        )

    def split(self, world_size: int, sp: int) -> ParallelDims:
        """Return how processes share the work with a value of sp; those for a half of guidance count once."""
        ranks = world_size // self.config.parallel.cfg
        return parallel_dims(self.config.parallel, ranks, sp, self.on_cpu)

    @property
    def on_cpu(self) -> bool:
        """Whether the processes compute on CPUs."""
        return self.pipe.mesh.device.type == "cpu"

    def grid_lines(self, sp: int, world_size: int) -> list[str]:
        """Return how the ranks of a video divide those of each size, and warnings about idle ranks."""
        if sp == 1:
            return []
        split = self.split(world_size, sp)
        lines: dict[str, None] = {}
        for one in self.videos:
            load, dims = self.load(one, split), _of_a_video(one, split)
            lines[f"parallel.grid of {one.size}: {describe_grid(load, dims)}"] = None
            lines |= dict.fromkeys(idle_warning(f"a video of {one.size}", load, dims))
        return list(lines)

    def batches(self, videos: Videos, split: ParallelDims) -> list[list[Request]]:
        """Return the batches in which these videos are made."""
        batch_size, first = self.config.batch_size, videos.requests[0].shared()
        key = f"batches {batch_size} {split.dp}"
        if key not in self._known:
            self._known[key] = batches_of(self.requests, batch_size, split.dp)
        return [batch for batch in self._known[key] if batch[0].shared() == first]

    def batch_size(self, videos: Videos, split: ParallelDims) -> int:
        """Return how many of the videos a group of ranks makes at once, at most."""
        return max(map(len, self.batches(videos, split)))

    def latent_shape(self, videos: Videos) -> tuple[int, int, int]:
        """Return (T', H', W') of the latents of a segment."""
        frames, height, width = (int(videos.settings[name]) for name in ("num_frames", "height", "width"))
        return self.pipe.codec.latent_shape(frames, height, width)

    def schedule(self, videos: Videos) -> Schedule:
        """Return the steps of a segment."""
        key = f"steps {videos.settings}"
        if key not in self._known:
            pipe, takes = self.pipe, self.pipe.transformer.config.guidance_range
            scheduler = deepcopy(pipe.scheduler)
            self._known[key] = Schedule.of(
                videos.settings, self.latent_shape(videos)[0], pipe.flow, scheduler, takes
            )
        schedule: Schedule = self._known[key]
        return schedule

    def rows(self, videos: Videos, split: ParallelDims) -> int:
        """Return the rows of a batch in the model: guidance on one rank doubles them."""
        doubled = self.schedule(videos).guided and self.config.parallel.cfg == 1
        return self.batch_size(videos, split) * (2 if doubled else 1)

    def load(self, videos: Videos, split: ParallelDims) -> Workload:
        """Return the work of a model call with a batch."""
        transformer = self.pipe.transformer
        return batch_load(
            STDiTConfig.read(transformer.config),
            self.latent_shape(videos),
            self.rows(videos, split),
            element_size=transformer.dtype.itemsize,
            saved="nothing",
        )

    def reused(self, videos: Videos) -> Iterator[Reused]:
        """Yield what attention each step uses again, by the letters of the blocks."""
        schedule, settings = self.schedule(videos), videos.settings
        timesteps = schedule.timesteps
        if not settings["pab"]:
            yield from ({} for _ in timesteps)
            return
        broadcast = attention_broadcast(settings["pab"], settings["pab_timesteps"], timesteps)
        halves = [schedule.halves(scale) for scale in schedule.scales]
        yield from reused_parts(broadcast, timesteps, halves, self.pipe.transformer.kinds)

    def sent(self, videos: Videos, split: ParallelDims, rank: int = 0) -> SentBytes:
        """Return exactly what one rank of ``sp`` sends to those that share its videos, for each of a full batch."""
        schedule, load, cfg = self.schedule(videos), self.load(videos, split), self.config.parallel.cfg
        dims = _of_a_video(videos, split)
        other_rows = dims.grid_of(load).time - 1
        latents = self._latent_bytes(videos, load, dims, rank)
        of_call: dict[str, int] = {}

        def step(scale: float, dims: ParallelDims, reused: Reused) -> int:
            key = f"{dims.keeps_attention} {reused}"
            if key not in of_call:
                of_call[key] = 0 if dims.sp == 1 else sent_for_a_clip(load, dims, rank, reused).forward
            halves = schedule.halves(scale)
            if halves == 1:
                return of_call[key]
            rescaling = 2 * MOMENTS_BYTES * other_rows if videos.settings["guidance_rescale"] else 0
            return of_call[key] * 2 // cfg + (cfg - 1) * latents + rescaling

        errors = 2 * DOUBLE_BYTES * (other_rows + cfg - 1) if schedule.caches else 0
        steps = [
            step(scale, dims, reused) + errors * schedule.halves(scale)
            for scale, reused in zip(schedule.scales, self.reused(videos), strict=True)
        ]
        whole = replace(dims, keeps_attention=False)
        refinement = sum(step(scale, whole, {}) for scale in schedule.refinement)
        plan = self.tiles(videos, split)
        if plan.whole and self.pipe.decodes_alone:
            frames = self._frames_of(videos, load, dims, rank) * self.pipe.codec.stride[0]
            decoding = other_rows * frames * _frame_bytes(videos)
        else:
            tiles = 0 if plan.whole else sent_bytes(plan, dims.sp, cfg, rank)
            decoding = other_rows * latents + tiles
        return SentBytes(steps, refinement, decoding, videos.segments.count)

    def _frames_of(self, videos: Videos, load: Workload, dims: ParallelDims, rank: int) -> int:
        """Return the latent frames of a rank's row."""
        frames, of_token = self.latent_shape(videos)[0], self.pipe.transformer.config.patch_size[0]
        begin, end = dims.grid_of(load).rows(load.frames)[rank]
        return min(end * of_token, frames) - min(begin * of_token, frames)

    def _latent_bytes(self, videos: Videos, load: Workload, dims: ParallelDims, rank: int = 0) -> int:
        """Return the bytes of a rank's latents of a video."""
        values = self.pipe.codec.channels * prod(self.latent_shape(videos)[1:])
        return FLOAT32_BYTES * values * self._frames_of(videos, load, dims, rank)

    def total(self, split: ParallelDims) -> int:
        """Estimate the most bytes that a process holds."""
        return sum(self.memory(split).values())

    def memory(self, split: ParallelDims) -> dict[str, int]:
        """Estimate the most bytes of a process, by what they hold when these are most: in the steps, or decoding."""
        phases = [
            phase
            for one in self.videos
            for phase in (self.in_steps(one, split), self.in_decoding(one, split))
        ]
        return self.weights() | max(phases, key=lambda held: sum(held.values()))

    def weights(self) -> dict[str, int]:
        """Return the bytes of weights, and of libraries, that a process holds all the time."""
        pipe = self.pipe
        held = {"transformer": tensor_bytes(pipe.transformer), "codec": tensor_bytes(pipe.codec)}
        if pipe.text_encoder is not None:
            held["text encoder"] = tensor_bytes(pipe.prompt_encoder)
        return held | dict(self.other_weights) | ({"libraries": SAMPLING_LIBRARIES} if self.on_cpu else {})

    def in_steps(self, videos: Videos, split: ParallelDims) -> dict[str, int]:
        """Return the bytes that a batch takes in the steps, by what they hold."""
        load, dims = self.load(videos, split), _of_a_video(videos, split)
        batch, halves = self.batch_size(videos, split), 2 if self.schedule(videos).guided else 1
        whole = FLOAT32_BYTES * self.pipe.codec.channels * prod(self.latent_shape(videos))
        model = self.pipe.transformer.config
        text = load.clips * model.model_max_length * model.caption_channels * FLOAT32_BYTES
        own = self._latent_bytes(videos, load, dims)
        # Two velocities of each half, and another.
        histories = 3 * halves if self.schedule(videos).caches else 0
        held = {
            "activations": activation_bytes(load, dims),
            "attention for later steps": self._kept_bytes(videos, load, split),
            "velocities for the cache": batch * histories * own,
            "latents and text": text + batch * (2 * whole + LATENT_COPIES * own),
            "earlier segments": (videos.segments.count - 1) * batch * _pixel_bytes(videos),
        }
        return {name: size for name, size in held.items() if size}

    def in_decoding(self, videos: Videos, split: ParallelDims) -> dict[str, int]:
        """Return the bytes that a batch takes while its latents are decoded, one video after the other."""
        batch, decoding = self.batch_size(videos, split), self.decoding(videos, split)
        pixels, latents = _pixel_bytes(videos), FLOAT32_BYTES * prod(self.latent_shape(videos))
        frames = (batch - 1) * pixels
        finished = max(0, PIXEL_COPIES * batch * pixels - frames - decoding)
        held = {
            "decoding": decoding,
            "videos": frames + finished,
            "latents": 2 * batch * self.pipe.codec.channels * latents,
            "earlier segments": (videos.segments.count - 1) * batch * pixels,
        }
        return {name: size for name, size in held.items() if size}

    def decoding(self, videos: Videos, split: ParallelDims) -> int:
        """Return the bytes that a rank takes to decode its part of a video."""
        plan = self.tiles(videos, split)
        if not (plan.whole and self.pipe.decodes_alone):
            return tiled_bytes(self.pipe.codec, plan)
        frames = self._frames_of(videos, self.load(videos, split), _of_a_video(videos, split), 0)
        return self.pipe.codec.decoding_bytes((frames, *self.latent_shape(videos)[1:]))

    def tiles(self, videos: Videos, split: ParallelDims) -> TilePlan:
        """Return the tiles in which a video is decoded, in what memory the weights and the decoded videos leave."""
        size = [int(videos.settings[name]) for name in ("num_frames", "height", "width")]
        others = (self.batch_size(videos, split) - 1) * _pixel_bytes(videos)
        memory = self.memory_of_process - sum(self.weights().values()) - others
        tile = self.config.codec.tile
        key = f"tiles {tile} {size} {memory}"
        if key not in self._known:
            self._known[key] = best_plan(tile, self.pipe.codec, self.latent_shape(videos), size, memory)
        found: TilePlan = self._known[key]
        return found

    def _kept_bytes(self, videos: Videos, load: Workload, split: ParallelDims) -> int:
        """Return the bytes of attention that later steps use again: one output of a block each."""
        if not videos.settings["pab"]:
            return 0
        ranges = Ranges(*videos.settings["pab"])
        kept = sum(
            steps > 1 and (part != "cross" or block.cross_attn is not None)
            for block in self.pipe.transformer.blocks
            for part, steps in ranges.of_parts(block.kind).items()
        )
        tokens = ceil(load.frames * load.patches / split.sp)
        return kept * load.clips * tokens * load.width * load.element_size


def _of_a_video(videos: Videos, split: ParallelDims) -> ParallelDims:
    """Return the ranks that share a batch."""
    return replace(split, processes=split.sp, keeps_attention=bool(videos.settings["pab"]))


def _frame_bytes(videos: Videos) -> int:
    """Return the bytes of the pixels of a frame."""
    return RGB_BYTES * int(videos.settings["height"]) * int(videos.settings["width"])


def _pixel_bytes(videos: Videos) -> int:
    """Return the bytes of the pixels of a segment."""
    return int(videos.settings["num_frames"]) * _frame_bytes(videos)
