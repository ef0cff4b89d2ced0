"""Dropout of an adapter's input channels.

Letters: B samples, d_in the width of a layer's input.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class ChannelDropout(nn.Module):
    """Drop channels of ``[B ... d_in]``, the same ones in all tokens of a sample; nothing, unless `factors` are set.

    This is variational dropout (Gal & Ghahramani 2016, arXiv:1512.05287), where peft drops each value by itself: what
    is dropped depends neither on how ranks share the tokens of a sample, nor on which tokens a layer sees as a row.

    Args:
        share: of the channels, that is dropped.
        channels: d_in.
    """

    def __init__(self, share: float, channels: int) -> None:
        super().__init__()
        self.share, self.channels = share, channels
        self.factors: Tensor | None = None
        """What each channel of each sample is multiplied by, ``[B d_in]``: 0 or 1 / (1 - share)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to ``[B ... d_in]``, or to rows of samples as ``[(B rows) ... d_in]``."""
        if self.factors is None:
            return x
        factors = self.factors.repeat_interleave(x.shape[0] // self.factors.shape[0], 0).to(x.dtype)
        return x * factors.view(-1, *[1] * (x.ndim - 2), self.channels)


def add_dropout(model: nn.Module, layers: Sequence[str], share: float, name: str) -> None:
    """Give the adapter ``name`` dropout in these layers of a model."""
    for layer in layers:
        adapted: Any = model.get_submodule(layer)
        adapted.lora_dropout[name] = ChannelDropout(share, adapted.in_features)


def dropouts_of(model: nn.Module) -> dict[str, ChannelDropout]:
    """Return the dropout modules of a model's adapters by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ChannelDropout)}
