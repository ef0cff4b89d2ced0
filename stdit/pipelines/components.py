"""Read the components of a pipeline from their folders."""

from collections.abc import Callable, Collection
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin

from stdit.checkpoint_files import read_json, verify_if_sealed
from stdit.codecs.base import VideoCodec
from stdit.codecs.loading import check_complete, explain_load_errors, local_weights
from stdit.codecs.text import TextEncoder
from stdit.diffusion.config import FlowConfig
from stdit.diffusion.scheduler import RectifiedFlow
from stdit.errors import UserError
from stdit.models.stdit import STDiT

SCHEDULER_CONFIG = "scheduler_config.json"
_FLOW_SETTINGS = (*(f.name for f in fields(FlowConfig)), "import")
_OLD_SETTINGS = (*_FLOW_SETTINGS, "latent_variance")
"""What scheduler configs had when the objective was in them."""


def read_components(folder: Path, given: Collection[str], dtype: torch.dtype | None) -> dict[str, Any]:
    """Load the components of a pipeline folder by name, but for those that are given.

    Args:
        dtype: of the transformer; None: fp32.

    Raises:
        UserError: if one is damaged, or its weights do not fit its config.
    """
    loaders: dict[str, Callable[[Path], Any]] = {
        "transformer": partial(read_transformer, dtype=dtype),
        "codec": VideoCodec.from_pretrained,
        "text_encoder": TextEncoder.from_pretrained,
        "scheduler": read_scheduler,
    }
    components = {}
    for name, load in loaders.items():
        if name not in given:
            with explain_load_errors(f"the pipeline's {name}", local_weights(folder / name)):
                components[name] = load(folder / name)
    return components


def read_transformer(folder: Path, dtype: torch.dtype | None = None) -> STDiT:
    """Load the STDiT of a folder. Raises UserError if it is damaged, or its weights do not fit its config."""
    source = local_weights(folder)
    with explain_load_errors("the transformer", source):
        model, info = STDiT.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    check_complete("the transformer", source, [*info["missing_keys"], *info["unexpected_keys"]])
    return model


def read_scheduler(folder: Path) -> Any:
    """Load the scheduler of a folder: ours, or one of diffusers. Raises UserError if there is no such class."""
    settings = read_json(folder / SCHEDULER_CONFIG, "a scheduler")
    if (name := settings.get("_class_name")) == RectifiedFlow.__name__:
        own = {name: value for name, value in settings.items() if name not in _OLD_SETTINGS}
        verify_if_sealed(folder)
        return RectifiedFlow.from_config(own)
    found = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise UserError(
            f"{folder / SCHEDULER_CONFIG}: _class_name = {name!r}: diffusers has no such scheduler."
        )
    scheduler: Any = found
    return scheduler.from_pretrained(folder)


def read_flow(folder: Path) -> dict[str, Any]:
    """Return the objective that a pipeline folder of before diffusers' schedulers has in its scheduler's config."""
    settings = read_json(folder / "scheduler" / SCHEDULER_CONFIG, "a scheduler")
    return {name: settings[name] for name in _FLOW_SETTINGS if name in settings}


def pop_dtype(kwargs: dict[str, Any]) -> torch.dtype | None:
    """Remove ``torch_dtype`` and ``dtype``, two names of one argument, and return it; UserError if they differ."""
    named = {name: kwargs.pop(name) for name in ("torch_dtype", "dtype") if name in kwargs}
    for name, value in named.items():
        if not isinstance(value, torch.dtype | None):
            raise UserError(
                f"{name} = {value!r}: must be a torch.dtype, such as torch.bfloat16, for the transformer (codec "
                "and text encoder keep the precision that they were saved with)."
            )
    distinct = {value for value in named.values() if value is not None}
    if len(distinct) > 1:
        raise UserError(
            f"torch_dtype = {named['torch_dtype']}, dtype = {named['dtype']}: these are two names of one argument: "
            "pass one of them."
        )
    return next(iter(distinct), None)
