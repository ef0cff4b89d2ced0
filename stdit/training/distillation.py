"""Guidance distillation: a student that does in one model call what its teacher does in two.

Letters: B batch, C channels, T_n latent frames of this rank, H height, W width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from stdit.diffusion.draws import TrainingDraws
from stdit.diffusion.flow import FlowObjective
from stdit.models.stdit import STDiT
from stdit.parallel.sequence.sharding import TokenSharding
from stdit.pipelines.weights import FrozenModel


class GuidanceTeacher:
    """A frozen model, whose guided velocity is the target of a student (Meng et al. 2023, arXiv:2210.03142, stage 1).

    Args:
        scales: range of the guidance scales that the student learns.
        source: which model it is, as checkpoints record it.
    """

    def __init__(
        self, model: STDiT, flow: FlowObjective, scales: tuple[float, float], source: FrozenModel
    ) -> None:
        self.model, self.flow, self.range, self.source = model.requires_grad_(False), flow, scales, source

    def scales(self, draws: TrainingDraws) -> Tensor:
        """Return the guidance scale of each sample, ``[B]``."""
        low, high = self.range
        return low + (high - low) * draws.guidance

    @torch.no_grad()
    def velocity(
        self, inputs: Mapping[str, Tensor], x_t: Tensor, t: Tensor, sharding: TokenSharding
    ) -> Tensor:
        """Return ``v_uncond + g (v_cond - v_uncond)`` of this rank's frames, ``[B C T_n H W]``.

        Args:
            inputs: the student's; its ``guidance`` is g.
            x_t: noisy latents ``[B C T_n H W]``, and ``t`` their noise levels ``[B F]``.
        """
        both = {name: torch.cat([rows, rows]) for name, rows in inputs.items() if name != "guidance"}
        dropped = inputs["drop_caption"]
        both["drop_caption"] = torch.cat([torch.ones_like(dropped), dropped])
        output = self.model(**both, sharding=sharding, return_dict=False)[0]
        velocity = self.flow.velocity(output, torch.cat([x_t, x_t]), torch.cat([t, t]))
        unconditional, conditional = velocity.chunk(2)
        scale = inputs["guidance"][:, None, None, None, None]
        return unconditional + scale * (conditional - unconditional)
