"""stdit: train and sample spatial-temporal diffusion transformers for text-to-video."""

import logging
from typing import TYPE_CHECKING

from stdit.in_diffusers import offer_classes
from stdit.lazy import lazy_getattr

if TYPE_CHECKING:
    from stdit.diffusion.scheduler import RectifiedFlow
    from stdit.models.stdit import STDiT
    from stdit.pipelines.pipeline import STDiTPipeline

__version__ = "0.1.0"

__all__ = ["RectifiedFlow", "STDiT", "STDiTPipeline", "__version__"]

__getattr__ = lazy_getattr(
    __name__,
    {
        "RectifiedFlow": "stdit.diffusion.scheduler",
        "STDiT": "stdit.models.stdit",
        "STDiTPipeline": "stdit.pipelines.pipeline",
        # which diffusers needs to load components of a pipeline
        "VideoCodec": "stdit.codecs.base",
        "TextEncoder": "stdit.codecs.text",
        "ModelMixin": "diffusers",
        "SchedulerMixin": "diffusers",
    },
)
for _library in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_library).setLevel(logging.ERROR)  # of what torchao lacks
offer_classes()
