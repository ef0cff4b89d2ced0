"""The components of a pipeline: what wraps those of diffusers and transformers, and what reads them."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from stdit.checkpoint_files import META, read_json, verify_if_sealed
from stdit.codecs.base import VideoCodec
from stdit.codecs.config import CODECS
from stdit.codecs.diffusers_vae import DiffusersCodec
from stdit.codecs.text import TextEncoder
from stdit.codecs.transformers_text import TransformersTextEncoder
from stdit.errors import UserError

# diffusers loads components only from libraries that it knows.
LOADABLE_CLASSES.setdefault(
    "stdit",
    {name: ["save_pretrained", "from_pretrained"] for name in ("ModelMixin", "SchedulerMixin")},
)

OWN_BASES: dict[str, type[VideoCodec] | type[TextEncoder]] = {"vae": VideoCodec, "text_encoder": TextEncoder}
"""By component, the class whose ``from_pretrained`` reads any registered codec or text encoder."""
FORMER_COMPONENT = "codec"
"""A component that pipelines had before they had those of diffusers."""


def wrap_vae(vae: Any, module: str | None = None) -> VideoCodec:
    """Return the codec of a pipeline's ``vae``: that itself, or a wrapper of diffusers' VAE.

    Args:
        module: that registers the class, if a user added it.

    Raises:
        UserError: for a class that is neither.
    """
    vae = getattr(vae, "_orig_mod", vae)  # compiled
    if isinstance(vae, VideoCodec):
        return vae
    CODECS.check(type(vae).__name__, [module] if module else [])
    return DiffusersCodec(vae)


def wrap_text_encoder(text_encoder: Any, tokenizer: Any, settings: Mapping[str, Any]) -> TextEncoder:
    """Return the text encoder of a pipeline: that itself, or a wrapper of a model and tokenizer of transformers.

    Args:
        settings: keyword arguments of `TransformersTextEncoder`.

    Raises:
        UserError: if there is no tokenizer, or the model does not fit the settings.
    """
    if isinstance(text_encoder, TextEncoder):
        return text_encoder
    if tokenizer is None:
        raise UserError(
            f"text_encoder is a {type(text_encoder).__name__}, but tokenizer is None: pass that too."
        )
    return TransformersTextEncoder("auto", tokenizer, text_encoder, **settings)


def check_quantisation(config: Any, components: Collection[str]) -> None:
    """Raise UserError if diffusers' config names a component that there is not, or one of another library's kind."""
    mapping = getattr(config, "quant_mapping", None) or {}
    named = list(mapping or getattr(config, "components_to_quantize", None) or [])
    if unknown := sorted(set(named) - set(components)):
        raise UserError(
            f"quantization_config names {', '.join(unknown)}: the pipeline has {', '.join(sorted(components))}."
        )
    for name, needed in (("transformer", "diffusers"), ("text_encoder", "transformers")):
        given = type(mapping.get(name))
        if name in mapping and not given.__module__.startswith(f"{needed}."):
            raise UserError(
                f"quantization_config: that of {name} is a {given.__module__}.{given.__name__}: use the class of "
                f"that name in {needed}."
            )


def check_can_be_saved(components: Mapping[str, Any]) -> None:
    """Raise UserError if a component is quantised in a way that its library cannot save."""
    for name, component in components.items():
        quantizer: Any = getattr(component, "hf_quantizer", None)
        saves = getattr(quantizer, "is_serializable", True)
        if not (saves() if callable(saves) else saves):
            raise UserError(
                f"save_pretrained: {name} is quantised by a {type(quantizer.quantization_config).__name__}, and "
                f"{type(quantizer).__module__.split('.')[0]} cannot save it: save the pipeline without, and quantise "
                "it when it is loaded."
            )


def verify_pipeline(folder: Path, index: str) -> bool:
    """Verify a pipeline's folder, but for components that verify themselves; return whether it has a manifest.

    Args:
        index: name of the file that makes it a pipeline.

    Raises:
        UserError: if it is damaged, no pipeline, or one that an earlier version wrote.
    """
    sealed = verify_if_sealed(
        folder, lambda name: not (folder / name).parent.joinpath(META).is_file() or "/" not in name
    )
    if FORMER_COMPONENT in read_json(folder / index, "a pipeline"):
        raise UserError(
            f"pipeline {folder}: an earlier version of stdit exported it ({FORMER_COMPONENT}/ instead of vae/), and "
            "this one cannot read it: give a checkpoint of its run (outputs/NAME/checkpoints/step-...) instead, and "
            "save that pipeline."
        )
    return sealed
