"""Hashes of files, tensors and arrays, and JSON files that have a hash of themselves.

XXH3 detects flipped bits; it is no signature.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


SEAL = "hash"
"""Key of the hash that a JSON file has of itself; in every later format, too: see `checkpoint_files.read_meta`."""


def hash_bytes(content: bytes) -> str:
    """Return the hash that `hash_file` returns, of bytes."""
    return f"xxh3:{xxhash.xxh3_128(content).hexdigest()}"


def hash_file(path: Path) -> str:
    """Return ``xxh3:<32 hex digits>`` of a file (XXH3-128)."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return f"xxh3:{digest.hexdigest()}"


def hash_tensor(value: "Tensor") -> int:
    """Return XXH3-64 of a tensor's bytes, as a signed integer."""
    import torch

    unsigned = xxhash.xxh3_64_intdigest(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return unsigned - (1 << 64) if unsigned >> 63 else unsigned


def hash_arrays(facts: Mapping[str, Any], arrays: "Mapping[str, np.ndarray]") -> str:
    """Return a hash of facts, as JSON has them, and of names, types, shapes and bytes of arrays."""
    digest = xxhash.xxh3_128(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return f"xxh3:{digest.hexdigest()}"


def sealed_json(content: Mapping[Any, Any]) -> str:
    """Return an object as JSON, with a hash of its own text, so that `read_sealed` detects any changed byte."""
    content = json.loads(json.dumps(content))  # keys as text, so that they sort as they do when they are read
    return _canonical({**content, SEAL: hash_bytes(_canonical(content).encode())})


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def read_sealed(file: Path) -> dict[str, Any]:
    """Return the object of a file with `sealed_json`.

    Raises:
        ValueError, RecursionError: it is no JSON object, or any of its bytes has changed.
    """
    return unseal(file.read_bytes())


def unseal(text: bytes) -> dict[str, Any]:
    """Return the object of a text of `sealed_json`. Raises ValueError and RecursionError as `read_sealed` does."""
    content = json.loads(text.decode("utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    content.pop(SEAL, None)
    if sealed_json(content).encode() != text:
        raise ValueError("it has changed since it was written")
    return content
