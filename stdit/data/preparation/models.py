"""Load models of transformers that look at clips: those that write captions, and CLIP-like ones."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from stdit.codecs.loading import (
    DTYPES,
    WeightsSource,
    check_complete,
    explain_load_errors,
    locate_weights,
    quiet,
)
from stdit.errors import UserError
from stdit.parallel.processes.device import find_device


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it computes."""

    path: str
    """Local folder or hub id of a model and its processor."""
    device: str = "auto"
    dtype: str = "auto"
    """fp32, bf16, fp16; auto: as the weights are stored, on a CPU fp32."""
    batch_size: int = 8
    """Clips per call of the model."""

    def validate(self) -> None:
        """Raise UserError, before anything is loaded, if a setting is wrong."""
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size}: must be at least 1 clip")
        if self.dtype not in ("auto", *DTYPES):
            raise UserError(f"--dtype {self.dtype}: must be one of auto, {', '.join(DTYPES)}")
        find_device(self.device)
        locate_weights("--model", self.path, None)


@dataclass(frozen=True)
class LoadedModel:
    """A model and what prepares its inputs."""

    model: Any
    processor: Any
    """None if the folder has only an image processor and a tokenizer."""
    image_processor: Any
    tokenizer: Any

    def moved(self, inputs: Any) -> Any:
        """Move inputs to the model's device, and those that are not integers to its dtype."""
        return inputs.to(self.model.device, self.model.dtype)


def load_model(config: ModelConfig, choose: Callable[[Any], Any]) -> LoadedModel:
    """Load a model and its processor; runs no code of theirs, and reads no pickles. Raises UserError.

    Args:
        choose: from the config of the model to its class; raises UserError if the model has another purpose.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

    config.validate()
    source, device = locate_weights("--model", config.path, None), find_device(config.device)
    dtype: Any = DTYPES.get(config.dtype, torch.float32 if device.type == "cpu" else "auto")
    with _explained(source), quiet("transformers"):
        model_class = choose(AutoConfig.from_pretrained(**source.arguments()))
        processor = AutoProcessor.from_pretrained(**source.arguments())
        parts: list[Any] = [getattr(processor, name, None) for name in ("image_processor", "tokenizer")]
        if None in parts:
            processor = None
            parts = [
                auto.from_pretrained(**source.arguments()) for auto in (AutoImageProcessor, AutoTokenizer)
            ]
        model, report = model_class.from_pretrained(
            **source.arguments(), dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    check_complete("--model", source, report["missing_keys"])
    tokenizer = parts[1]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LoadedModel(model.eval().requires_grad_(False).to(device), processor, parts[0], tokenizer)


@contextlib.contextmanager
def _explained(source: WeightsSource) -> Iterator[None]:
    """Turn errors into UserErrors of one line; name torchvision if it is missing, which many processors need."""
    try:
        with explain_load_errors("--model", source):
            yield
    except UserError as error:
        if isinstance(error.__cause__, ImportError) and "torchvision" in str(error.__cause__).lower():
            raise UserError(
                f"--model {source}: its processor needs torchvision: pip install torchvision"
            ) from error
        raise


@contextlib.contextmanager
def explain_memory(batch_size: int) -> Iterator[None]:
    """Turn an error for lack of memory of the device into a UserError that says what to set."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = (
            f"--batch_size {batch_size // 2}" if batch_size > 1 else "a smaller --side, or fewer --frames"
        )
        raise UserError(
            f"the model ran out of memory with --batch_size {batch_size}: give {advice}; what is done is kept"
        ) from error
