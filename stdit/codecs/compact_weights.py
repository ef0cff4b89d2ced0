"""Weights in small files: matrices are stored in bf16, and computed with in fp32."""

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stdit.atomic_files import atomic_write
from stdit.checkpoint_files import seal_folder
from stdit.umask import apply_umask


def compact_folder(folder: Path) -> None:
    """Rewrite the weights of a saved component with matrices in bf16, and its manifest.

    Vectors and numbers stay as they are: they are small, and often scale all others.
    """
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata()
        compact = {
            name: tensor.bfloat16() if tensor.is_floating_point() and tensor.ndim > 1 else tensor
            for name, tensor in load_file(file).items()
        }
        with atomic_write(file) as temporary:  # the tensors lie in the mapped file until they are written
            save_file(compact, temporary, metadata)
            apply_umask(temporary)
    seal_folder(folder)
