"""Precision of products of float32 matrices."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def fastest_exact_precision(device: torch.device) -> str:
    """Return the precision for `torch.set_float32_matmul_precision` that is fastest and rounds to float32.

    On CPUs without AMX, medium selects oneDNN's products, which are exact and may be faster than the default ones.
    """
    if device.type != "cpu":
        return "highest"
    a, b = torch.rand(2, 256, 256, generator=torch.Generator().manual_seed(0))
    with matmul_precision("medium"):
        product = a @ b
    exact = a.double() @ b.double()
    return "medium" if (product - exact).norm() <= 1e-6 * exact.norm() else "highest"  # bfloat16: 2e-3


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Set the precision of products of float32 matrices in a block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
