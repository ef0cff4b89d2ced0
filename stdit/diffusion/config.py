"""Settings of the objective. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from stdit.errors import UserError


@dataclass
class FlowConfig:
    """What is trained, and at which noise levels."""

    prediction: Literal["velocity", "sample", "residual"] = "velocity"
    """Meaning of the model's output: the velocity; the clean sample; or a correction of the best linear denoiser
    (it needs a codec that states the variance of its latents, such as pca). The loss is in velocity in each case."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "logit_normal"
    """Distribution of the noise level t in training."""
    logit_mean: float = 0.0
    """Mean of logit(t); positive values train more on high noise (Esser et al. 2024, arXiv:2403.03206)."""
    logit_std: float = 1.0
    """Standard deviation of logit(t)."""
    shift: float = 1.0
    """Shift r of all noise levels, t -> r t / (1 + (r - 1) t), in training and sampling."""
    shift_by_size: bool = False
    """Multiply the shift by sqrt(height * width / 512^2) * sqrt(latent frames), as Open-Sora v1.2 does."""
    caption_dropout: float = 0.1
    """Share of samples that are trained with the null caption, for classifier-free guidance."""
    conditioning: dict[str, float] = field(default_factory=dict)
    """Share of samples for each way of giving frames, such as {first: 0.2, head: 0.05}; the rest is given none."""

    def __post_init__(self) -> None:
        if self.logit_std <= 0 or self.shift <= 0:
            raise UserError(
                f"flow.logit_std = {self.logit_std} and flow.shift = {self.shift}: both must be positive"
            )
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"flow.caption_dropout = {self.caption_dropout}: must lie between 0 and 1")
        if self.conditioning:
            from stdit.diffusion.conditioning import MASK_STRATEGIES  # here, since it imports torch
        for name, share in self.conditioning.items():
            if name not in MASK_STRATEGIES:
                raise UserError(
                    f"flow.conditioning has {name!r}: must be one of {', '.join(MASK_STRATEGIES)}"
                )
            if share < 0:
                raise UserError(f"flow.conditioning.{name} = {share}: must not be negative")
        if sum(self.conditioning.values()) > 1 + 1e-9:
            raise UserError(
                f"flow.conditioning adds up to {sum(self.conditioning.values())}: must be at most 1"
            )
