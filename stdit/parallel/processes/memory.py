"""How much memory a process may use."""

import os
from pathlib import Path

import psutil
import torch

from stdit.parallel.sequence.planner import GIB

CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_of_process(device: torch.device, gib: float | None) -> int:
    """Bytes: so many GiB, if they are given; else all of a GPU's memory, or a process's part of the machine's."""
    if gib is not None:
        return int(gib * GIB)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return machine_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def machine_memory() -> int:
    """Bytes that this machine has, or that its container may use."""
    limits = [file.read_text().strip() for file in map(Path, CONTAINER_LIMITS) if file.is_file()]
    return min([psutil.virtual_memory().total, *(int(limit) for limit in limits if limit.isdigit())])
