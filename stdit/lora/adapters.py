"""Adapters in a model: which layers have one, and what peft is told.

Letters: r rank, d_in and d_out the widths of a linear layer.
"""

import re
import warnings
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from stdit.errors import UserError, listed
from stdit.lora.config import BLOCK_TARGETS, TARGETS, LoRAConfig
from stdit.lora.dropout import add_dropout
from stdit.models.stdit import STDiT

DEFAULT = "default"
"""Name of the adapter that is trained."""
_LISTED = 12
_IN_BLOCKS = re.compile(r"blocks\.")
"""Layers whose input begins with the samples: there is dropout in these."""


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a model by name; those of adapters in it are left out."""
    layers = {}
    for name, module in model.named_modules():
        inner = getattr(module, "base_layer", module)
        if isinstance(inner, nn.Linear) and "lora_" not in name and not name.endswith(".base_layer"):
            layers[name] = inner
    return layers


def target_layers(model: STDiT, targets: str) -> list[str]:
    """Return the names of the linear layers that ``lora.targets`` means.

    Raises:
        UserError: if there is none; the message has those that exist.
    """
    layers = linear_layers(model)
    parts = targets.split("|")
    patterns = [targets]
    if set(parts) <= {*TARGETS, *BLOCK_TARGETS}:
        of_kinds = [model.block_patterns(part) for part in parts if part in BLOCK_TARGETS]  # type: ignore[arg-type]
        patterns = [*(TARGETS[part] for part in parts if part in TARGETS), *chain(*of_kinds)]
    found = [name for name in layers if any(re.search(pattern, name) for pattern in patterns)]
    if not found:
        kinds = list(dict.fromkeys(re.sub(r"\d+", "N", name) for name in layers))
        raise UserError(
            f"lora.targets = {targets!r}: no linear layer has such a name. There are: "
            f"{listed(kinds[: 2 * _LISTED], len(kinds))}; and the names {', '.join((*TARGETS, *BLOCK_TARGETS))}."
        )
    return found


def check_targets(model: STDiT, config: LoRAConfig) -> list[str]:
    """Return the names of the layers that get an adapter; the model may be on the meta device.

    Raises:
        UserError: if the targets name no layer, or none for the dropout, or the rank is above the width of one.
    """
    assert config.rank is not None
    layers, targets = linear_layers(model), target_layers(model, config.targets)
    for target in targets:
        width = min(layers[target].in_features, layers[target].out_features)
        if config.rank > width:
            raise UserError(
                f"lora.rank = {config.rank}: is above {width}, the rank of {target} itself: use at most {width}, or "
                "other lora.targets."
            )
    if config.dropout and not any(_IN_BLOCKS.match(target) for target in targets):
        raise UserError(
            f"lora.dropout = {config.dropout}: is for layers in the blocks, and lora.targets = {config.targets!r} "
            "has none: leave it out."
        )
    return targets


def add_adapter(model: STDiT, config: LoRAConfig, seed: int = 0, name: str = DEFAULT) -> None:
    """Freeze a model, and add an adapter to it that changes nothing yet and can be trained.

    Args:
        config: with a rank.
        seed: of its random weights; torch's global random state does not change.

    Raises:
        UserError: as `check_targets`.
    """
    assert config.rank is not None
    targets = check_targets(model, config)
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        # peft warns that it cannot be merged into rounded weights, which is never done.
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear")
        model.add_adapter(
            PeftConfig(
                r=config.rank,
                lora_alpha=config.rank if config.alpha is None else config.alpha,  # type: ignore[arg-type]
                target_modules=targets,
                use_dora=config.dora,
                use_rslora=config.rslora,
            ),
            name,
        )
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft gives them the dtype of the layer
            parameter.data = parameter.data.float()
    if config.dropout:
        add_dropout(model, [target for target in targets if _IN_BLOCKS.match(target)], config.dropout, name)


def load_adapter(
    model: STDiT,
    weights: Mapping[str, Tensor],
    settings: Mapping[str, Any] | None,
    name: str,
    pipeline: Any = None,
    where: str = "",
) -> None:
    """Add an adapter with these weights, by peft's names, beside those that there are.

    Args:
        settings: peft's; None: alpha is the rank.
        pipeline: of the model, whose offloading then goes on.
        where: its file, for messages.

    Raises:
        UserError: if peft or diffusers refuse it, such as for a setting that this version of peft does not have.
    """
    metadata, training = None if settings is None else dict(settings), model.training
    try:
        model.load_lora_adapter(
            dict(weights), prefix=None, adapter_name=name, metadata=metadata, _pipeline=pipeline
        )
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"lora {where or name}: peft cannot load it ({error.__cause__ or error}): save it again with the peft "
            "that is installed here, or install the one that wrote it."
        ) from error
    model.train(training)  # peft's layers begin in training mode, with their dropout


def adapter_weights(
    model: STDiT, name: str = DEFAULT, state: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the weights of an adapter by peft's names, such as ``blocks.0.attn.qkv.lora_A.weight [r d_in]``.

    Args:
        state: weights by the model's names to take instead of its own, such as averages.
    """
    weights: dict[str, Tensor] = get_peft_model_state_dict(model, state, adapter_name=name)
    return weights


def adapter_settings(model: STDiT, name: str = DEFAULT) -> dict[str, Any]:
    """Return peft's settings of an adapter, as JSON has them, without the dropout of its training."""
    settings: dict[str, Any] = {**model.peft_config[name].to_dict(), "lora_dropout": 0.0}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}


def merge_adapter(model: STDiT, weight: float = 1.0, name: str = DEFAULT, where: str = "") -> None:
    """Add ``weight`` times what an adapter adds to the weights of its layers, and remove it.

    Args:
        where: its file, for messages.

    Raises:
        UserError: if a weight is then not finite.
    """
    model.set_adapters([name], [1.0])
    try:
        model.fuse_lora(lora_scale=weight, safe_fusing=True, adapter_names=[name])
    except (ValueError, RuntimeError) as error:  # a RuntimeError for lora_bias, where the layer has none
        raise UserError(f"lora {where or name} cannot be merged with weight {weight:g}: {error}") from error
    model.delete_adapters(name)
    if not getattr(model, "peft_config", None):
        model.unload_lora()
