"""Estimate the memory of each process for a way to share the work, and choose ``parallel.sp`` from it."""

import math
from dataclasses import dataclass
from functools import cached_property

from stdit.data.buckets import Bucket
from stdit.models.size import batch_load, tensor_bytes
from stdit.parallel.sequence.planner import (
    FLOAT32_BYTES,
    ParallelDims,
    SpChoice,
    Workload,
    activation_bytes,
    choose_sp,
    divisors,
    idle_warning,
)
from stdit.training.build import ModelSize, RunInputs


@dataclass
class MemoryEstimate:
    """Memory of a run, in the process that needs most."""

    inputs: RunInputs

    @cached_property
    def size(self) -> ModelSize:
        """Number of parameters of the model."""
        return ModelSize.of(self.inputs.config)

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
        trainer = self.inputs.config.trainer
        return {
            bucket: batch_load(
                self.inputs.config.model,
                self.latent_shape(bucket),
                bucket.batch_size,
                element_size=2 if trainer.precision == "bf16" else FLOAT32_BYTES,
                micro_batch_size=trainer.micro_batch_size,
                saved="inputs" if trainer.activation_checkpointing else "blocks",
            )
            for bucket, _ in self.buckets
        }

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int]:
        """Return (T, H, W) of the latents of a clip of a bucket."""
        return self.inputs.codec.latent_shape(bucket.num_frames, bucket.height, bucket.width)

    def constant_bytes(self, split: ParallelDims) -> dict[str, int]:
        """Return the bytes that a process always needs, by what they hold."""
        config = self.inputs.config
        estimate = {
            "weights, gradients, optimizer, average": self.size.state_bytes(
                split.processes, config.parallel.shard_parameters
            ),
            "codec and text encoder": self.frozen,
        }
        if config.trainer.precision == "bf16" and not config.trainer.activation_checkpointing:
            estimate["weights in bf16"] = 2 * self.size.parameters  # saved by layers for the backward pass
        if config.data.cache == "memory":
            views = config.data.augmented_views * (1 + config.data.flip)
            estimate["encoded clips"] = sum(
                clips
                * views
                * FLOAT32_BYTES
                * self.inputs.codec.channels
                * math.prod(self.latent_shape(bucket))
                for bucket, clips in self.buckets
            )
        return estimate

    def total(self, load: Workload, split: ParallelDims) -> int:
        """Return the bytes of a process during a step on a batch."""
        return sum(self.constant_bytes(split).values()) + activation_bytes(load, split)

    def memory(self, split: ParallelDims) -> dict[str, int]:
        """Return the bytes of a process, by what they hold, for the batch that needs most."""
        return {
            **self.constant_bytes(split),
            "activations": max(activation_bytes(load, split) for load in self.loads.values()),
        }

    def valid_sp(self, processes: int) -> list[int]:
        """Return the values of sp for which each of the processes has a part of every batch."""
        smallest = min(bucket.batch_size for bucket in self.inputs.plan.assignment.used_buckets)
        return [sp for sp in divisors(processes) if processes // sp <= smallest]

    def choose_sp(self, processes: int, memory: int) -> SpChoice:
        """Choose ``parallel.sp`` for a number of processes that may each use ``memory`` bytes."""
        degrees = self.valid_sp(processes)
        return choose_sp(
            {sp: sum(self.memory(ParallelDims(processes, sp)).values()) for sp in degrees}, memory
        )

    def warnings(self, split: ParallelDims) -> list[str]:
        """Return warnings about ranks that would be idle."""
        bucket, load = min(self.loads.items(), key=lambda item: item[1].frames)
        return idle_warning(f"a clip of {bucket}", load.frames, split)
