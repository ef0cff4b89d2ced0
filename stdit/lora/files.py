"""Files of adapters: safetensors with peft's names, and its settings and the base's hash in the header."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stdit.errors import UserError, listed
from stdit.hashing import hash_bytes, hash_tensor
from stdit.lora.adapters import (
    DEFAULT,
    adapter_settings,
    adapter_weights,
    linear_layers,
    load_adapter,
    merge_adapter,
)
from stdit.lora.config import ADAPTER_FILE, LoRASpec, find_adapter_file
from stdit.lora.names import from_other_names
from stdit.models.stdit import STDiT
from stdit.umask import apply_umask

PREFIX = "transformer."
"""Of all names in a file: the component of the pipeline that they belong to."""
BASE_HASH = "stdit_base"
"""Key of the header for the hash of the weights that the adapter was trained on."""
TRIGGER = "modelspec.trigger_phrase"
"""Key of the header for the trigger word of its training, as in Stability AI's model metadata standard."""


_PEFT = re.compile(r"(?!diffusion_model\.|lora_unet_).+\.lora_([AB]\.weight|magnitude_vector)")
"""A name that peft gives, with or without the prefix."""


@dataclass(frozen=True)
class AdapterFile:
    """The content of a file."""

    weights: dict[str, Tensor]
    """By peft's names, without the prefix."""
    settings: dict[str, Any] | None
    """peft's; None: the file does not have them."""
    base_hash: str | None
    """Of the weights that it was trained on, if the file has it."""
    trigger: str | None = None
    """The trigger word of its training, if it had one."""


def write_adapter(
    path: Path,
    weights: Mapping[str, Tensor],
    settings: Mapping[str, Any] | None,
    base_hash: str | None,
    trigger: str | None = None,
) -> Path:
    """Write a file, or the usual one in a folder; return the file."""
    file = path if path.suffix == ".safetensors" else path / ADAPTER_FILE
    header = trigger_header(trigger)
    if settings is not None:
        packed = {f"{PREFIX}{key}": value for key, value in settings.items()}
        header[LORA_ADAPTER_METADATA_KEY] = json.dumps(packed, indent=2, sort_keys=True)
    if base_hash is not None:
        header[BASE_HASH] = base_hash
    write_tensors(file, {f"{PREFIX}{name}": tensor for name, tensor in weights.items()}, header)
    return file


def trigger_header(trigger: str | None) -> dict[str, str]:
    """Return the header of a file with a trigger word, or without one."""
    return {"format": "pt", **({} if trigger is None else {TRIGGER: trigger})}


def read_trigger(file: Path) -> str | None:
    """Return the trigger word in the header of a file that can be read, if there is one."""
    with safe_open(file, framework="pt") as opened:
        return (opened.metadata() or {}).get(TRIGGER)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, aside, header)
        apply_umask(aside)
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def read_adapter(path: Path) -> AdapterFile:
    """Read a file, or that of a folder; also one with the names of kohya's scripts or of ComfyUI.

    Raises:
        UserError: it is missing, a pickle, damaged, or no file of an adapter.
    """
    file = find_adapter_file(path)
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        settings = json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"lora {file}: cannot be read ({error}): it is damaged, or no safetensors."
        ) from error
    if not any(".lora_" in name for name in tensors):
        raise UserError(
            f"lora {file}: has no weights of an adapter, but {len(tensors)} tensors such as "
            f"{', '.join(list(tensors)[:2]) or 'none'}."
        )
    if isinstance(settings, dict):
        settings = {key.removeprefix(PREFIX): value for key, value in settings.items()}
    plain = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    if all(_PEFT.fullmatch(name) for name in plain):
        weights = plain
    else:
        weights, settings = from_other_names(tensors)
    return AdapterFile(weights, settings, header.get(BASE_HASH), header.get(TRIGGER))


def base_hash(model: STDiT) -> str:
    """Return a hash of a model's weights in float32, whatever file they came from; adapters do not count."""
    facts = [
        f"{name.replace('.base_layer', '')} {list(tensor.shape)} {hash_tensor(tensor.detach().float().cpu())}"
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    ]
    return hash_bytes("\n".join(sorted(facts)).encode())


def check_fits(adapter: AdapterFile, model: STDiT, where: str) -> None:
    """Raise UserError, listing what does not fit, unless an adapter is one of this model."""
    layers = linear_layers(model)
    odd = []
    for name, tensor in adapter.weights.items():
        layer, _, kind = name.rpartition(".lora_")
        expected = layers.get(layer)
        if expected is None:
            odd.append(f"{layer}: no such layer")
        elif kind == "A.weight" and tensor.shape[1] != expected.in_features:
            odd.append(f"{layer}: takes {expected.in_features} channels, not {tensor.shape[1]}")
        elif kind == "B.weight" and tensor.shape[0] != expected.out_features:
            odd.append(f"{layer}: gives {expected.out_features} channels, not {tensor.shape[0]}")
    if odd := list(dict.fromkeys(odd)):
        raise UserError(
            f"lora {where}: is of another architecture: {len(odd)} of its layers do not fit "
            f"({listed(odd[:4], len(odd))}): use one that was trained on this model."
        )


def read_adapters(loras: Sequence[LoRASpec], model: STDiT, any_base: bool = True) -> list[AdapterFile]:
    """Read adapters for a model, which does not change.

    Args:
        any_base: also those that say that they were trained on other weights.

    Raises:
        UserError: if one cannot be read, or is of another architecture or base.
    """
    adapters = [read_adapter(lora.file) for lora in loras]
    for lora, adapter in zip(loras, adapters, strict=True):
        check_fits(adapter, model, str(lora.file))
    if any_base or all(adapter.base_hash is None for adapter in adapters):
        return adapters
    found = base_hash(model)
    for lora, adapter in zip(loras, adapters, strict=True):
        if adapter.base_hash not in (None, found):
            raise UserError(
                f"lora {lora.file}: was trained on the weights {adapter.base_hash}, and the checkpoint has {found}: "
                "sample from the checkpoint that it was trained on, or add --lora_other_base to use it here."
            )
    return adapters


def merge_adapters(model: STDiT, loras: Sequence[LoRASpec], any_base: bool = True) -> None:
    """Merge adapters into a model's weights. Raises as `read_adapters` does, before the model changes."""
    for lora, adapter in zip(loras, read_adapters(loras, model, any_base), strict=True):
        load_adapter(model, adapter.weights, adapter.settings, lora.name)
        merge_adapter(model, lora.weight, lora.name)


def begin_with(model: STDiT, file: Path) -> None:
    """Give the adapter that is trained the weights of a file. Raises UserError if they are of another kind."""
    adapter, own = read_adapter(file), adapter_weights(model)
    odd = [name for name in {**own, **adapter.weights} if _shape(own, name) != _shape(adapter.weights, name)]
    if odd:
        raise UserError(
            f"lora.init_from = {file}: is another kind of adapter: {len(odd)} weights differ, such as {odd[0]}, "
            f"{_shape(adapter.weights, odd[0])} there and {_shape(own, odd[0])} here: use its rank and targets."
        )
    here, there = adapter_settings(model), adapter.settings or {}
    for name in ("lora_alpha", "use_rslora", "use_dora"):
        if name in there and there[name] != here[name]:
            raise UserError(
                f"lora.init_from = {file}: has {name} = {there[name]}, and this run {here[name]}, with which it "
                "would have another effect: use its alpha, rslora and dora."
            )
    set_peft_model_state_dict(model, adapter.weights, DEFAULT)


def _shape(weights: Mapping[str, Tensor], name: str) -> str:
    return str(list(weights[name].shape)) if name in weights else "absent"
