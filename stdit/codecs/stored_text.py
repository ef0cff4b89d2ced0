"""Precomputed text states: training and sampling need not load the text encoder.

A folder has `text_states.json`, which describes the encoder that computed the states, and files of many captions
each.
Captions can be added at any time. Letters: B batch, L text tokens, E width of the text states, N tokens of one file.
"""

import json
import os
from collections.abc import Iterable, Iterator
from itertools import count
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (diffusers looks for it here)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stdit.checkpoint_files import apply_umask
from stdit.codecs.config import TextEncoderConfig
from stdit.codecs.loading import dtype_name, read_json, write_json
from stdit.codecs.text import TextEncoder
from stdit.errors import UserError

STATES_FILE = "text_states.json"
CAPTIONS_PER_FILE = 1024
_FACTS = {"channels": int, "max_length": int, "fingerprint": str}
"""Facts about the encoder that a folder records, with their types."""


class StoredTextEncoder(TextEncoder):
    """Look up the states of captions in a folder that `store_text` wrote."""

    name = "stored"

    def __init__(self, folder: str | PathLike[str]) -> None:
        """Read which captions there are.

        Raises:
            UserError: not such a folder, or damaged.
        """
        super().__init__()
        self.folder = Path(folder)
        facts = read_json(
            self.folder / STATES_FILE, "a folder of text states (scripts/encode_text.py makes one)"
        )
        for fact, kind in _FACTS.items():
            if type(facts.get(fact)) is not kind:
                raise UserError(f"{self.folder / STATES_FILE} has no valid {fact}: encode again.")
        self.channels, self.max_length, self._fingerprint = (facts[fact] for fact in _FACTS)
        self._places: dict[str, tuple[Any, int, int]] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            self._places |= _captions(file, self.channels)

    def __contains__(self, text: str) -> bool:
        return text in self._places

    def check(self, texts: Iterable[str]) -> None:
        if missing := [text for text in texts if text not in self]:
            raise UserError(
                f"{self.folder} has no states of {len(missing)} captions, such as {missing[0]!r}: add them with "
                f"scripts/encode_text.py --output {self.folder}, and the same encoder."
            )

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        if not texts:
            raise ValueError("encode() wants at least one text")
        self.check(texts)
        places = [self._places[text] for text in texts]
        lengths = torch.tensor([end - begin for _, begin, end in places], device=self.device)
        mask = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]
        states = torch.zeros(*mask.shape, self.channels, device=self.device)
        for row, (file, begin, end) in enumerate(places):
            states[row, : end - begin] = file.get_slice("states")[begin:end].float()
        return states, mask

    def fingerprint(self) -> str:
        """Return the fingerprint of the encoder that computed the states."""
        return self._fingerprint

    @classmethod
    def from_config(cls, config: TextEncoderConfig) -> Self:
        return cls(config.path or "")

    def saved_settings(self) -> dict[str, Any]:
        return {"folder": str(self.folder.resolve())}


def _captions(file: Path, channels: int) -> dict[str, tuple[Any, int, int]]:
    """Map each caption of a file to the open file, and the indices where its tokens begin and end."""
    try:
        opened = safe_open(file, framework="pt")
        captions = json.loads(opened.metadata()["captions"])
        offsets = opened.get_tensor("offsets").tolist()
        if not (isinstance(captions, list) and all(isinstance(caption, str) for caption in captions)):
            raise ValueError("its captions are no texts")
        if (
            opened.get_slice("states").get_shape() != [offsets[-1], channels]
            or len(offsets) != len(captions) + 1
        ):
            raise ValueError("its states are not those of its captions")
        if any(type(offset) is not int for offset in offsets) or [0, *sorted(offsets)] != [
            offsets[0],
            *offsets,
        ]:
            raise ValueError("its offsets do not rise from 0")
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"text states {file} cannot be read ({error}): delete it, and encode again."
        ) from error
    return {
        caption: (opened, begin, end)
        for caption, begin, end in zip(captions, offsets[:-1], offsets[1:], strict=True)
    }


def store_text(
    encoder: TextEncoder, texts: Iterable[str], folder: Path, dtype: torch.dtype = torch.bfloat16
) -> Iterator[int]:
    """Encode the captions that a folder does not have yet; after each file, yield its number of captions.

    Each file is written under a temporary name and renamed, so an interrupted call loses one file at most.

    Args:
        dtype: of the states on disk.

    Raises:
        UserError: if the folder holds states of another encoder, or cannot be written.
    """
    facts = {
        "channels": encoder.channels,
        "max_length": encoder.max_length,
        "fingerprint": encoder.fingerprint(),
        "dtype": dtype_name(dtype),
    }
    try:
        if not (folder / STATES_FILE).exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / STATES_FILE, facts)
        elif (found := read_json(folder / STATES_FILE, "a folder of text states")) != facts:
            odd = [name for name, value in facts.items() if found.get(name) != value]
            raise UserError(
                f"{folder} holds states of another encoder (another {', '.join(odd)}): use another folder."
            )
        stored = StoredTextEncoder(folder)
        new = [text for text in dict.fromkeys(texts) if text not in stored]
        names = (folder / f"states-{number:05d}.safetensors" for number in count())
        free = (file for file in names if not file.exists())  # a damaged file may have been deleted
        for start in range(0, len(new), CAPTIONS_PER_FILE):
            some = new[start : start + CAPTIONS_PER_FILE]
            _write(encoder, some, next(free), dtype)
            yield len(some)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} cannot be written ({error}): make room, or choose another folder."
        ) from error


def _write(encoder: TextEncoder, texts: list[str], file: Path, dtype: torch.dtype) -> None:
    states, mask = encoder.encode(texts)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cpu().cumsum(0)])
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    tensors = {"states": states[mask].to("cpu", dtype), "offsets": offsets}
    try:
        save_file(tensors, aside, {"captions": json.dumps(texts)})
        apply_umask(aside)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
