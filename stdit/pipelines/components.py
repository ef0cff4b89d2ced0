"""Read the components of a pipeline from their folders."""

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stdit.codecs.base import VideoCodec
from stdit.codecs.loading import check_complete, explain_load_errors, local_weights
from stdit.codecs.text import TextEncoder
from stdit.diffusion.flow import RectifiedFlow
from stdit.errors import UserError
from stdit.models.stdit import STDiT


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
        "scheduler": RectifiedFlow.from_pretrained,
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
