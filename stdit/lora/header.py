"""What the header of a file says of its adapter, before a tensor or a model is read: names, shapes, dtypes, settings.

Letters: r rank, d_in and d_out the widths of a linear layer. Imports no torch.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from stdit.errors import UserError, listed
from stdit.lora.names import BIAS, PEFT_PREFIXES, is_of_peft, of_layer, own_name

SETTINGS = "lora_adapter_metadata"
"""Key of the header for peft's settings, as JSON: diffusers' ``LORA_ADAPTER_METADATA_KEY``."""
BASE_HASH = "stdit_base"
"""Key of the header for the hash of the weights that the adapter was trained on."""
TRIGGER = "modelspec.trigger_phrase"
"""Key of the header for the trigger word of its training, as in Stability AI's model metadata standard."""
_USED = (
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
    "lora_bias",
)
_NO_EFFECT = (
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout "
    "exclude_modules layers_to_transform layers_pattern megatron_core loftq_config eva_config corda_config "
    "lora_ga_config qalora_group_size runtime_config ensure_weight_tying"
).split()
"""Settings that a trained adapter of linear layers does not need. peft would import what ``megatron_core`` names."""
_FLOATS = ("F64", "F32", "F16", "BF16")
_OF_PEFT = ("adapter_model.safetensors", "adapter_config.json")
"""What peft itself writes: its settings are in a file beside that of the weights."""
_SHAPES = {"lora_A.weight": "[r d_in]", "lora_B.weight": "[d_out r]"}
_LENGTHS = "lora_magnitude_vector"


class _Entry(NamedTuple):
    """A tensor of a file."""

    name: str
    dtype: str
    shape: list[int]

    def __str__(self) -> str:
        return f"{self.name} {self.shape}"


@dataclass(frozen=True)
class AdapterHeader:
    """The header of a file, checked."""

    of_peft: bool
    """Whether all names are peft's."""
    shapes: dict[str, list[int]]
    """Of the weights, by peft's names."""
    settings: dict[str, Any] | None
    """peft's, but only those that matter here; None: the file does not have them."""
    base_hash: str | None
    """Of the weights that it was trained on, if the file has it."""
    trigger: str | None
    """Trigger word of its training, if the file has one."""


def read_header(file: Path) -> AdapterHeader:
    """Read and check the header of a file in the format of peft, ComfyUI or kohya.

    Raises:
        UserError: the file is damaged, none of an adapter, or one that cannot be used: which tensor or setting, why.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}
            entries = [_Entry(name, part.get_dtype(), part.get_shape()) for name, part in parts.items()]
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"lora {file}: cannot be read ({error}): it is damaged, or no safetensors."
        ) from error
    if not any(".lora_" in entry.name for entry in entries):
        raise UserError(
            f"lora {file}: has no weights of an adapter, but {len(entries)} tensors such as "
            f"{', '.join(entry.name for entry in entries[:2]) or 'none'}."
        )
    try:
        layers = _by_layer(entries)
        for layer, kinds in layers.items():
            _check_layer(layer, kinds)
        settings = _settings(file, metadata)
        of_peft = all(is_of_peft(entry.name) for entry in entries)
        if of_peft and settings is not None:
            _check_settings(settings, layers)
            used = {name: settings[name] for name in _USED if settings.get(name) is not None}
            settings = {**used, "target_modules": sorted(layers)}  # those that have weights
        _check_all_have(_LENGTHS, "DoRA has a lora_magnitude_vector (dora_scale)", layers)
        _check_all_have(BIAS, f"lora_bias has a {BIAS}", layers)
    except UserError as error:
        raise UserError(f"lora {file}: {error}") from None
    shapes = {
        f"{layer}.{kind}": entry.shape
        for layer, kinds in layers.items()
        for kind, entry in kinds.items()
        if kind != "alpha"
    }
    return AdapterHeader(of_peft, shapes, settings, metadata.get(BASE_HASH), metadata.get(TRIGGER))


def _by_layer(entries: list[_Entry]) -> dict[str, dict[str, _Entry]]:
    """Return the tensors of each layer by peft's names of their kinds."""
    layers: dict[str, dict[str, _Entry]] = {}
    for entry in entries:
        layer, kind = own_name(entry.name)
        kinds = layers.setdefault(layer, {})
        if kind in kinds:
            raise UserError(
                f"{entry.name} and {kinds[kind].name} are the same weight of {layer}: remove one of them."
            )
        kinds[kind] = entry
    return layers


def _check_layer(layer: str, kinds: Mapping[str, _Entry]) -> None:
    """Raise UserError unless the tensors of a layer make an adapter, whatever the layer's width is."""
    for kind in _SHAPES:
        if kind not in kinds:
            raise UserError(
                f"{layer} has {', '.join(entry.name for entry in kinds.values())}, but no {kind}, and a layer needs "
                "both matrices: save the adapter again, or remove the rest of this layer."
            )
    for kind, entry in kinds.items():
        allowed = (*_FLOATS, "I64", "I32") if kind == "alpha" else _FLOATS
        if entry.dtype not in allowed:
            raise UserError(
                f"{entry.name} has the dtype {entry.dtype}: must be one of {', '.join(allowed)}: save it so."
            )
    for kind, letters in _SHAPES.items():
        if len(kinds[kind].shape) != 2 or 0 in kinds[kind].shape:
            raise UserError(
                f"{kinds[kind]}: must be a matrix {letters}, of a linear layer: train the adapter on such alone."
            )
    down, up = (kinds[kind] for kind in _SHAPES)
    if down.shape[0] != up.shape[1]:
        raise UserError(
            f"{down} has the rank {down.shape[0]}, and {up} {up.shape[1]}: must have the same: save both again."
        )
    if "alpha" in kinds and math.prod(kinds["alpha"].shape) != 1:
        raise UserError(f"{kinds['alpha']}: must be one number: save the adapter again.")
    lengths = kinds.get(_LENGTHS)
    if lengths is not None and lengths.shape not in ([up.shape[0]], [up.shape[0], 1]):
        raise UserError(
            f"{lengths}: DoRA has a length for each of the {up.shape[0]} rows of {layer}: must be [{up.shape[0]}] or "
            f"[{up.shape[0]}, 1]: save it so."
        )
    if BIAS in kinds and kinds[BIAS].shape != [up.shape[0]]:
        raise UserError(
            f"{kinds[BIAS]}: must have one value for each row of {layer}, [{up.shape[0]}]: save it so."
        )


def _check_all_have(kind: str, rule: str, layers: Mapping[str, Mapping[str, _Entry]]) -> None:
    """Raise UserError if some layers have a kind of weight and others lack it."""
    lacking = [layer for layer, kinds in layers.items() if kind not in kinds]
    if 0 < len(lacking) < len(layers):
        raise UserError(
            f"{rule} for each layer, but {len(lacking)} of {len(layers)} layers lack it "
            f"({listed(lacking[:2], len(lacking))}): save the adapter again."
        )


def _settings(file: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Return peft's settings in a header, or in the file that peft writes beside; None: there are none."""
    weights, name = _OF_PEFT
    beside = file.parent / name
    has_own = SETTINGS in metadata
    if not has_own and not (file.name == weights and beside.is_file()):
        return None
    where = f"{SETTINGS} in its header" if has_own else str(beside)
    try:
        settings = json.loads(metadata[SETTINGS] if has_own else beside.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read as JSON ({error}): save the adapter again.") from None
    if not isinstance(settings, dict):
        raise UserError(
            f"{where} is {settings!r:.80}: must be an object of peft's settings: save the adapter again."
        )
    return {key.removeprefix(PEFT_PREFIXES[0]): value for key, value in settings.items()}


def _check_settings(settings: Mapping[str, Any], layers: Mapping[str, Mapping[str, _Entry]]) -> None:
    """Raise UserError unless peft's settings have the right types and are those of these layers."""

    def check(name: str, right: bool, rule: str) -> None:
        if not right:
            raise UserError(
                f"its settings have {name} = {settings.get(name)!r:.80}: {rule}: save the adapter again."
            )

    for name in settings.keys() - {*_USED, *_NO_EFFECT, "init_lora_weights"}:
        check(name, settings[name] in (None, False, "none", [], {}), "this kind of adapter is not supported")
    began = settings.get("init_lora_weights")
    check(
        "init_lora_weights",
        began in (None, True, False, "gaussian"),
        "it begins with a change of the model itself",
    )
    check("peft_type", settings.get("peft_type", "LORA") == "LORA", "must be LORA")
    check("r", _is_number(settings.get("r")), "must be the rank, a number")
    check("lora_alpha", _is_number(settings.get("lora_alpha")), "must be a finite number")
    for name in ("use_dora", "use_rslora", "lora_bias"):
        check(name, isinstance(settings.get(name, False), bool), "must be true or false")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = {} if settings.get(name) is None else settings[name]
        right = isinstance(patterns, dict) and all(map(_is_number, patterns.values()))
        check(
            name,
            right and all(map(_is_pattern, patterns)),
            "must be an object of regular expressions and numbers",
        )
    targets = settings.get("target_modules")
    named = targets if isinstance(targets, list) else [targets]
    check(
        "target_modules", all(isinstance(one, str) for one in named), "must be names of layers, or a pattern"
    )

    for layer, kinds in layers.items():
        rank = kinds["lora_A.weight"].shape[0]
        said = of_layer(settings.get("rank_pattern") or {}, layer, settings["r"])
        if said != rank:
            raise UserError(
                f"its settings (r, rank_pattern) say that {layer} has the rank {said}, but its weights have {rank}: "
                "save the adapter again, with the settings that it was trained with."
            )
        if isinstance(targets, list):
            is_named = any(layer == one or layer.endswith(f".{one}") for one in targets)
            check("target_modules", is_named, f"must name {layer}, of which there are weights")
    for name, kind in (("use_dora", _LENGTHS), ("lora_bias", BIAS)):
        has_kind = any(kind in kinds for kinds in layers.values())
        what = "there are" if has_kind else "there is no"
        check(name, settings.get(name, False) == has_kind, f"{what} {kind} among the weights")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
