"""The states of a few captions, without the text encoder that made them.

Letters: B batch, L text tokens, E width of the text states.
"""

from collections.abc import Callable, Iterable
from os import PathLike

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from stdit.codecs.padding import padded, unpadded
from stdit.codecs.text import TextEncoder
from stdit.errors import UserError


class HeldText(TextEncoder):
    """Stands for a text encoder that is not in memory; it is read again for other captions, and to be saved."""

    def __init__(self, encoder: TextEncoder, texts: Iterable[str], reload: Callable[[], TextEncoder]) -> None:
        """Encode some captions, which `encode` then knows.

        Args:
            reload: reads the encoder again.
        """
        ModelMixin.__init__(self)
        self.name, self.channels, self.max_length = encoder.name, encoder.channels, encoder.max_length
        self.layers, self.truncated = encoder.layers, 0
        self._fingerprint, self._reload = encoder.fingerprint(), reload
        self._whole: TextEncoder | None = None
        self.register_buffer("place", torch.zeros((), device=encoder.device), persistent=False)
        distinct = list(dict.fromkeys(texts))
        self._held = dict(zip(distinct, unpadded(*encoder.encode(distinct)), strict=True)) if distinct else {}

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        if not texts:
            raise ValueError("encode() wants at least one text")
        if not all(text in self._held for text in texts):
            self._whole = self._whole or self._read().to(self.device)  # type: ignore[assignment]
            return self._whole.encode(texts)  # type: ignore[union-attr]
        states, mask = padded([self._held[text] for text in texts])
        return states.to(self.device), mask.to(self.device)

    def fingerprint(self) -> str:
        return self._fingerprint

    def save_pretrained(self, save_directory: str | PathLike[str]) -> None:  # type: ignore[override]
        """Read the encoder again, and save that. Raises UserError if it is gone, or another one by now."""
        (self._whole or self._read()).save_pretrained(save_directory)

    def _read(self) -> TextEncoder:
        encoder = self._reload()
        if encoder.fingerprint() != self._fingerprint:
            raise UserError(
                "text_encoder.path holds other weights than when the run began: put the first ones back, and run the "
                "same command again"
            )
        return encoder
