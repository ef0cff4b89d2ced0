"""Text states of a few captions in memory, without the text encoder that computed them.

Letters: B batch, L text tokens, E width of the text states.
"""

from collections.abc import Callable, Iterable
from os import PathLike

from torch import Tensor

from stdit.codecs.padding import pad_states, unpad_states
from stdit.codecs.text import TextEncoder
from stdit.errors import UserError


class CachedTextEncoder(TextEncoder):
    """Replace a text encoder by its states of a few captions; other captions, and saving, load it again."""

    def __init__(self, encoder: TextEncoder, texts: Iterable[str], reload: Callable[[], TextEncoder]) -> None:
        """Encode the captions that are kept.

        Args:
            reload: loads the encoder again.
        """
        super().__init__()
        self.to(encoder.device)
        self.name, self.channels, self.max_length = encoder.name, encoder.channels, encoder.max_length
        self._fingerprint, self._reload = encoder.fingerprint(), reload
        self._encoder: TextEncoder | None = None
        distinct = list(dict.fromkeys(texts))
        self._states = (
            dict(zip(distinct, unpad_states(*encoder.encode(distinct)), strict=True)) if distinct else {}
        )

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        if not texts:
            raise ValueError("encode() needs at least one text")
        if not all(text in self._states for text in texts):
            self._encoder = self._encoder or self._reloaded().to(self.device)  # type: ignore[assignment]
            return self._encoder.encode(texts)  # type: ignore[union-attr]
        states, mask = pad_states([self._states[text] for text in texts])
        return states.to(self.device), mask.to(self.device)

    def fingerprint(self) -> str:
        return self._fingerprint

    def save_pretrained(self, save_directory: str | PathLike[str]) -> None:  # type: ignore[override]
        """Load the encoder again, and save it. Raises UserError if it is missing, or has changed."""
        self.whole().save_pretrained(save_directory)

    def whole(self) -> TextEncoder:
        return self._encoder or self._reloaded()

    def _reloaded(self) -> TextEncoder:
        encoder = self._reload()
        if encoder.fingerprint() != self._fingerprint:
            raise UserError(
                "text_encoder.path holds other weights than when the run began: restore them, and run the same "
                "command again"
            )
        return encoder
