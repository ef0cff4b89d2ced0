"""Settings of the objective. Imports no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from stdit.errors import UserError
from stdit.registry import Registry

PREDICTIONS: Registry[Any] = Registry(
    "flow.prediction",
    {
        "velocity": "stdit.diffusion.flow:velocity_from_velocity",
        "sample": "stdit.diffusion.flow:velocity_from_sample",
        "residual": "stdit.diffusion.flow:velocity_from_residual",
    },
)
"""Name to function ``(flow, output, x_t, t) -> velocity``: see `stdit.diffusion.flow.register_prediction`."""


@dataclass
class FlowConfig:
    """Training objective and distribution of noise levels."""

    prediction: str = field(default="velocity", metadata={"choices": PREDICTIONS})
    """Meaning of the model's output: the velocity; the clean sample; or the residual of the best linear denoiser
    (needs a codec that knows the variance of its latents, such as pca or tiny). The loss is that of the velocity in
    each case."""
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
    """Share of samples trained with the null caption, for classifier-free guidance."""
    conditioning: dict[str, float] = field(default_factory=dict)
    """Share of samples for each mask strategy, such as {first: 0.2, head: 0.05}; the other samples have no
    conditioning frames. The strategies are in stdit/diffusion/conditioning.py."""

    def __post_init__(self) -> None:
        PREDICTIONS.check(self.prediction)
        if self.logit_std <= 0 or self.shift <= 0:
            raise UserError(
                f"flow.logit_std = {self.logit_std} and flow.shift = {self.shift}: both must be positive"
            )
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"flow.caption_dropout = {self.caption_dropout}: must lie between 0 and 1")
        if self.conditioning:
            from stdit.diffusion.conditioning import MASK_STRATEGIES  # here, since it imports torch
        for name, share in self.conditioning.items():
            MASK_STRATEGIES.check(name)
            if share < 0:
                raise UserError(f"flow.conditioning.{name} = {share}: must not be negative")
        if sum(self.conditioning.values()) > 1 + 1e-9:
            raise UserError(
                f"flow.conditioning adds up to {sum(self.conditioning.values())}: must be at most 1"
            )


def flow_settings(config: FlowConfig) -> dict[str, Any]:
    """Return what `flow_config` takes, as JSON has it: the fields, and the module of a user's own prediction."""
    module = PREDICTIONS.module(config.prediction)
    return asdict(config) | ({"import": module} if module else {})


def flow_config(settings: Mapping[str, Any]) -> FlowConfig:
    """Return the config of recorded settings, for sampling.

    Args:
        settings: what `flow_settings` returned, or some fields of `FlowConfig`.

    Raises:
        UserError: its prediction is not registered.
    """
    settings = dict(settings)
    module = settings.pop("import", None)
    PREDICTIONS.check(settings.get("prediction", FlowConfig.prediction), [module] if module else [])
    # Not checked: sampling draws no masks, so a strategy of the user's need not be registered.
    config = FlowConfig(**{**settings, "conditioning": {}})
    config.conditioning = settings.get("conditioning", {})
    return config
