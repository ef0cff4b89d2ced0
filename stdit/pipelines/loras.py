"""The adapters of a pipeline: load those that videos need, and switch between them."""

from collections.abc import Mapping, Sequence
from typing import Any

from stdit.lora.adapters import load_adapter
from stdit.lora.config import NAME_PREFIX, LoRASpec
from stdit.lora.files import check_fits, read_adapters
from stdit.models.config import STDiTConfig
from stdit.models.size import meta_model
from stdit.pipelines.pipeline import STDiTPipeline


def check_loras(loras: Sequence[LoRASpec], settings: Mapping[str, Any]) -> None:
    """Raise UserError unless adapters are of the architecture of a model with these settings; nothing is loaded."""
    model = meta_model(STDiTConfig.read(settings))
    for lora in loras:
        check_fits(lora.file, model)


def use_loras(pipe: STDiTPipeline, loras: Sequence[LoRASpec], any_base: bool = True) -> None:
    """Let a pipeline use these adapters with their weights, and no others; those that it lacks are loaded.

    Without any, adapters that came otherwise, such as the one that is trained, stay in use.

    Args:
        any_base: also load adapters that say that they were trained on other weights.

    Raises:
        UserError: if one cannot be read, or is of another architecture or base.
    """
    model = pipe.transformer
    loaded = getattr(model, "peft_config", {})
    missing = list({lora.name: lora for lora in loras if lora.name not in loaded}.values())
    for lora, adapter in zip(missing, read_adapters(missing, model, any_base), strict=True):
        load_adapter(model, adapter.weights, adapter.settings, lora.name, pipe, str(lora.file))
    weights: dict[str, float] = {}
    for lora in loras:  # one that is given twice counts twice
        weights[lora.name] = weights.get(lora.name, 0.0) + lora.weight
    if used := [name for name, weight in weights.items() if weight]:  # the lengths of DoRA have no weight
        # DoRA first: it scales what comes before it, too.
        used.sort(key=lambda name: not model.peft_config[name].use_dora)
        pipe.enable_lora()
        pipe.set_adapters(used, [weights[name] for name in used])
    elif loras or any(name.startswith(NAME_PREFIX) for name in loaded):
        pipe.disable_lora()
