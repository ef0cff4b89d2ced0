"""The reference tensors of Open-Sora v1.2's STDiT3, made by running it (see the json beside each)."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = ("plain", "odd_ragged", "pad_xmask")


def golden(case: str) -> dict[str, Tensor]:
    """Return the inputs (``in.*``), weights (``w.*``), output (``out``) and gradients (``grad.*``) of a case."""
    return load_file(FOLDER / f"{case}.safetensors")


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a case, with Open-Sora's own names."""
    return {name[2:]: tensor for name, tensor in tensors.items() if name.startswith("w.")}


def settings(case: str) -> dict[str, Any]:
    """Return the settings of the original model, as in Open-Sora's config.json."""
    return json.loads((FOLDER / f"{case}.json").read_text())["model"]
