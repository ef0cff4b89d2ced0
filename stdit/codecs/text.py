"""Interface of all text encoders: captions to token states.

Letters: B batch, L text tokens, E width of the text states.
"""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from stdit.checkpoint_files import seal_folder
from stdit.codecs.config import TEXT_ENCODERS, TextEncoderConfig
from stdit.codecs.loading import (
    check_options,
    fingerprint,
    read_component,
    refuse_to_be_measured,
    write_component,
)
from stdit.codecs.placement import execution_device
from stdit.errors import UserError

TEXT_ENCODER_FILE = "text_encoder.json"


class TextComponents(NamedTuple):
    """What a pipeline has of a text encoder."""

    text_encoder: Any
    tokenizer: Any
    settings: dict[str, Any]
    """Keyword arguments of `stdit.codecs.transformers_text.TransformersTextEncoder`, for a model of transformers."""


class TextEncoder(ModelMixin):
    """Map captions to hidden states and a mask. Frozen: it is never trained.

    A subclass sets ``name``, ``channels`` and ``max_length``, and implements `encode`. Where the arguments of its
    `__init__` are not empty, it also overrides `from_config` and `saved_settings`; where it has weights, `save` and
    `load`. It is a diffusers `ModelMixin` so that diffusers pipelines save, load and offload it.
    """

    name: str
    """The value of ``text_encoder.name`` that stands for it: see `stdit.codecs.register_text_encoder`."""

    channels: int
    """Width E of the states."""

    max_length: int
    """Largest number L of tokens of a caption."""

    def __init__(self) -> None:
        super().__init__()
        # Tells the device of an encoder without weights.
        self.register_buffer("placement", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where it computes, also while its weights are offloaded."""
        return execution_device(self)

    def components(self) -> "TextComponents":
        """Return what a pipeline has of it: this alone, or the model and tokenizer that it wraps."""
        return TextComponents(self, None, {})

    def whole(self) -> "TextEncoder":
        """Return an encoder of all texts, not of a few whose states are in memory."""
        return self

    def with_max_length(self, max_length: int) -> "TextEncoder":
        """Return this encoder with another largest number of tokens.

        Raises:
            UserError: if it cannot have that.
        """
        if max_length != self.max_length:
            raise UserError(
                f"max_sequence_length = {max_length}: the text encoder {self.name} has states of at most "
                f"{self.max_length} tokens: leave max_sequence_length out."
            )
        return self

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Encode captions to token states, padded on the right to the longest of them.

        Args:
            texts: B captions, any of which may be empty (it still has at least one token).

        Returns:
            states, float32 [B L E], zero where there is no token; mask, bool [B L], true for tokens. Both on the
            encoder's device; L is at most `max_length`.

        Raises:
            ValueError: no texts.
        """
        raise NotImplementedError

    def check(self, texts: Iterable[str]) -> None:
        """Raise UserError for texts that it cannot encode."""

    def fingerprint(self) -> str:
        """Return a hash of name, settings and weights: equal fingerprints give equal states."""
        return fingerprint({"name": self.name} | self.saved_settings(), self.state_dict())

    @classmethod
    def from_config(cls, config: TextEncoderConfig) -> Self:
        """Build the encoder that a config describes."""
        return cls()

    def saved_settings(self) -> dict[str, Any]:
        """Return the arguments of `__init__`, as JSON has them; `text_encoder.json` holds them beside the name."""
        return {}

    def packaged(self) -> dict[str, str]:
        """Return ``package`` and ``fingerprint`` if an installed package has just these weights; else nothing.

        They are then saved instead of the weights.
        """
        return {}

    def save(self, directory: Path) -> None:
        """Write the weights, if there are any, as safetensors."""

    @classmethod
    def load(cls, directory: Path, settings: dict[str, Any], dtype: torch.dtype | None) -> "TextEncoder":
        """Read what `save` wrote.

        Args:
            settings: what `text_encoder.json` holds: ``name``, and what `saved_settings` and `packaged` returned.
            dtype: precision of the weights instead of the saved one.
        """
        return cls(**{key: value for key, value in settings.items() if key != "name"})

    def save_pretrained(self, save_directory: str | PathLike[str]) -> None:  # type: ignore[override]
        """Write `text_encoder.json`, the weights and a manifest into a folder, which is made if it does not exist.

        Weights that a package ships are not copied: the file names the package and their fingerprint.
        """
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        if not (package := self.packaged()):
            self.save(directory)
        settings = self.saved_settings() | package
        write_component(directory / TEXT_ENCODER_FILE, self.name, settings, TEXT_ENCODERS)
        seal_folder(directory)

    load_config: Any = classmethod(refuse_to_be_measured)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **diffusers_options: Any,
    ) -> "TextEncoder":
        """Load the encoder that `save_pretrained` wrote, of any registered class.

        Args:
            pretrained_model_name_or_path: local folder.
            torch_dtype, dtype: precision instead of the saved one; the first in older versions of diffusers.
            diffusers_options: what diffusers passes to every component; each is honoured or refused.

        Raises:
            UserError: not such a folder, damaged, or an encoder of another class than `cls`.
        """
        device = check_options(diffusers_options)
        directory = Path(pretrained_model_name_or_path)
        found, settings = read_component(directory / TEXT_ENCODER_FILE, "text encoder", TEXT_ENCODERS, cls)
        return found.load(directory, settings, dtype or torch_dtype).to(device)
