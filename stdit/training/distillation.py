"""Guidance distillation: a student that does in one model call what its teacher does in two.

Letters: B samples, C channels, T_n latent frames of this rank, H height, W width, F = T or 1.
"""

from dataclasses import replace

import torch
from torch import Tensor

from stdit.data.batch import EncodedBatch
from stdit.diffusion.draws import TrainingDraws
from stdit.diffusion.flow import FlowObjective
from stdit.models.stdit import STDiT
from stdit.parallel.sequence.sharding import TokenSharding
from stdit.pipelines.weights import FrozenModel
from stdit.training.flow_matching import FlowMatching, StepInputs


class GuidanceTeacher:
    """A frozen model, whose guided velocity a student learns.

    Args:
        scales: range of the guidance scales that the student learns.
        source: which model it is, as checkpoints record it.
    """

    def __init__(self, model: STDiT, scales: tuple[float, float], source: FrozenModel) -> None:
        self.model, self.range, self.source = model.requires_grad_(False), scales, source

    def scales(self, draws: TrainingDraws) -> Tensor:
        """Return the guidance scale of each sample, ``[B]``."""
        low, high = self.range
        return low + (high - low) * draws.guidance

    @torch.no_grad()
    def velocity(self, inputs: StepInputs, x_t: Tensor, t: Tensor) -> Tensor:
        """Return ``v_uncond + g (v_cond - v_uncond)`` of this rank's frames, ``[B C T_n H W]``.

        Args:
            inputs: the student's; its ``guidance`` is g.
            x_t: noisy latents ``[B C T_n H W]``, and ``t`` the noise levels of all frames ``[B F]``.
        """
        both = {name: torch.cat([rows, rows]) for name, rows in inputs.rows.items() if name != "guidance"}
        dropped = inputs.rows["drop_caption"]
        both["drop_caption"] = torch.cat([torch.ones_like(dropped), dropped])
        halves = replace(inputs, rows=both)
        velocity = halves.velocity(self.model, torch.cat([x_t, x_t]), torch.cat([t, t]))
        unconditional, conditional = velocity.chunk(2)
        scale = inputs.rows["guidance"][:, None, None, None, None]
        return unconditional + scale * (conditional - unconditional)


class GuidanceDistillation(FlowMatching):
    """The student learns the teacher's guided velocity on the data (Meng et al. 2023, arXiv:2210.03142, stage 1)."""

    def __init__(self, flow: FlowObjective, teacher: GuidanceTeacher) -> None:
        super().__init__(flow)
        self.teacher = teacher

    def inputs(self, batch: EncodedBatch, draws: TrainingDraws, sharding: TokenSharding) -> StepInputs:
        inputs = super().inputs(batch, draws, sharding)
        return replace(inputs, rows={**inputs.rows, "guidance": self.teacher.scales(draws)})

    def target(self, inputs: StepInputs, x: Tensor, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self.teacher.velocity(inputs, x_t, t)
