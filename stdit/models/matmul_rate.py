"""How fast products of matrices are, by their precision."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Set the precision of products of float32 matrices in a block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def matmul_rate(device: torch.device, dtype: torch.dtype, precision: str = "highest") -> float:
    """Return the floating-point operations per second of a large matrix product, the best of six."""
    side = 1024 if device.type == "cpu" else 4096
    a = torch.randn(side, side, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
    best = float("inf")
    with matmul_precision(precision):
        for _ in range(6):
            began = time.perf_counter()
            product = a @ a
            if device.type != "cpu":
                product[0, 0].item()  # waits for it
            best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
