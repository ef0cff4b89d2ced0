"""Read checkpoints of Open-Sora v1.2's STDiT3: files, settings and keys. No model is built here.

An STDiT names its weights as STDiT3 does, but STDiT3 has spatial and temporal blocks in two lists. Its checkpoints
have one tensor more, the frequencies of the rotary positions, which are a constant: it is skipped, and written by the
conversion back.
"""

import math
import pickle
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stdit.checkpoint_files import read_json
from stdit.errors import UserError
from stdit.models.config import BLOCK_KINDS, SettingValue, STDiTConfig

ROTARY = "rope.freqs"
"""The only tensor of a checkpoint that is not a weight, ``[head size / 2]``."""

_STDIT3_SETTINGS = (
    "depth hidden_size num_heads mlp_ratio patch_size in_channels pred_sigma caption_channels model_max_length "
    "qk_norm input_sq_size"
).split()
"""Settings that STDiT3 has under the same name."""

_SETTINGS_SHAPES = {
    "x_embedder.proj.weight": 5,
    "y_embedder.y_embedding": 2,
    "final_layer.linear.weight": 2,
}
"""Weights outside the blocks whose shapes determine settings, with their number of axes."""

_FILE_PATTERNS = (
    ("*.safetensors.index.json",),
    ("*.safetensors",),
    ("*.bin.index.json",),
    ("*.pth", "*.pt", "*.bin"),
)
"""Files of weights in a folder; the first kind that exists is read."""

_LFS_POINTER = b"version https://git-lfs"
_MAX_LISTED = 20
"""Largest number of keys of each kind in an error."""


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, SettingValue]]:
    """Read the state dict of a file or folder, and the settings in its ``config.json`` (empty without one).

    Args:
        path: a .safetensors; a .pth, .pt or .bin, read as weights only; the index of either in shards; or the
            folder of one of them.

    Raises:
        UserError: if it does not exist, is damaged, holds more than weights, or is of another model.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder: give an Open-Sora checkpoint.")
    settings = _read_settings((path if path.is_dir() else path.parent) / "config.json")
    return read_weights(path), settings


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read only the tensors of a file or folder. Raises UserError as `read_checkpoint` does."""
    state: dict[str, Tensor] = {}
    for file in _weight_files(path):
        state |= _read_tensors(file)
    return state


def infer_settings(state: Mapping[str, Tensor]) -> dict[str, SettingValue]:
    """Infer settings from the shapes of a checkpoint.

    They do not determine ``input_sq_size``, and ``num_heads`` only with QK norm or with the rotary frequencies.

    Raises:
        UserError: if it is not a checkpoint of STDiT3.
    """
    settings = settings_of_shapes(
        state, "spatial_blocks.0", "this is no checkpoint of Open-Sora v1.2's STDiT3"
    )
    settings["depth"] = len({name.split(".")[1] for name in state if name.startswith("spatial_blocks.")})
    if "num_heads" not in settings and ROTARY in state:
        settings["num_heads"] = cast(int, settings["hidden_size"]) // (2 * state[ROTARY].shape[0])
    return settings


def settings_of_shapes(state: Mapping[str, Tensor], block: str, refusal: str) -> dict[str, SettingValue]:
    """Return what shapes of weights tell under Open-Sora's names and under an STDiT's own.

    Args:
        block: the name of one block.
        refusal: how the error begins.

    Raises:
        UserError: if it is not a checkpoint of such a model.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    fc1 = f"{block}.mlp.fc1.weight"
    lacking = [
        name for name, axes in (_SETTINGS_SHAPES | {fc1: 2}).items() if len(shapes.get(name, ())) != axes
    ]
    if lacking:
        raise UserError(
            f"{refusal}: it lacks {', '.join(lacking)}, and has {len(state)} tensors such as "
            f"{', '.join(sorted(state)[:3]) or 'none'}. Give the model's own weights."
        )
    hidden_size, in_channels, *patch_size = shapes["x_embedder.proj.weight"]
    max_length, caption_channels = shapes["y_embedder.y_embedding"]
    mlp_ratio = shapes[fc1][0] / hidden_size
    if int(hidden_size * mlp_ratio) < shapes[fc1][0]:  # rounded down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    settings: dict[str, SettingValue] = {
        "hidden_size": hidden_size,
        "mlp_ratio": mlp_ratio,
        "patch_size": tuple(patch_size),
        "in_channels": in_channels,
        "pred_sigma": shapes["final_layer.linear.weight"][0] == 2 * in_channels * math.prod(patch_size),
        "caption_channels": caption_channels,
        "model_max_length": max_length,
        "qk_norm": f"{block}.attn.q_norm.weight" in state,
    }
    if settings["qk_norm"]:
        settings["num_heads"] = hidden_size // shapes[f"{block}.attn.q_norm.weight"][0]
    return settings


def to_stdit(state: Mapping[str, Tensor], settings: Mapping[str, SettingValue]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, for a model with these settings: all tensors but the rotary frequencies.

    Raises:
        UserError: if the rotary frequencies are not this model's.
    """
    if ROTARY in state:
        found = state[ROTARY]
        expected = rotary_frequencies(2 * found.numel())
        if found.ndim != 1 or not torch.allclose(found.cpu().float(), expected, rtol=1e-2):
            raise UserError(
                f"{ROTARY} holds other frequencies than 10000^(-2i / head size), the only ones that STDiT has: "
                "this model cannot be converted."
            )
    rename = stdit_names(settings)
    return {rename(name): tensor for name, tensor in state.items() if name != ROTARY}


def stdit_names(settings: Mapping[str, SettingValue]) -> Callable[[str], str]:
    """Return a function from STDiT3's names of weights to those in an STDiT with these settings.

    It also takes names that begin with that of a weight, such as those of an optimizer's state; other names stay.
    """
    blocks = {theirs: own for own, theirs in _block_names(settings).items()}
    return partial(_replace_block, blocks)


def opensora_names(settings: Mapping[str, SettingValue]) -> Callable[[str], str]:
    """Return the inverse of `stdit_names`."""
    return partial(_replace_block, _block_names(settings))


def _block_names(settings: Mapping[str, SettingValue]) -> dict[str, str]:
    """Return STDiT3's name of each block by its name in an STDiT: ``blocks.1`` is ``temporal_blocks.0``."""
    kinds = STDiTConfig.read(settings).kinds
    lists = {letter: f"{kind}_blocks" for letter, kind in BLOCK_KINDS.items()}
    return {f"blocks.{i}": f"{lists[kind]}.{kinds[:i].count(kind)}" for i, kind in enumerate(kinds)}


def _replace_block(blocks: Mapping[str, str], name: str) -> str:
    list_name, _, rest = name.partition(".")
    index, _, rest = rest.partition(".")
    block = blocks.get(f"{list_name}.{index}")
    return name if block is None else f"{block}.{rest}"


def _as_flag(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else shlex.quote(str(value))


def to_opensora(
    weights: Mapping[str, Tensor], settings: Mapping[str, SettingValue], prediction: str = "velocity"
) -> tuple[dict[str, Tensor], dict[str, SettingValue]]:
    """Convert weights and settings of an STDiT to the state dict and ``config.json`` of an STDiT3.

    Args:
        prediction: meaning of the model's output, ``flow.prediction`` of its training.

    Raises:
        UserError: if the model uses an option that STDiT3 does not have, or Open-Sora would misread its output.
    """
    settings = asdict(STDiTConfig.read(settings))
    own = {
        f"model.{f.name}": (settings[f.name], f.default)
        for f in fields(STDiTConfig)
        if f.name not in (*_STDIT3_SETTINGS, "gate_init") and settings[f.name] != f.default
    }
    if prediction != "velocity":
        own["flow.prediction"] = (prediction, "velocity")
    if own:
        used = ", ".join(f"{name.removeprefix('model.')} = {value}" for name, (value, _) in own.items())
        flags = " ".join(f"--{name} {_as_flag(default)}" for name, (_, default) in own.items())
        raise UserError(
            f"this model has {used}, which Open-Sora's STDiT3 does not know: its code would compute something else "
            f"from the same weights, so other keys would not help. Train a model with {flags} to convert it."
        )
    frequencies = rotary_frequencies(cast(int, settings["hidden_size"]) // cast(int, settings["num_heads"]))
    dtype = weights["x_embedder.proj.weight"].dtype
    rename = opensora_names(settings)
    state = {rename(name): tensor for name, tensor in weights.items()}
    config: dict[str, SettingValue] = {"model_type": "STDiT3", "architectures": ["STDiT3"]}
    config |= {name: settings[name] for name in _STDIT3_SETTINGS}
    return {**state, ROTARY: frequencies.to(dtype)}, config


def rotary_frequencies(head_size: int) -> Tensor:
    """Return ``10000^(-2i / head size)``, rounded as in the package that Open-Sora uses."""
    return 1.0 / (10000 ** (torch.arange(0, head_size, 2).float() / head_size))


def check_keys(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    shown: Callable[[str], str] = lambda name: name,
) -> None:
    """Raise UserError that lists missing keys, surplus keys and other shapes, if there are any.

    Args:
        shown: the name of a key in the message.
    """
    shape = {name: list(tensor.shape) for name, tensor in (*expected.items(), *found.items())}
    missing = [f"missing: {shown(name)} {shape[name]}" for name in expected if name not in found]
    surplus = [f"surplus: {shown(name)} {shape[name]}" for name in found if name not in expected]
    unlike = [
        f"of another shape: {shown(name)} {shape[name]}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    lines = [
        line
        for kind in (missing, surplus, unlike)
        for line in (
            *kind[:_MAX_LISTED],
            *([f"... and {len(kind) - _MAX_LISTED} more"] if len(kind) > _MAX_LISTED else []),
        )
    ]
    if lines:
        rule = "the checkpoint does not fit the model that its config and shapes describe"
        way_out = "Give the whole checkpoint, and the settings that it was made with."
        raise UserError("\n  ".join([f"{rule}:", *lines]) + f"\n{way_out}")


def _read_settings(file: Path) -> dict[str, SettingValue]:
    if not file.is_file():
        return {}
    config = read_json(file, "a checkpoint")
    kind = config.get("model_type") or config.get("_class_name")
    if kind not in (None, "STDiT3"):
        raise UserError(f"{file} is that of a {kind}, not of Open-Sora's STDiT3: give a checkpoint of that.")
    return {name: config[name] for name in _STDIT3_SETTINGS if name in config}


def _weight_files(path: Path) -> list[Path]:
    """Return the files of a checkpoint: the file, its shards, or those of the folder."""
    if path.name.endswith(".index.json"):
        weight_map = read_json(path, "a checkpoint").get("weight_map")
        shards = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
        absent = [name for name in shards if Path(name).name != name or not (path.parent / name).is_file()]
        if absent or not shards:
            what = f"names {absent[0]}, which is not beside it" if absent else "names no files"
            raise UserError(f"{path} {what}: fetch the whole checkpoint.")
        return [path.parent / name for name in shards]
    if path.is_file():
        return [path]
    for patterns in _FILE_PATTERNS:
        files = sorted(file for pattern in patterns for file in path.glob(pattern))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise UserError(f"{path} holds {names}, and no index that joins them: give one of these files.")
        if files:
            return _weight_files(files[0])
    raise UserError(
        f"{path} holds no .safetensors, .pth, .pt or .bin: give the folder, or file, of the weights."
    )


def _read_tensors(file: Path) -> dict[str, Tensor]:
    with open(file, "rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(
                f"{file} is only a pointer of Git LFS: fetch the weights themselves (git lfs pull)."
            )
    try:
        if file.suffix == ".safetensors":
            # Copied: they are a view of the file, which another process may overwrite.
            return {name: tensor.clone() for name, tensor in load_file(file).items()}
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error):
            raise UserError(
                f"{file} is a pickle of more than tensors, and reading one can run anything: save the state dict "
                "alone, best as .safetensors."
            ) from error
        raise UserError(f"{file} is no checkpoint of PyTorch, or damaged: fetch it again.") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(
            f"{file} cannot be read ({reason}): it is damaged or cut short, fetch it again."
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{file} holds no dict of tensors: save the state dict, and give its file.")
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        what = f"a dict with the keys {', '.join(map(str, list(state)[:5]))}"
        raise UserError(f"{file} holds {what}, not a plain state dict: save that alone, and give its file.")
    return state
