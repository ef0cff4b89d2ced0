"""Estimate the memory of each process for a way to share the work, and choose ``parallel.sp`` from it."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from stdit.data.buckets import Bucket
from stdit.models.size import batch_load, tensor_bytes
from stdit.parallel.processes.mesh import check_divides, parallel_dims, runs_on_cpu
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
from stdit.parallel.sequence.sharding import micro_batches
from stdit.training.build import RunInputs
from stdit.training.config import TrainConfig
from stdit.training.weight_memory import BFLOAT16_BYTES, WeightCounts

LIBRARIES = 630 * 2**20
"""Bytes of PyTorch and the other libraries in a process on a CPU, measured with STDiT-S/2."""
GAPS, ROUNDED_GAPS = 0.05, 0.4
"""Shares that lie idle in the heap of a process on a CPU between what is used, of all and of what has 8 or 4 bits;
measured with STDiT-XL/2."""


@dataclass
class MemoryEstimate:
    """Memory of a run, in the process that needs most."""

    inputs: RunInputs

    def of(self, config: TrainConfig) -> "MemoryEstimate":
        """Return an estimate for other settings of ``memory`` and ``lora``, which change no numbers of weights."""
        other = MemoryEstimate(replace(self.inputs, config=config))
        other.counts, other.frozen = self.counts, self.frozen
        return other

    @cached_property
    def counts(self) -> WeightCounts:
        """Numbers of weights of the model."""
        return WeightCounts.of(self.inputs.config)

    @cached_property
    def on_gpu(self) -> bool:
        """Whether the memory is that of a GPU."""
        return not runs_on_cpu(self.inputs.config.trainer.device)

    @cached_property
    def frozen(self) -> int:
        """Bytes of the codec and the text encoder."""
        return tensor_bytes(self.inputs.codec, self.inputs.text_encoder)

    @cached_property
    def buckets(self) -> list[tuple[Bucket, int]]:
        """Buckets that have clips, each with their number."""
        assignment = self.inputs.plan.assignment
        pairs = zip(assignment.buckets, assignment.members, strict=True)
        return [(bucket, len(members)) for bucket, members in pairs if len(members)]

    @cached_property
    def loads(self) -> dict[Bucket, Workload]:
        """Workload of a batch of each bucket."""
        config, trainer = self.inputs.config, self.inputs.config.trainer
        kept = config.memory.block_activations(2 * config.model.depth)
        if not self.on_gpu:  # the memory to which they would be offloaded is this one
            kept = ["keep" if mode == "offload" else mode for mode in kept]
        return {
            bucket: batch_load(
                config.model,
                self.latent_shape(bucket),
                bucket.batch_size,
                element_size=BFLOAT16_BYTES if trainer.precision == "bf16" else FLOAT32_BYTES,
                micro_batch_size=trainer.micro_batch_size,
                saved=tuple(kept),
            )
            for bucket, _ in self.buckets
        }

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        """Return (T, H, W) of the latents of a clip of a bucket."""
        return self.inputs.codec.latent_shape(bucket.num_frames, bucket.height, bucket.width)

    def memory(self, split: ParallelDims, load: Workload | None = None) -> dict[str, int]:
        """Return the most bytes of a process, by what they hold, in a step on a batch; None: the largest one."""
        if load is None:
            load = max(self.loads.values(), key=lambda one: activation_bytes(one, split))
        config, counts = self.inputs.config, self.counts
        held = counts.bytes(config, split.processes, self.on_gpu)
        gradients = held.pop("gradients")
        activations = activation_bytes(load, split) + self._rounded_weights(load)
        if len(micro_batches(split.clips(load), 0, load.micro_batch_size)) == 1:
            gradients = max(0, gradients - activations)  # as the ones come, the others go
        held |= {"activations": activations, "gradients beside them": gradients}
        held["codec and text encoder"] = self.frozen
        if config.data.cache == "memory":
            held["encoded clips"] = self._encoded_clips()
        if not self.on_gpu:
            rounded = counts.rounded_bytes(config)
            held["gaps between them"] = math.ceil(GAPS * sum(held.values()) + ROUNDED_GAPS * rounded)
            held["libraries"] = LIBRARIES
            whole = FLOAT32_BYTES * counts.trained + self.frozen + LIBRARIES
            held["more to build the model"] = max(0, whole - sum(held.values()))
        return {name: size for name, size in held.items() if size}

    def total(self, split: ParallelDims, load: Workload | None = None) -> int:
        """Return the most bytes of a process during a step on a batch; None: the largest one."""
        return sum(self.memory(split, load).values())

    def _rounded_weights(self, load: Workload) -> int:
        """Return the bytes of weights in bf16 that layers save for the backward pass, beside those in fp32."""
        config, counts = self.inputs.config, self.counts
        stored = config.memory.weights if config.lora.rank is None else config.lora.base_dtype
        if config.trainer.precision != "bf16" or stored != "fp32":
            return 0
        kept = [mode == "keep" for mode in load.saved]
        return BFLOAT16_BYTES * counts.weights * sum(kept) // len(kept)

    def _encoded_clips(self) -> int:
        """Return the bytes of the latents that ``data.cache = memory`` keeps."""
        data, codec = self.inputs.config.data, self.inputs.codec
        views = data.augmented_views * (1 + data.flip)
        return sum(
            clips * views * FLOAT32_BYTES * codec.channels * math.prod(self.latent_shape(bucket))
            for bucket, clips in self.buckets
        )

    def valid_sp(self, processes: int) -> list[int]:
        """Return the values of sp for which each of the processes has a part of every batch."""
        smallest = min(bucket.batch_size for bucket in self.inputs.plan.assignment.used_buckets)
        return [sp for sp in divisors(processes) if processes // sp <= smallest]

    def splits(self, processes: int) -> list[ParallelDims]:
        """Return the ways that the settings allow to share the work; one process stands for ``parallel.sp`` of them.

        Raises:
            UserError: if ``parallel.sp`` does not divide the processes.
        """
        sp = self.inputs.config.parallel.sp
        if sp == "auto":
            return [self.split(processes, degree) for degree in self.valid_sp(processes)]
        processes = sp if processes == 1 else processes
        check_divides(self.inputs.config.parallel, {"sp": sp}, processes)
        return [self.split(processes, sp)]

    def split(self, processes: int, sp: int) -> ParallelDims:
        """Return how processes share the work with a value of sp."""
        return parallel_dims(self.inputs.config.parallel, processes, sp, not self.on_gpu)

    def choose_sp(self, processes: int, memory: int) -> SpChoice:
        """Choose ``parallel.sp`` for a number of processes that may each use ``memory`` bytes."""
        degrees = self.valid_sp(processes)
        return choose_sp({sp: self.total(self.split(processes, sp)) for sp in degrees}, memory)

    def warnings(self, split: ParallelDims) -> list[str]:
        """Return how the ranks of a video divide those of each bucket, and warnings about idle ranks."""
        if split.sp == 1:
            return []
        lines = [
            f"parallel.grid of {bucket}: {describe_grid(load, split)}" for bucket, load in self.loads.items()
        ]
        for bucket, load in self.loads.items():
            lines += idle_warning(f"a clip of {bucket}", load, split)
        return lines
