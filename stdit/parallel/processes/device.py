"""The device of this process, and how it joins the others that torchrun or accelerate launch started."""

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from stdit.errors import UserError

if TYPE_CHECKING:
    import torch


def find_device(name: str) -> "torch.device":
    """Return the device of that name; ``auto``: a GPU if there is one, else the CPU.

    Raises:
        UserError: if this machine has no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device = {name}: not available here ({reason}): use cpu, or auto.") from None
    return device


def join_processes(device: str, timeout: float) -> "torch.device":
    """Join the process group if a launcher started several processes; return the device of this one.

    Args:
        device: name of a device, or ``auto``.
        timeout: seconds that a rank waits for the others.

    Raises:
        UserError: if this machine has no such device.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return find_device(device)
    from accelerate import PartialState

    from stdit.parallel.processes.mesh import runs_on_cpu

    joined: torch.device = PartialState(cpu=runs_on_cpu(device), timeout=timedelta(seconds=timeout)).device
    return joined
