"""The training objective: rectified flow, mask strategies for conditioning frames, guidance. Imports no torch."""

from typing import TYPE_CHECKING

from stdit.diffusion.config import FlowConfig
from stdit.lazy import lazy_getattr

if TYPE_CHECKING:
    from stdit.diffusion.conditioning import register_mask_strategy
    from stdit.diffusion.flow import FlowObjective, register_prediction
    from stdit.diffusion.scheduler import RectifiedFlow

__all__ = ["FlowConfig", "FlowObjective", "RectifiedFlow", "register_mask_strategy", "register_prediction"]

__getattr__ = lazy_getattr(
    __name__,
    {
        "FlowObjective": "stdit.diffusion.flow",
        "RectifiedFlow": "stdit.diffusion.scheduler",
        "register_mask_strategy": "stdit.diffusion.conditioning",
        "register_prediction": "stdit.diffusion.flow",
    },
)
