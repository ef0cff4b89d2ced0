"""Weights in small files: matrices in bf16 or int8. They are only stored so: what reads them computes in fp32."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stdit.checkpoint_files import seal_folder

_SCALE = ".int8_scale"
"""End of the name of a matrix's scales."""


def _is_matrix(tensor: Tensor) -> bool:
    """Return whether to compact a tensor: vectors and numbers are small, and often scale all others."""
    return tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel() > 0


def to_bf16(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with their matrices in bf16."""
    return {name: tensor.bfloat16() if _is_matrix(tensor) else tensor for name, tensor in state.items()}


def to_int8(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with their matrices in int8, and a scale in fp32 for each row of a matrix.

    The largest value of a row becomes 127 (absmax quantization: Dettmers et al. 2022, arXiv:2208.07339, section 2).
    """
    found = dict(state)
    for name, tensor in state.items():
        if _is_matrix(tensor):
            rows = tensor.float().flatten(1)
            scale = rows.abs().amax(1).clamp(min=1e-12) / 127
            found[name] = (rows / scale[:, None]).round().to(torch.int8).reshape(tensor.shape)
            found[name + _SCALE] = scale
    return found


def from_int8(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as they were before `to_int8`, rounded; others as they are."""
    found = {name: tensor for name, tensor in state.items() if not name.endswith(_SCALE)}
    for name in found.keys() & {name.removesuffix(_SCALE) for name in state.keys() - found.keys()}:
        matrix = found[name]
        scale = state[name + _SCALE].reshape(-1, *[1] * (matrix.ndim - 1))
        found[name] = matrix.float() * scale
    return found


COMPACT: dict[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {"bf16": to_bf16, "int8": to_int8}
"""Ways to store weights, by the type of their matrices."""


def read_compact(file: Path) -> dict[str, Tensor]:
    """Return the weights of a safetensors file, those in int8 as fp32. Raises as safetensors does."""
    return from_int8(load_file(file))


def has_int8(file: Path) -> bool:
    """Return whether a safetensors file has weights in int8; only its header is read.

    A damaged one has none: who reads it next says what is wrong with it.
    """
    try:
        with safe_open(file, framework="pt") as content:
            return any(name.endswith(_SCALE) for name in content.keys())
    except SafetensorError:
        return False


def compact_folder(folder: Path, kind: str) -> None:
    """Rewrite the weights of a saved component, and its manifest, with matrices stored as a kind of `COMPACT`."""
    for file in folder.glob("*.safetensors"):
        _compact_file(file, kind)
    seal_folder(folder)


def _compact_file(file: Path, kind: str) -> None:
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
    aside = file.with_suffix(".tmp")  # the tensors lie in the mapped file until they are written
    tensors = {name: tensor.contiguous() for name, tensor in COMPACT[kind](load_file(file)).items()}
    save_file(tensors, aside, metadata)
    os.replace(aside, file)
