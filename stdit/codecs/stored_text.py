"""Precomputed text states: training and sampling need not load the text encoder.

A folder has `text_states.json`, which describes the encoder that computed the states, and files of many captions
each.
Captions can be added at any time. Letters: B batch, L text tokens, E width of the text states, N tokens of one file.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import count, pairwise
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (diffusers looks for it here)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stdit.atomic_files import atomic_write
from stdit.codecs.config import TextEncoderConfig
from stdit.codecs.loading import dtype_name
from stdit.codecs.text import TextEncoder
from stdit.errors import UserError
from stdit.hashing import hash_arrays, hash_tensor, read_sealed, sealed_json
from stdit.umask import apply_umask

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
        facts = _read_facts(self.folder)
        for fact, kind in _FACTS.items():
            if type(facts.get(fact)) is not kind:
                raise UserError(f"{self.folder / STATES_FILE} has no valid {fact}: encode again.")
        self.channels, self.max_length, self._fingerprint = (facts[fact] for fact in _FACTS)
        self._places: dict[str, _Place] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            self._places |= _captions(file, self.channels)

    def __contains__(self, text: str) -> bool:
        return text in self._places

    def check(self, texts: Iterable[str]) -> None:
        if missing := [text for text in texts if text not in self]:
            raise UserError(
                f"{self.folder} has no states of {len(missing)} captions, such as {missing[0]!r}: add them with "
                f"scripts/encode_text.py --output {self.folder}, the same encoder and, for a training, "
                "--training with its config file, or --caption_scores and --trigger as there."
            )

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        if not texts:
            raise ValueError("encode() needs at least one text")
        self.check(texts)
        places = [self._places[text] for text in texts]
        lengths = torch.tensor([place.end - place.begin for place in places], device=self.device)
        mask = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]
        states = torch.zeros(*mask.shape, self.channels, device=self.device)
        for row, place in enumerate(places):
            states[row, : lengths[row]] = place.read().float()
        return states, mask

    def fingerprint(self) -> str:
        """Return the fingerprint of the encoder that computed the states."""
        return self._fingerprint

    @classmethod
    def from_config(cls, config: TextEncoderConfig) -> Self:
        return cls(config.path or "")

    def saved_settings(self) -> dict[str, Any]:
        return {"folder": str(self.folder.resolve())}


class _Place(NamedTuple):
    """Where the states of a caption are: the tokens [begin, end) of an open file."""

    file: Path
    opened: Any
    begin: int
    end: int
    hash: int

    def read(self) -> Tensor:
        """Return the states. Raises UserError if their bytes have changed since they were written."""
        states: Tensor = self.opened.get_slice("states")[self.begin : self.end]
        if hash_tensor(states) != self.hash:
            raise UserError(
                f"text states {self.file} have changed since they were written: delete the file, and encode again."
            )
        return states


def _read_facts(folder: Path) -> dict[str, Any]:
    file = folder / STATES_FILE
    if not file.is_file():
        raise UserError(
            f"{str(folder)!r} is not a folder of text states (scripts/encode_text.py makes one): it has no "
            f"{STATES_FILE}"
        )
    try:
        return read_sealed(file)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(file)!r} is damaged ({error}): delete the folder, and encode again.") from None


def _header_hash(captions: list[str], states: Any, arrays: dict[str, Tensor]) -> str:
    """Return the hash of what a file says about its states.

    Args:
        states: the tensor, or a slice of an open file.
    """
    shape = states.get_shape() if hasattr(states, "get_shape") else list(states.shape)
    facts = {"captions": captions, "states": [str(states[:0].dtype), shape]}
    return hash_arrays(facts, {name: tensor.numpy() for name, tensor in arrays.items()})


def _captions(file: Path, channels: int) -> dict[str, _Place]:
    """Map each caption of a file to the place of its states."""
    try:
        opened = safe_open(file, framework="pt")
        captions = json.loads(opened.metadata()["captions"])
        arrays = {name: opened.get_tensor(name) for name in ("offsets", "hashes")}
        if opened.metadata().get("hash") != _header_hash(captions, opened.get_slice("states"), arrays):
            raise ValueError("it has changed since it was written")
        offsets, hashes = (tensor.tolist() for tensor in arrays.values())
        if not (isinstance(captions, list) and all(isinstance(caption, str) for caption in captions)):
            raise ValueError("its captions are no texts")
        if (
            opened.get_slice("states").get_shape() != [offsets[-1], channels]
            or not len(offsets) == len(captions) + 1 == len(hashes) + 1
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
    places = zip(captions, offsets[:-1], offsets[1:], hashes, strict=True)
    return {caption: _Place(file, opened, begin, end, seal) for caption, begin, end, seal in places}


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
            (folder / STATES_FILE).write_text(sealed_json(facts), encoding="utf-8")
        elif (found := _read_facts(folder)) != facts:
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
    stored = states[mask].to("cpu", dtype)
    hashes = [hash_tensor(stored[begin:end]) for begin, end in pairwise(offsets.tolist())]
    arrays = {"offsets": offsets, "hashes": torch.tensor(hashes)}
    about = {"captions": json.dumps(texts), "hash": _header_hash(texts, stored, arrays)}
    with atomic_write(file) as temporary:
        save_file({"states": stored, **arrays}, temporary, about)
        apply_umask(temporary)
