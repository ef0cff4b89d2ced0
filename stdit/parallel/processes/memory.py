"""Memory that a process may use."""

import os
from pathlib import Path

import psutil
import torch

from stdit.parallel.sequence.planner import GIB

CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_of_process(device: torch.device, gib: float | None) -> int:
    """Return the bytes that this process may use.

    Args:
        gib: that many GiB; None: all memory of its GPU, or on a CPU its share of the machine's memory.
    """
    if gib is not None:
        return int(gib * GIB)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def free_memory(device: torch.device, gib: float | None = None) -> int:
    """Return the bytes of `memory_of_process` that this process does not use yet, and that there are."""
    whole, sharing = memory_of_process(device, gib), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda":
        used = torch.cuda.memory_allocated(device)
        there = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - used
    else:
        used = psutil.Process().memory_info().rss
        there = psutil.virtual_memory().available // sharing
    return min(whole - used, there)


def machine_memory() -> int:
    """Return the bytes of this machine's memory, or of its container's limit if that is lower."""
    limits = [file.read_text().strip() for file in map(Path, CONTAINER_LIMITS) if file.is_file()]
    total: int = psutil.virtual_memory().total
    return min([total, *(int(limit) for limit in limits if limit.isdigit())])
