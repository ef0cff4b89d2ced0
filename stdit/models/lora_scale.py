"""The scale of all LoRAs in one call of a model."""

from collections.abc import Callable
from functools import wraps
from typing import Any


def scale_loras(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a model's ``forward``: multiply what its LoRAs add by ``attention_kwargs["scale"]`` in this call.

    Unlike `diffusers.utils.apply_lora_scale`, which divides by the scale afterwards, it puts the same numbers back:
    after a scale of 0, too, each adapter has the weight that `set_adapters` gave it.
    """

    @wraps(forward)
    def scaled(model: Any, *args: Any, **kwargs: Any) -> Any:
        scale = (kwargs.get("attention_kwargs") or {}).get("scale", 1.0)
        if scale == 1:
            return forward(model, *args, **kwargs)
        from peft.tuners.lora import LoraLayer  # slow to import

        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        before = [dict(layer.scaling) for layer in layers]
        for layer in layers:
            layer.scale_layer(scale)
        try:
            return forward(model, *args, **kwargs)
        finally:
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling.update(scaling)

    return scaled
