"""Names of an adapter's weights in other programs: kohya's scripts, and ComfyUI.

| | down ``[r d_in]`` | up ``[d_out r]`` | scale |
|---|---|---|---|
| peft | ``blocks.0.attn.qkv.lora_A.weight`` | ``...lora_B.weight`` | in the header |
| ComfyUI | ``diffusion_model.blocks.0.attn.qkv.lora_down.weight`` | ``...lora_up.weight`` | ``....alpha`` |
| kohya | ``lora_unet_blocks_0_attn_qkv.lora_down.weight`` | ``...lora_up.weight`` | ``....alpha`` |

The two others scale by alpha / r, and have DoRA's lengths as ``dora_scale [d_out 1]``. Imports no torch.
"""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from stdit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

AdapterFormat = Literal["kohya", "comfyui"]
PREFIXES: dict[AdapterFormat, str] = {"kohya": "lora_unet_", "comfyui": "diffusion_model."}
PEFT_PREFIXES = ("transformer.", "base_model.model.")
"""Of names in files of diffusers, and of those that peft itself writes."""
_PEFT = re.compile(r"(?!diffusion_model\.|lora_unet_).+\.lora_([AB]\.weight|B\.bias|magnitude_vector)")
_KINDS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
}
BIAS = "lora_B.bias"
"""Kind of weight of peft's ``lora_bias``, which the others do not have."""
_OTHER_KINDS = {**{other: own for own, other in _KINDS.items()}, **{kind: kind for kind in (*_KINDS, BIAS)}}
_WORDS = (
    "x_embedder t_embedder fps_embedder y_embedder pooled_embedder t_block y_proj final_layer cross_attn q_linear "
    "kv_linear q_norm k_norm mlp_conv"
).split()
"""Parts of the names of layers that have an underscore, which kohya's names have in the place of dots, too."""


def to_other_names(
    weights: Mapping[str, "Tensor"], settings: Mapping[str, Any], target: AdapterFormat
) -> dict[str, "Tensor"]:
    """Rename the weights of an adapter, and add the scale of each layer.

    Args:
        weights: by peft's names.
        settings: peft's.

    Raises:
        UserError: for a kind of weight that the other program does not have.
    """
    import torch

    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer, kind = _split(name)
        if kind not in _KINDS:
            raise UserError(f"{name}: {target} has no such weight: train the adapter without it.")
        there = PREFIXES[target] + (layer.replace(".", "_") if target == "kohya" else layer)
        renamed[f"{there}.{_KINDS[kind]}"] = tensor[:, None] if kind == "lora_magnitude_vector" else tensor
        if kind == "lora_A.weight":
            rank = tensor.shape[0]
            renamed[f"{there}.alpha"] = torch.tensor(alpha_of(layer, rank, settings))
    return renamed


def is_of_peft(name: str) -> bool:
    """Return whether peft gives this name to a weight, with or without a prefix; scales are then in the header."""
    return _PEFT.fullmatch(name) is not None


def own_name(name: str) -> tuple[str, str]:
    """Return our name of the layer of a weight, and peft's of its kind, such as ``lora_A.weight``, or ``alpha``.

    Raises:
        UserError: for a name of another kind.
    """
    layer, kind = _split(name)
    if kind != "alpha" and kind not in _OTHER_KINDS:
        raise UserError(f"{name}: is no weight of an adapter in the format of peft, ComfyUI or kohya.")
    return _own_layer(layer), _OTHER_KINDS.get(kind, kind)


def own_weights(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Return weights by peft's names, without scales. Raises as `own_name` does."""
    weights = {}
    for name, tensor in tensors.items():
        layer, kind = own_name(name)
        if kind != "alpha":
            weights[f"{layer}.{kind}"] = tensor.flatten() if kind == "lora_magnitude_vector" else tensor
    return weights


def from_other_names(tensors: Mapping[str, "Tensor"]) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Return weights by peft's names, and the settings that their scales mean. Raises as `own_name` does."""
    weights = own_weights(tensors)
    ranks = {
        name.removesuffix(".lora_A.weight"): tensor.shape[0]
        for name, tensor in weights.items()
        if name.endswith(".lora_A.weight")
    }
    named = {own_name(name): tensor for name, tensor in tensors.items()}
    alphas = {layer: float(tensor) for (layer, kind), tensor in named.items() if kind == "alpha"}
    rank = max(ranks.values(), key=list(ranks.values()).count)
    scales = {layer: alphas.get(layer, float(ranks[layer])) for layer in ranks}
    alpha = max(scales.values(), key=list(scales.values()).count)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{layer}": found for layer, found in ranks.items() if found != rank},
        "alpha_pattern": {f"^{layer}": found for layer, found in scales.items() if found != alpha},
        "target_modules": sorted(ranks),
        "use_dora": any(name.endswith("lora_magnitude_vector") for name in weights),
        "lora_bias": any(name.endswith(BIAS) for name in weights),
    }
    return weights, settings


def _split(name: str) -> tuple[str, str]:
    """Split a name into layer and kind of weight, such as ``lora_A.weight`` or ``alpha``."""
    match = re.fullmatch(
        r"(.+?)\.(lora_(?:A|B|up|down)\.weight|lora_B\.bias|lora_magnitude_vector|dora_scale|alpha)", name
    )
    return (match[1], match[2]) if match else (name, "")


def _own_layer(layer: str) -> str:
    """Return our name of a layer, from that of peft, ComfyUI or kohya."""
    if layer.startswith(PREFIXES["kohya"]):
        plain = layer.removeprefix(PREFIXES["kohya"])
        for word in _WORDS:
            plain = re.sub(rf"(?<![a-z]){word}(?![a-z])", word.replace("_", "-"), plain)
        return plain.replace("_", ".").replace("-", "_")
    for prefix in (PREFIXES["comfyui"], *PEFT_PREFIXES):
        layer = layer.removeprefix(prefix)
    return layer


def of_layer(patterns: Mapping[str, Any], layer: str, usual: Any) -> Any:
    """Return the value of the first pattern that the name of a layer ends with, as peft's ``get_pattern_key``."""
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer))
    return next(found, usual)


def alpha_of(layer: str, rank: int, settings: Mapping[str, Any]) -> float:
    """Return the alpha with which alpha / rank is the scale of a layer, by peft's settings."""
    alpha = of_layer(settings.get("alpha_pattern") or {}, layer, settings.get("lora_alpha", rank))
    return float(alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha)
