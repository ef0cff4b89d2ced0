"""The settings of an STDiT, from the shapes of weights with its own names. No model is built here."""

import logging
from collections.abc import Mapping

from torch import Tensor

from stdit.errors import UserError
from stdit.models.config import SettingValue, STDiTConfig
from stdit.models.opensora import settings_of_shapes

logger = logging.getLogger(__name__)

_NOT_IN_WEIGHTS = ("input_sq_size", "frame_positions")
"""Settings that change the output and no shape."""


def has_own_names(state: Mapping[str, Tensor]) -> bool:
    """Return whether the blocks have an STDiT's own names, not Open-Sora's."""
    return any(name.startswith("blocks.") for name in state)


def infer_own_settings(
    state: Mapping[str, Tensor], given: Mapping[str, SettingValue]
) -> dict[str, SettingValue]:
    """Infer settings from shapes, but for those that are given.

    What no shape tells is as by default, with a warning, unless the weights show that the model has other settings.

    Raises:
        UserError: if it is not a checkpoint of an STDiT, or its shapes do not tell a setting that is not given.
    """
    settings = settings_of_shapes(state, "blocks.0", "these are no weights of an STDiT")
    blocks = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    axes = [
        state[name].ndim - 2 if (name := f"blocks.{i}.mlp_conv.weight") in state else 0 for i in range(blocks)
    ]
    crossed = [f"blocks.{i}.cross_attn.proj.weight" in state for i in range(blocks)]
    settings["depth"] = blocks // 2
    settings["pooled_text"] = "pooled_embedder.fc1.weight" in state
    settings["mlp_conv"] = any(axes)
    settings["cross_attention"] = "all" if all(crossed) else "spatial"
    if any(axes):
        settings["blocks"] = " ".join("T" if along == 1 else "S" for along in axes)
    elif not all(crossed):
        settings["blocks"] = " ".join("S" if has_text else "T" for has_text in crossed)
    settings |= given

    untold = []
    if "num_heads" not in settings:
        untold.append("num_heads (there is no QK norm)")
    if 3 in axes and "blocks" not in given:
        untold.append("blocks (joint and linear ones have equal shapes)")
    if "guidance_embedder.mlp.0.weight" in state and "guidance_range" not in given:
        untold.append("guidance_range")
    if untold:
        raise UserError(
            f"the shapes of the weights do not tell {', '.join(untold)}: give config=FOLDER, that of the model's "
            "config.json, or the settings themselves, as in original_config={'num_heads': 16}."
        )
    doubtful = [name for name in _NOT_IN_WEIGHTS if name not in given]
    if not any(axes) and "blocks" not in given:
        doubtful.append("blocks")
    read = STDiTConfig.read(settings)
    if doubtful:
        assumed = ", ".join(f"{name} = {getattr(read, name)}" for name in doubtful)
        logger.warning(
            "The shapes of the weights do not tell all settings: %s is assumed. If the model has others, give "
            "config=, the folder of its config.json.",
            assumed,
        )
    return settings
