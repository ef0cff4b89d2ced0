"""A small adapter of which no weight is zero."""

import copy
from pathlib import Path
from typing import Any

import torch

from stdit.lora.adapters import adapter_settings, adapter_weights, add_adapter
from stdit.lora.config import LoRAConfig
from stdit.lora.files import write_adapter
from stdit.models.stdit import STDiT


def add_random_adapter(model: STDiT, **settings: Any) -> None:
    """Add an adapter with random weights, the same each time."""
    add_adapter(model, LoRAConfig(**{"rank": 4, "alpha": 6.0, "targets": "blocks", **settings}), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def write_random_adapter(file: Path, model: STDiT, base_hash: str | None = None, **settings: Any) -> Path:
    """Write the file of such an adapter of a model, which stays as it is."""
    model = copy.deepcopy(model)
    add_random_adapter(model, **settings)
    return write_adapter(file, adapter_weights(model), adapter_settings(model), base_hash)
