"""Load a pipeline: from a checkpoint of a run, or an exported one. Imports torch where it is needed."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stdit.checkpoint_files import read_json, read_meta
from stdit.errors import UserError
from stdit.hashing import hash_bytes, hash_file
from stdit.pipelines.config import check_recorded
from stdit.pipelines.sources import MODEL_INDEX, WEIGHTS, CheckpointSource, find_checkpoint_source
from stdit.registry import Registry

logger = logging.getLogger(__name__)


def load_pipeline(
    checkpoint: str | Path | CheckpointSource | None = None, ema: bool = True, text_states: str | None = None
) -> tuple[Any, str]:
    """Load an `STDiTPipeline`, in fp32 on the CPU; return it and the hash of its weights.

    Args:
        checkpoint: a run, checkpoint or pipeline folder, or a result of `find_checkpoint_source`; None: the small
            model that comes with stdit.
        ema: use the averaged weights of a checkpoint (an exported pipeline always has those).
        text_states: folder of stored text states, used instead of the text encoder.

    Raises:
        UserError: as `find_checkpoint_source`; also if the weights do not fit the model's config.
    """
    from stdit.codecs.loading import explain_load_errors, local_weights, quiet
    from stdit.pipelines.pipeline import STDiTPipeline

    source = (
        checkpoint if isinstance(checkpoint, CheckpointSource) else find_checkpoint_source(checkpoint, ema)
    )
    if source.is_pipeline:
        weights = sorted((source.path / "transformer").glob("*.safetensors"))
        if not weights:
            raise UserError(f"pipeline {source.path}: transformer/ holds no .safetensors file.")
        replaced = {} if text_states is None else {"text_encoder": None, "tokenizer": None}
        with (
            explain_load_errors("the pipeline", local_weights(source.path)),
            quiet("diffusers"),
            quiet("transformers"),
        ):
            pipe = STDiTPipeline.from_pretrained(source.path, **replaced)
        if text_states is not None:
            pipe.register_modules(text_encoder=_stored(text_states))
        return pipe, _hash_of([*map(hash_file, weights)])
    return _from_checkpoint(source, ema, text_states)


def load_codec(source: CheckpointSource) -> Any:
    """Load the codec of a source alone."""
    from stdit.codecs.loading import explain_load_errors, local_weights, quiet
    from stdit.pipelines.pipeline import STDiTPipeline

    if source.is_pipeline:
        others = dict.fromkeys(("transformer", "text_encoder", "tokenizer", "scheduler"))
        with explain_load_errors("the pipeline", local_weights(source.path)), quiet("diffusers"):
            return STDiTPipeline.from_pretrained(source.path, **others).codec
    return _load_codec(_run_of(source), read_meta(source.path))


def load_skeleton(source: CheckpointSource) -> Any:
    """Load an `STDiTPipeline` with its codec, a model without weights (on the meta device), and no text encoder."""
    from stdit.codecs.loading import explain_load_errors, local_weights, quiet
    from stdit.models.config import STDiTConfig
    from stdit.models.size import meta_model
    from stdit.pipelines.pipeline import STDiTPipeline

    transformer = meta_model(STDiTConfig.read(model_settings(source)))
    if not source.is_pipeline:
        run, meta = _run_of(source), read_meta(source.path)
        return _assemble(meta, transformer, _load_codec(run, meta), None)
    with explain_load_errors("the pipeline", local_weights(source.path)), quiet("diffusers"):
        return STDiTPipeline.from_pretrained(
            source.path, transformer=transformer, text_encoder=None, tokenizer=None
        )


def text_encoder_bytes(source: CheckpointSource) -> int:
    """Return the bytes of the weights of a source's text encoder, which are not read; 0 if they are on the hub."""
    from stdit.codecs.config import TextEncoderConfig
    from stdit.codecs.transformers_text import minilm_folder

    folder = (source.path if source.is_pipeline else _run_of(source)) / "text_encoder"
    if (file := folder / "text_encoder.json").is_file():
        used = read_json(file, "a text encoder")
    elif folder.is_dir():
        used = {}
    else:
        used = read_meta(source.path).get("config", {}).get("text_encoder", {})
        folder = Path(used.get("path") or folder) / (used.get("subfolder") or "")
    if used.get("name") == "stored":
        return 0
    files = list(folder.expanduser().glob(f"*{WEIGHTS}"))
    if not files and not used.get("path") and used.get("name", TextEncoderConfig.name) == "minilm":
        files = list(minilm_folder().glob(f"*{WEIGHTS}"))  # a package has them
    return sum(file.stat().st_size for file in files)


def model_settings(source: CheckpointSource) -> dict[str, Any]:
    """Return the settings of a source's STDiT; its weights are not read."""
    return read_json(
        source.path / ("transformer" if source.is_pipeline else "model") / "config.json", "a model"
    )


def pipeline_settings(source: CheckpointSource) -> dict[str, Any]:
    """Return the recorded default settings of a source's pipeline; nothing is loaded.

    Raises:
        UserError: if one has a wrong type or breaks its rule.
    """
    if source.is_pipeline:
        recorded = read_json(source.path / MODEL_INDEX, "a pipeline")
    else:
        recorded = read_meta(source.path).get("pipeline", {})
    check_recorded(recorded, f"{source.path}: ")
    return recorded


def check_text_states(folder: str, texts: Iterable[str], source: CheckpointSource) -> None:
    """Raise UserError unless a folder has states of all these texts, as wide as the source's model needs them."""
    stored, width = _stored(folder), model_settings(source)["caption_channels"]
    if stored.channels != width:
        raise UserError(
            f"text_states = {folder}: the states have {stored.channels} channels, but the model takes {width}: "
            "encode the prompts with the encoder that it was trained with."
        )
    stored.check(texts)


def _from_checkpoint(source: CheckpointSource, ema: bool, text_states: str | None) -> tuple[Any, str]:
    from stdit.pipelines.weights import load_transformer

    run, meta = _run_of(source), read_meta(source.path)
    transformer, used = load_transformer(source.path, meta, ema)
    text_encoder = _load_text_encoder(run, meta) if text_states is None else _stored(text_states)
    trained_with = meta.get("experiment", {}).get("text encoder's weights")
    if text_states is not None and trained_with not in (None, text_encoder.fingerprint()):
        raise UserError(
            f"text_states = {text_states}: these states are not of the encoder that {run} was trained with: "
            "encode the prompts with that one."
        )
    return _assemble(meta, transformer, _load_codec(run, meta), text_encoder), weights_hash(meta, used)


def _assemble(meta: dict[str, Any], transformer: Any, codec: Any, text_encoder: Any) -> Any:
    """Return the pipeline of a checkpoint with this manifest."""
    from stdit.diffusion.config import PREDICTIONS, FlowConfig
    from stdit.diffusion.scheduler import RectifiedFlow
    from stdit.pipelines.pipeline import STDiTPipeline

    config = meta.get("config", {})
    flow = config.get("flow", {})
    PREDICTIONS.check(flow.get("prediction", FlowConfig.prediction), config.get("imports") or ())
    return STDiTPipeline(
        transformer=transformer,
        vae=codec,
        text_encoder=text_encoder,
        tokenizer=None,
        scheduler=RectifiedFlow(),
        flow=flow,
        step=meta.get("step"),
        lineage=meta.get("lineage", []),
        **meta.get("pipeline", {}),
    )


def weights_hash(meta: dict[str, Any], part: str) -> str:
    """Return the hash of the weights in a folder of a checkpoint; for an adapter, also of those of its base."""
    files = sorted(meta["files"].items())
    hashes = [
        entry["hash"] for name, entry in files if name.startswith(f"{part}/") and name.endswith(WEIGHTS)
    ]
    return _hash_of([meta["base"]["hash"], *hashes] if "base" in meta else hashes)


def _hash_of(hashes: Sequence[str]) -> str:
    """Return the hash of weights from those of their files: of several files, the hash of their hashes."""
    return hashes[0] if len(hashes) == 1 else hash_bytes("".join(hashes).encode())


def _run_of(source: CheckpointSource) -> Path:
    """Return the run of a checkpoint, which may have a copy of the codec.

    Its config.yaml is for people, who may edit it: the settings are read from the checkpoint's manifest, which proves
    itself.
    """
    assert source.run is not None
    if not (source.run / "config.yaml").is_file():
        raise UserError(
            f"{source.run} is not a run: it has no config.yaml: keep checkpoints inside their run folder."
        )
    return source.run


def _load_codec(run: Path, meta: dict[str, Any]) -> Any:
    """Load the codec saved with the run, or build the one that the checkpoint's settings name."""
    from stdit.codecs import build_codec
    from stdit.codecs.base import VideoCodec
    from stdit.codecs.config import CODECS, CodecConfig

    if (run / "codec").is_dir():
        return VideoCodec.from_pretrained(run / "codec")
    return build_codec(_recorded(meta, "codec", CodecConfig, CODECS))


def _load_text_encoder(run: Path, meta: dict[str, Any]) -> Any:
    from stdit.codecs import build_text_encoder
    from stdit.codecs.config import TEXT_ENCODERS, TextEncoderConfig
    from stdit.codecs.text import TextEncoder

    if (run / "text_encoder").is_dir():
        return TextEncoder.from_pretrained(run / "text_encoder")
    return build_text_encoder(_recorded(meta, "text_encoder", TextEncoderConfig, TEXT_ENCODERS))


def _recorded(meta: dict[str, Any], group: str, config_class: Any, registry: Registry[Any]) -> Any:
    """Return the recorded settings of a codec or text encoder. Raises UserError if its name is not registered."""
    config = meta.get("config", {})
    settings = {  # lists as tuples, which the config dataclasses have and JSON does not
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config.get(group, {}).items()
    }
    registry.check(settings.get("name", config_class.name), config.get("imports") or ())
    return config_class(**settings)


def _stored(folder: str) -> Any:
    from stdit.codecs import build_text_encoder
    from stdit.codecs.config import TextEncoderConfig

    return build_text_encoder(TextEncoderConfig(name="stored", path=folder))
