"""Few-step students by distribution matching, after DMD2 (Yin et al. 2024, arXiv:2405.14867), without its GAN loss.

Three models take part. The student makes a video in a few Euler steps. The teacher's guided velocity says where noisy
videos should go; the *score*, a model that is trained on the student's videos, says where those of the student go.
The student moves its videos by the difference, so that in the end both have the same distribution.

Letters: B samples, C channels, T frames, T_n those of this rank, H, W latent rows and columns, F = T or 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from xxhash import xxh3_64_intdigest

from stdit.data.batch import EncodedBatch
from stdit.diffusion.draws import TrainingDraws, sample_generator
from stdit.diffusion.flow import FlowObjective, frame_loss, frame_weights, per_frame
from stdit.diffusion.scheduler import RectifiedFlow
from stdit.errors import UserError
from stdit.parallel.sequence.sharding import TokenSharding
from stdit.training.distillation import GuidanceDistillation, GuidanceTeacher
from stdit.training.flow_matching import StepInputs

if TYPE_CHECKING:
    from stdit.training.trainer import Trainer

START_STREAM = 0x73746172
"""Number of the generators of the noise that videos begin with."""
SMALLEST_CHANGE = 1e-6
"""Smallest mean change of a frame by the teacher that a direction is divided by."""


def score_seed(seed: int) -> int:
    """Return the seed of what the score's training draws, in a run with this seed."""
    return xxh3_64_intdigest(f"score {seed}".encode()) >> 1


@dataclass(frozen=True)
class FewStepDraws(TrainingDraws):
    """The random numbers of a training step, and those with which the student makes its videos."""

    start: Tensor
    """Noise that the videos begin with, ``[B C T H W]``."""
    levels: Tensor
    """Noise levels from 1 at which the student is called, falling; the video of the last one counts. The same for all
    samples of a step, on all ranks."""


class FewStepSampling(GuidanceDistillation):
    """Videos of a student in training: made by Euler steps, of which the last gives the video.

    Args:
        steps: numbers of steps in which it learns to make a video.
    """

    def __init__(self, flow: FlowObjective, teacher: GuidanceTeacher, steps: Sequence[int]) -> None:
        super().__init__(flow, teacher)
        self.steps = steps

    def draw(
        self,
        seed: int,
        step: int,
        indices: Sequence[int],
        latent_shape: tuple[int, int, int, int],
        height: int,
        width: int,
    ) -> FewStepDraws:
        draws = super().draw(seed, step, indices, latent_shape, height, width)
        generators = [sample_generator(seed, step, index, START_STREAM) for index in indices]
        start = torch.stack([torch.randn(latent_shape, generator=generator) for generator in generators])
        of_step = sample_generator(seed, step, 0, START_STREAM, 1)
        calls = [(steps, taken) for steps in self.steps for taken in range(steps)]
        steps, taken = calls[int(torch.randint(len(calls), (), generator=of_step))]
        sampler = RectifiedFlow()
        sampler.set_timesteps(steps, mu=math.log(self.flow.size_shift(latent_shape[1], height, width)))
        return FewStepDraws(**vars(draws), start=start, levels=sampler.sigmas[: taken + 1])

    def make_video(
        self,
        student: nn.Module,
        last: nn.Module,
        inputs: StepInputs,
        batch: EncodedBatch,
        draws: TrainingDraws,
    ) -> Tensor:
        """Return latents that the student makes, ``[B C T_n H W]``; conditioning frames are those of the data.

        Args:
            last: the same model; called in the last step, with gradients if they are on.
        """
        assert isinstance(draws, FewStepDraws)
        generated = (~draws.condition_mask).float()  # [B T]
        x = self.flow.add_noise(batch.latents, draws.start, generated)
        x = inputs.sharding.split(x, dim=2)
        if draws.t.shape[1] == 1:
            generated = generated[:, :1]  # no conditioning: one level for all frames
        levels = [level * generated for level in draws.levels]  # [B F] each
        with torch.no_grad():
            for level, following in zip(levels, levels[1:], strict=False):
                step = per_frame(inputs.sharding.split(level - following, dim=1))
                x = x + step * inputs.velocity(student, x, level)
        return x + per_frame(inputs.sharding.split(levels[-1], dim=1)) * inputs.velocity(last, x, levels[-1])


class ScoreMatching(FewStepSampling):
    """Flow matching of the score, with the student's videos in place of the clips."""

    def __init__(
        self, flow: FlowObjective, teacher: GuidanceTeacher, steps: Sequence[int], student: nn.Module
    ) -> None:
        super().__init__(flow, teacher, steps)
        self.student = student

    @torch.no_grad()
    def latents(self, inputs: StepInputs, batch: EncodedBatch, draws: TrainingDraws) -> Tensor:
        return self.make_video(self.student, self.student, inputs, batch, draws)

    def target(self, inputs: StepInputs, x: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return x - noise


class DistributionMatching(FewStepSampling):
    """Distribution matching: moves the student's videos from the score's distribution towards the teacher's.

    Args:
        student: the model that is trained.
        score: trains the score, by `ScoreMatching`.
        updates: of the score, in each training step.
    """

    def __init__(
        self,
        flow: FlowObjective,
        teacher: GuidanceTeacher,
        steps: Sequence[int],
        student: nn.Module,
        score: "Trainer",
        updates: int,
    ) -> None:
        super().__init__(flow, teacher, steps)
        self.student, self.score, self.updates = student, score, updates

    def losses(
        self, model: nn.Module, batch: EncodedBatch, draws: TrainingDraws, sharding: TokenSharding
    ) -> Tensor:
        """Return half the squared length of the `direction` of each sample, ``[B]``; its gradient is that direction.

        It does not fall: it compares two distributions at random levels, and is no measure of quality.
        """
        inputs = self.inputs(batch, draws, sharding)
        x = self.make_video(self.student, model, inputs, batch, draws)
        target = x.detach() - self.direction(inputs, x.detach(), draws)
        return frame_loss(x, target, sharding.split(frame_weights(draws.condition_mask), dim=1)) / 2

    @torch.no_grad()
    def direction(self, inputs: StepInputs, x: Tensor, draws: TrainingDraws) -> Tensor:
        """Return ``(x_score - x_teacher) / mean |x - x_teacher|``, ``[B C T_n H W]``.

        ``x_score`` and ``x_teacher`` are the videos that score and teacher see in the noisy ``x_t`` (Yin et al. 2023,
        arXiv:2311.18828, equations 7 and 8). The mean is that of a frame instead of the video, so that ranks that
        share a video need not exchange it.
        """
        noise, level = (inputs.sharding.split(one, dim=dim) for one, dim in ((draws.noise, 2), (draws.t, 1)))
        x_t, t = self.flow.add_noise(x, noise, level), per_frame(level)
        x_score = x_t + t * inputs.velocity(self.score.model, x_t, draws.t)
        x_teacher = x_t + t * self.teacher.velocity(inputs, x_t, draws.t)
        change = (x - x_teacher).abs().mean(dim=(1, 3, 4), keepdim=True)
        return (x_score - x_teacher) / change.clamp(min=SMALLEST_CHANGE)

    def after_step(self, batch: EncodedBatch) -> dict[str, Any]:
        """Train the score on new videos of the student; return its mean loss."""
        losses = []
        for update in range(self.updates):
            try:
                line = self.score.update(replace(batch, step=batch.step * self.updates + update))
            except UserError as error:
                raise UserError(
                    f"the score of step {batch.step}: {error} Or lower distill.score_lr."
                ) from error
            losses.append(line["loss"])
        known = [loss for loss in losses if loss is not None]
        return {"score_loss": sum(known) / len(known) if known else None}

    def state(self) -> dict[str, Mapping[str, Tensor]]:
        return {f"score/{part}": tensors for part, tensors in self.score.state().items()}

    def read(self, checkpoint: Path, meta: dict[str, Any]) -> None:
        # Spikes and skipped steps in the manifest are the student's.
        self.score.read(checkpoint / "score", {**meta, "spikes": {}, "nonfinite_in_a_row": 0})
