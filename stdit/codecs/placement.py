"""Where modules compute whose weights may be elsewhere: the offloading of accelerate and diffusers."""

import torch
from diffusers.models.modeling_utils import get_parameter_device
from torch import nn


def execution_device(module: nn.Module) -> torch.device:
    """Return the device on which a module computes, while its weights may be offloaded to another one."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    found: torch.device = get_parameter_device(module)
    return found
