"""The precision of a pipeline's transformer."""

import torch

from stdit.errors import UserError
from stdit.models.stdit import STDiT


def cast(transformer: STDiT, name: str) -> None:
    """Give a model the precision of ``dtype``. Raises UserError if it is quantised, and computes in another one."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if not getattr(transformer, "is_quantized", False):
        for path, parameter in transformer.named_parameters():
            if not set(transformer._keep_in_fp32_modules) & set(path.split(".")):  # as from_pretrained
                parameter.data = parameter.data.to(dtype)
    elif transformer.dtype != dtype:
        raise UserError(
            f"dtype = {name}: the transformer is quantised and computes in {transformer.dtype}: set dtype to that."
        )
