"""Files of adapters: safetensors with peft's names, and its settings and the base's hash in the header."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stdit.atomic_files import atomic_write
from stdit.checkpoint_files import PICKLES
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
from stdit.lora.header import BASE_HASH, SETTINGS, TRIGGER, read_header
from stdit.lora.names import PEFT_PREFIXES, alpha_of, from_other_names, own_weights
from stdit.models.stdit import STDiT
from stdit.umask import apply_umask


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

    @property
    def dora_layers(self) -> list[str]:
        """Names of the layers whose lengths DoRA has learned."""
        kind = ".lora_magnitude_vector"
        return [name.removesuffix(kind) for name in self.weights if name.endswith(kind)]


def write_adapter(
    path: Path,
    weights: Mapping[str, Tensor],
    settings: Mapping[str, Any] | None,
    base_hash: str | None,
    trigger: str | None = None,
) -> Path:
    """Write a file, or the usual one in a folder; return the file."""
    file = path if path.suffix == ".safetensors" else path / ADAPTER_FILE
    header, prefix = adapter_header(base_hash, trigger), PEFT_PREFIXES[0]
    if settings is not None:
        packed = {f"{prefix}{key}": value for key, value in settings.items()}
        header[SETTINGS] = json.dumps(packed, indent=2, sort_keys=True)
    write_tensors(file, {f"{prefix}{name}": tensor for name, tensor in weights.items()}, header)
    return file


def adapter_header(base_hash: str | None, trigger: str | None) -> dict[str, str]:
    """Return the header of a file in any format: the base that it was trained on and its trigger word, if known."""
    found = {"format": "pt", BASE_HASH: base_hash, TRIGGER: trigger}
    return {key: value for key, value in found.items() if value is not None}


def write_tensors(file: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(file) as temporary:
        save_file(plain, temporary, header)
        apply_umask(temporary)


def read_adapter(path: Path) -> AdapterFile:
    """Read a file, or that of a folder; also one with the names of kohya's scripts or of ComfyUI.

    Raises:
        UserError: it is missing, a pickle, damaged, no file of an adapter, or has a value that is not finite.
    """
    file = find_adapter_file(path)
    header = read_header(file)
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    if odd := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(
            f"lora {file}: {len(odd)} of its tensors have values that are NaN or infinite, such as {odd[0]}: its "
            "training failed, or it is damaged: use an earlier one."
        )
    if not header.of_peft:
        return AdapterFile(*from_other_names(tensors), header.base_hash, header.trigger)
    return AdapterFile(own_weights(tensors), header.settings, header.base_hash, header.trigger)


def local_adapter(source: Any, name: str | None = None) -> Path | None:
    """Return the local file that `load_lora_weights` of diffusers is given; None: a dictionary, pickle or hub id.

    Args:
        source: a file or folder, or what else diffusers takes.
        name: of the file in the folder.
    """
    if not isinstance(source, str | os.PathLike) or not (path := Path(source, name or "")).exists():
        return None
    if path.is_dir():
        path = find_adapter_file(path)
    return None if path.suffix.lower() in PICKLES else path


def check_adapter(file: Path, model: STDiT, any_base: bool) -> None:
    """Check a file that diffusers loads into a model. Raises UserError as `read_adapters` does.

    The base is compared where it can be: its weights must be those in fp32 that were hashed.
    """
    known = not getattr(model, "is_quantized", False)
    known = known and all(p.dtype == torch.float32 and not p.is_meta for p in model.parameters())
    read_adapters([LoRASpec(file, 1.0, "")], model, any_base or not known, "other_base=True")


def pipeline_state(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None] | None:
    """Return weights and settings of a file as diffusers has those of a pipeline; None: it has these names already.

    Raises:
        UserError: as `read_adapter`.
    """
    prefix = PEFT_PREFIXES[0]
    with safe_open(file, framework="pt") as opened:
        if all(name.startswith(prefix) for name in opened.keys()):
            return None
    adapter = read_adapter(file)
    settings = adapter.settings and {f"{prefix}{key}": value for key, value in adapter.settings.items()}
    return {f"{prefix}{name}": tensor for name, tensor in adapter.weights.items()}, settings


def base_hash(model: STDiT) -> str:
    """Return the hash of a model's weights, whatever file they came from; adapters do not count."""
    return hash_of_weights(
        (name.replace(".base_layer", ""), tensor)
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    )


def hash_of_weights(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of weights in float32, in any order."""
    facts = [
        f"{name} {list(tensor.shape)} {hash_tensor(tensor.detach().float().cpu())}"
        for name, tensor in weights
    ]
    return hash_bytes("\n".join(sorted(facts)).encode())


def check_fits(file: Path, model: STDiT) -> None:
    """Raise UserError, listing what does not fit, unless a file is of this model, which may have no weights."""
    layers = linear_layers(model)
    odd = []
    for name, shape in read_header(file).shapes.items():
        layer, _, kind = name.rpartition(".lora_")
        expected = layers.get(layer)
        if expected is None:
            odd.append(f"{layer}: no such layer")
        elif kind == "A.weight" and shape[1] != expected.in_features:
            odd.append(f"{layer}: takes {expected.in_features} channels, not {shape[1]}")
        elif kind != "A.weight" and shape[0] != expected.out_features:
            odd.append(f"{layer}: gives {expected.out_features} channels, not {shape[0]}")
    if odd := list(dict.fromkeys(odd)):
        count = len({line.partition(":")[0] for line in odd})
        raise UserError(
            f"lora {file}: is of another architecture: {count} of its layers do not fit "
            f"({listed(odd[:4], len(odd))}): use one that was trained on this model."
        )


def check_base(adapter: AdapterFile, found: str, where: str, flag: str) -> None:
    """Raise UserError, naming the flag that allows it, if an adapter says that it was trained on other weights.

    Args:
        found: the hash of the weights.
    """
    if adapter.base_hash not in (None, found):
        raise UserError(
            f"lora {where}: was trained on the weights {adapter.base_hash}, and the checkpoint has {found}: use the "
            f"checkpoint that it was trained on, or add {flag} to use it here."
        )


def read_adapters(
    loras: Sequence[LoRASpec], model: STDiT, any_base: bool = True, flag: str = "--lora_other_base"
) -> list[AdapterFile]:
    """Read adapters for a model, which does not change.

    Args:
        any_base: also those that say that they were trained on other weights.
        flag: that sets ``any_base``, for messages.

    Raises:
        UserError: if one cannot be read, or is of another architecture or base.
    """
    for lora in loras:
        check_fits(lora.file, model)
    adapters = [read_adapter(lora.file) for lora in loras]
    if any_base or all(adapter.base_hash is None for adapter in adapters):
        return adapters
    if getattr(model, "is_quantized", False):
        raise UserError(
            f"lora {loras[0].file}: says on which weights it was trained, which cannot be compared with the "
            f"quantised ones of this model: add {flag} to use it here."
        )
    found = base_hash(model)
    for lora, adapter in zip(loras, adapters, strict=True):
        check_base(adapter, found, str(lora.file), flag)
    return adapters


def merge_adapters(
    model: STDiT, loras: Sequence[LoRASpec], any_base: bool = True, flag: str = "--lora_other_base"
) -> None:
    """Merge adapters into a model's weights, which then compute what the model does with them.

    Those with DoRA come first, since it measures the weights that it is added to.

    Raises:
        UserError: as `read_adapters`, or two with DoRA have a layer in common; before the model changes.
    """
    pairs = list(zip(loras, read_adapters(loras, model, any_base, flag), strict=True))
    pairs.sort(key=lambda pair: not pair[1].dora_layers)
    taken: dict[str, Path] = {}
    for lora, adapter in pairs:
        for layer in adapter.dora_layers if lora.weight else ():
            if layer in taken:
                raise UserError(
                    f"lora {lora.file} and {taken[layer]} both change {layer} by DoRA, and cannot be merged into one "
                    "weight: merge one of them, or train one on top of the other."
                )
            taken[layer] = lora.file
    for lora, adapter in pairs:
        if lora.weight:  # with 0 the weights stay as they are, bit for bit
            load_adapter(model, adapter.weights, adapter.settings, lora.name, where=str(lora.file))
            merge_adapter(model, lora.weight, lora.name, str(lora.file))


def check_kind(model: STDiT, file: Path) -> AdapterFile:
    """Return the adapter of a file, if the one that is trained can take its weights; the model may have none.

    Raises:
        UserError: if it is of another kind.
    """
    adapter, own = read_adapter(file), adapter_weights(model)
    odd = [name for name in {**own, **adapter.weights} if _shape(own, name) != _shape(adapter.weights, name)]
    if odd:
        raise UserError(
            f"lora.init_from = {file}: is another kind of adapter: {len(odd)} weights differ, such as {odd[0]}, "
            f"{_shape(adapter.weights, odd[0])} there and {_shape(own, odd[0])} here: use its rank and targets."
        )
    here, there = adapter_settings(model), adapter.settings or {}
    for name, tensor in own.items():
        layer, _, kind = name.partition(".lora_")
        if kind != "A.weight":
            continue
        alphas = [alpha_of(layer, tensor.shape[0], settings) for settings in (there, here)]
        if not math.isclose(*alphas, rel_tol=1e-6):
            raise UserError(
                f"lora.init_from = {file}: scales {layer} by {alphas[0]:g} / {tensor.shape[0]}, and this run by "
                f"{alphas[1]:g} / {tensor.shape[0]}, with which it would have another effect: use its alpha and "
                "rslora."
            )
    return adapter


def begin_with(model: STDiT, file: Path, base: str | None) -> None:
    """Give the adapter that is trained the weights of a file.

    Args:
        base: hash of the weights that it must have been trained on; None: any.

    Raises:
        UserError: if it is of another kind or base.
    """
    adapter = check_kind(model, file)
    if base is not None:
        check_base(adapter, base, str(file), "--lora.other_base")
    set_peft_model_state_dict(model, adapter.weights, DEFAULT)


def _shape(weights: Mapping[str, Tensor], name: str) -> str:
    return str(list(weights[name].shape)) if name in weights else "absent"
