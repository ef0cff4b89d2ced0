"""What a run will train on, and what it takes: printed before it starts."""

import math
from collections.abc import Sequence

from stdit.data.buckets import Bucket
from stdit.training.build import Parts
from stdit.training.optim import split_parameters

FLOAT = 4
MIB = 2**20


def tokens(latent_shape: Sequence[int], patch_size: Sequence[int]) -> int:
    """Tokens of latents of (T, H, W), which are padded to whole patches."""
    return math.prod(math.ceil(size / patch) for size, patch in zip(latent_shape, patch_size, strict=True))


def latent_shape(parts: Parts, bucket: Bucket) -> tuple[int, int, int]:
    """(T, H, W) of the latents of a bucket's clips."""
    return parts.codec.latent_shape(bucket.num_frames, bucket.height, bucket.width)


def clip_tokens(parts: Parts, bucket: Bucket) -> int:
    """Tokens of one clip of a bucket."""
    return tokens(latent_shape(parts, bucket), parts.config.model.patch_size)


def trained_buckets(parts: Parts) -> list[tuple[Bucket, int]]:
    """Buckets that have clips, with their number."""
    assignment = parts.plan.assignment
    pairs = zip(assignment.buckets, assignment.members, strict=True)
    return [(bucket, len(members)) for bucket, members in pairs if len(members)]


def memory(parts: Parts) -> dict[str, float]:
    """Estimated bytes of a run by what they hold.

    Activations after Korthikanti et al. 2022 (arXiv:2205.05198, equation 2, without the attention matrix,
    which SDPA does not keep): 34 bytes for each token, block and unit of width at 16 bits, here 8 more for
    cross-attention, and as much again at 32 bits.
    """
    config = parts.config
    named = {name: p.numel() for name, p in parts.model.named_parameters()}
    total = sum(named.values())
    in_muon = (
        sum(named[name] for name in split_parameters(parts.model)[0])
        if config.optimizer.name == "muon"
        else 0
    )
    micro = config.trainer.micro_batch_size
    most_tokens = max(
        clip_tokens(parts, bucket) * min(micro or bucket.batch_size, bucket.batch_size)
        for bucket, _ in trained_buckets(parts)
    )
    width, blocks = config.model.hidden_size, 2 * config.model.depth
    per_token_and_block = (34 + 8) * width * (1 if config.trainer.precision == "bf16" else 2)
    if config.trainer.activation_checkpointing:
        activations = most_tokens * (blocks * width * FLOAT + per_token_and_block)
    else:
        activations = most_tokens * blocks * per_token_and_block
    estimate = {
        "weights": total * FLOAT,
        "gradients": total * FLOAT,
        "optimizer": (2 * (total - in_muon) + in_muon) * FLOAT,
        "averaged weights": total * FLOAT,
        "activations": activations,
        "codec and text encoder": sum(
            t.numel() * t.element_size()
            for module in (parts.codec, parts.text_encoder)
            for t in module.state_dict().values()
        ),
    }
    if config.data.cache == "memory":
        estimate["encoded clips"] = sum(
            clips * FLOAT * parts.codec.channels * math.prod(latent_shape(parts, bucket))
            for bucket, clips in trained_buckets(parts)
        )
    return estimate


def report(parts: Parts) -> str:
    """Model, batches, clips and memory, for people."""
    config = parts.config
    count = sum(p.numel() for p in parts.model.parameters())
    lines = [
        f"model: {count:,} parameters ({config.model.depth} x 2 blocks, width {config.model.hidden_size})",
        f"data: {parts.plan.assignment.kept} clips",
        parts.plan.report(),
        "",
        *_batch_lines(parts),
        f"steps: {config.trainer.steps}, {config.trainer.steps / parts.plan.steps_per_epoch:.1f} epochs of "
        f"{parts.plan.steps_per_epoch}",
        "",
        *_memory_lines(memory(parts)),
        f"run folder: {config.run_folder}",
    ]
    return "\n".join(lines)


def _batch_lines(parts: Parts) -> list[str]:
    lines = []
    for bucket, _ in trained_buckets(parts):
        micro = min(parts.config.trainer.micro_batch_size or bucket.batch_size, bucket.batch_size)
        each = clip_tokens(parts, bucket)
        latents = "x".join(map(str, (parts.codec.channels, *latent_shape(parts, bucket))))
        passes = math.ceil(bucket.batch_size / micro)
        lines.append(
            f"batch of {bucket}: {bucket.batch_size} clips ({passes} x {micro}), "
            f"latents {latents}, {each:,} tokens a clip, {each * bucket.batch_size:,} a step"
        )
    return lines


def _memory_lines(estimate: dict[str, float]) -> list[str]:
    total = sum(estimate.values())
    parts = ", ".join(f"{name} {math.ceil(size / MIB):,}" for name, size in estimate.items())
    return [f"memory: about {math.ceil(total / MIB):,} MiB (an estimate): {parts}"]


def start_line(parts: Parts) -> str:
    """One line that says what begins."""
    count = sum(p.numel() for p in parts.model.parameters())
    return f"{parts.config.run_folder}: {count:,} parameters, {parts.plan.assignment.kept} clips"
