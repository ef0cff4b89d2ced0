"""Validation loss: at fixed noise levels, with fixed noise, on fixed clips.

The training loss varies from step to step with its noise levels and clips; the validation loss changes only with the
weights. It is measured with the averaged weights, for each bucket, at quantiles of the distribution of noise levels
that is trained.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from stdit.data.assignment import Assignment
from stdit.data.batch import EncodedBatch
from stdit.data.buckets import Bucket
from stdit.data.build import build_plan
from stdit.data.cache.keys import remembered
from stdit.data.clip_tensors import middle_window, to_video
from stdit.data.decoding.decode import DecodeError
from stdit.diffusion.draws import TrainingDraws, sample_generator
from stdit.diffusion.flow import FlowObjective
from stdit.errors import UserError
from stdit.parallel.processes.mesh import Mesh
from stdit.training.build import RunInputs
from stdit.training.trainer import Trainer

NOISE_STREAM = 0x76616C69
"""Takes the place of the step in the seed of the noise; no run has this many steps."""


@dataclass(frozen=True)
class ValidationRow:
    """One clip at one noise level."""

    clip: int
    """Number of the clip within the bucket."""
    level: int
    """Number of the quantile."""
    weight: float = 1.0
    """0 for a row that only fills up the last batch."""


def validation_rows(clips: int, levels: int, batch_size: int) -> Iterator[tuple[ValidationRow, ...]]:
    """Yield batches of every clip at every level; all are full."""
    rows = [ValidationRow(clip, level) for clip in range(clips) for level in range(levels)]
    rows += [replace(rows[0], weight=0.0)] * (-len(rows) % batch_size)
    for start in range(0, len(rows), batch_size):
        yield tuple(rows[start : start + batch_size])


def level_quantiles(levels: int) -> list[float]:
    """Return the midpoints of ``levels`` equal parts of [0, 1]."""
    return [(level + 0.5) / levels for level in range(levels)]


def fixed_draws(
    flow: FlowObjective,
    seed: int,
    rows: Sequence[ValidationRow],
    levels: int,
    latent_shape: tuple[int, int, int, int],
    height: int,
    width: int,
) -> TrainingDraws:
    """Return noise that depends on the clip alone, and each row's level; no conditioning frames, no dropped captions.

    Args:
        latent_shape: (C, T, H, W) of one sample.
        height: pixels, for the shift by size; likewise ``width``.
    """
    frames = latent_shape[1]
    at = [flow.t_at_quantile(quantile, frames, height, width) for quantile in level_quantiles(levels)]
    noise = [
        torch.randn(latent_shape, generator=sample_generator(seed, NOISE_STREAM, row.clip)) for row in rows
    ]
    t = torch.stack([at[row.level] for row in rows])[:, None]
    return TrainingDraws(
        t.expand(-1, frames) if flow.config.conditioning else t,
        torch.stack(noise),
        torch.zeros(len(rows), frames, dtype=torch.bool),
        torch.zeros(len(rows), dtype=torch.bool),
        torch.full((len(rows),), 0.5),
    )


@torch.no_grad()
def losses_by_level(
    trainer: Trainer, batches: Sequence[tuple[tuple[ValidationRow, ...], EncodedBatch]], levels: int
) -> list[float]:
    """Return the mean loss at each quantile over the clips of a bucket, the same on every rank; all must call this.

    Args:
        batches: rows of the global batch, with this rank's part of it, as `Trainer.step` takes it.
    """
    mesh, totals, weights = trainer.mesh, torch.zeros(levels), torch.zeros(levels)
    for rows, batch in batches:
        weights.index_add_(0, *_by_level(rows))
        mine = [rows[row] for row in mesh.sample_range(len(rows))]
        size = (int(batch.height[0]), int(batch.width[0]))
        for part, counts in mesh.micro_batches(len(rows), trainer.micro_batch_size(len(rows))):
            shape = tuple(batch.latents.shape[1:])
            draws = fixed_draws(trainer.flow, trainer.seed, mine[part], levels, shape, *size)  # type: ignore[arg-type]
            losses = trainer.sample_losses(batch.rows(part), draws).cpu()
            level, weight = _by_level(mine[part])
            totals.index_add_(0, level, losses * weight * counts)
    sums = (
        mesh.all_reduce_mean(totals.to(mesh.device)).cpu() * mesh.world_size
    )  # a rank has a part of the clips, or of their frames
    return (sums / weights).tolist()


def _by_level(rows: Sequence[ValidationRow]) -> tuple[Tensor, Tensor]:
    return torch.tensor([row.level for row in rows]), torch.tensor([row.weight for row in rows])


class ValidationLoss:
    """Clips that are read and encoded once, and the loss on them."""

    def __init__(self, inputs: RunInputs, mesh: Mesh) -> None:
        """Choose the clips; they are read at the first measurement.

        Raises:
            UserError: if there are none, or the text encoder does not know their captions.
        """
        config = inputs.config
        self.config, self.inputs, self.mesh = config.validation, inputs, mesh
        self.assignment = inputs.plan.assignment
        if self.config.loss_manifest is not None:
            data = config.data.with_manifest(self.config.loss_manifest)
            self.assignment = build_plan(data, config.seed, known=remembered(data)).assignment
        self.chosen = mesh.on_main(lambda: readable_clips(self.assignment, self.config.loss_clips))
        captions = [self.assignment.clips[index].text for index in chain.from_iterable(self.chosen)]
        inputs.text_encoder.check(captions)
        self._encoded: dict[int, list[tuple[tuple[ValidationRow, ...], EncodedBatch]]] = {}

    def __str__(self) -> str:
        where = self.config.loss_manifest or "the training data, since validation.loss_manifest is not set"
        return f"validation loss on {sum(map(len, self.chosen))} clips of {where}"

    def measure(self, trainer: Trainer) -> dict[str, Any]:
        """Return ``validation_loss``, over all clips and levels, and ``validation``, by bucket and quantile."""
        levels, found, count = self.config.loss_levels, {}, 0
        with trainer.ema.applied(trainer.model):
            for place, clips in enumerate(self.chosen):
                if clips:
                    losses = losses_by_level(trainer, self._batches(place), levels)
                    found[str(self.assignment.buckets[place])] = losses
                    count += len(clips)
        sizes = [len(clips) for clips in self.chosen if clips]
        total = sum(sum(losses) * size for losses, size in zip(found.values(), sizes, strict=True))
        named = {
            bucket: {
                f"{quantile:.3g}": round(loss, 7)
                for quantile, loss in zip(level_quantiles(levels), losses, strict=True)
            }
            for bucket, losses in found.items()
        }
        return {"validation_loss": round(total / (levels * count), 7), "validation": named}

    def _batches(self, place: int) -> list[tuple[tuple[ValidationRow, ...], EncodedBatch]]:
        """Return this rank's parts of the batches of a bucket, encoded at the first call."""
        if place not in self._encoded:
            bucket, clips = self.assignment.buckets[place], self.chosen[place]
            rows = validation_rows(len(clips), self.config.loss_levels, bucket.batch_size)
            self._encoded[place] = self.mesh.on_all_ranks(
                lambda: [(batch, self._batch(bucket, clips, batch)) for batch in rows]
            )
        return self._encoded[place]

    @torch.no_grad()
    def _batch(self, bucket: Bucket, clips: Sequence[int], rows: Sequence[ValidationRow]) -> EncodedBatch:
        own = [clips[rows[row].clip] for row in self.mesh.sample_range(len(rows))]
        latents: dict[int, Tensor] = {}
        for index in dict.fromkeys(own):
            video = to_video(middle_window(self.assignment.clips[index], bucket)[None]).to(self.mesh.device)
            latents[index] = self.inputs.codec.encode(video).float().cpu()
        captions = [self.assignment.clips[index].text for index in own]
        states, mask = self.inputs.text_encoder.encode(captions)
        return EncodedBatch(
            step=0,
            batch_size=len(rows),
            captions=captions,
            clip_indices=torch.tensor(own),
            fps=torch.full((len(own),), float(bucket.fps)),
            height=torch.full((len(own),), float(bucket.height)),
            width=torch.full((len(own),), float(bucket.width)),
            latents=torch.cat([latents[index] for index in own]),
            text_states=states.cpu(),
            text_mask=mask.cpu(),
        )


def readable_clips(assignment: Assignment, limit: int) -> list[list[int]]:
    """Return the first ``limit`` readable clips of each bucket, but for those of data.regularisation.

    Raises UserError if there are none.
    """
    chosen: list[list[int]] = []
    for bucket, members in zip(assignment.buckets, assignment.members, strict=True):
        chosen.append([])
        for index in members[~assignment.is_regularisation(members)].tolist():
            if len(chosen[-1]) == limit:
                break
            try:
                middle_window(assignment.clips[index], bucket)
            except DecodeError:
                continue
            chosen[-1].append(index)
    if not any(chosen):
        raise UserError(
            "validation.loss_manifest: none of its clips can be read: repair them, or leave it out"
        )
    return chosen


def validation_loss_of(inputs: RunInputs, mesh: Mesh) -> ValidationLoss | None:
    """Return the validation loss, or None if `validation.loss_every` is not set; every rank must call this."""
    return None if inputs.config.validation.loss_every is None else ValidationLoss(inputs, mesh)
