"""Find and load a pipeline: from a run folder, one of its checkpoints, or an exported pipeline."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stdit.checkpoint_files import META, newest_whole, read_json, read_meta, step_of, verify, verify_if_sealed
from stdit.errors import UserError
from stdit.hashing import hash_bytes, hash_file
from stdit.pipelines.bundled import bundled_folder
from stdit.pipelines.config import check_recorded
from stdit.registry import Registry

MODEL_INDEX = "model_index.json"
WEIGHTS = ".safetensors"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointSource:
    """Location of the weights: an exported pipeline, or a checkpoint of a run."""

    path: Path
    run: Path | None
    """The run folder that contains it, if any."""
    is_pipeline: bool


def find_checkpoint_source(checkpoint: str | Path | None, ema: bool = True) -> CheckpointSource:
    """Find out what ``checkpoint`` names, and verify that it is complete. Loads no weights and imports no torch.

    A run folder stands for its newest complete checkpoint, or its pipeline if that is at least as new and ``ema`` is
    true: a pipeline has averaged weights alone. Of a pipeline only the small files are verified here, if it has a
    manifest: components verify themselves when they are loaded. None stands for the model that comes with stdit.

    Raises:
        UserError: if there is nothing to sample from, or it is damaged.
    """
    if checkpoint is None:
        return _exported_source(bundled_folder(), None, ema)
    if not str(checkpoint):
        raise UserError(
            "no checkpoint: give --checkpoint a run folder (outputs/NAME) or a pipeline folder, or leave it out for "
            "the model that comes with stdit."
        )
    path = Path(checkpoint)
    if not path.exists():
        raise UserError(
            f"checkpoint {path}: there is no such folder. Give a run (outputs/NAME), a checkpoint, or a "
            "pipeline folder."
        )
    if (path / MODEL_INDEX).is_file():
        verify_if_sealed(path, _is_small)
        run = path.parent if (path.parent / "config.yaml").is_file() else None
        return _exported_source(path, run, ema)
    if step_of(path) is not None or is_checkpoint(path):
        verify(path, needed=_weights(ema))
        return CheckpointSource(path, path.parent.parent, False)
    newest, passed_over = newest_whole(path / "checkpoints", needed=_weights(ema))
    for reason in passed_over:
        logger.warning("skipped checkpoint: %s", reason)
    exported = path / "pipeline"
    if has_pipeline := (exported / MODEL_INDEX).is_file():
        verify_if_sealed(exported, _is_small)
    if has_pipeline and (
        newest is None or (ema and (pipeline_step(exported) or 0) >= (step_of(newest) or 0))
    ):
        return _exported_source(exported, path, ema)
    if newest is None:
        raise UserError(
            f"checkpoint {path} holds neither a complete checkpoint (checkpoints/step-...) nor a pipeline: "
            + (f"{passed_over[0]}" if passed_over else "train first, or give another folder.")
        )
    return CheckpointSource(newest, path, False)


def _exported_source(folder: Path, run: Path | None, ema: bool) -> CheckpointSource:
    """Return the source of a pipeline folder. Raises UserError if other weights than its only ones are asked for."""
    if not ema:
        raise UserError(
            f"checkpoint {folder} is an exported pipeline, whose only weights are the averaged ones, but ema = false "
            "asks for others: give a checkpoint of the run, or leave ema out."
        )
    return CheckpointSource(folder, run, True)


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


def find_initial_weights(init_from: str) -> Path:
    """Return the model folder or checkpoint with the weights of ``init_from``. Raises UserError if there is none."""
    folder = Path(init_from)
    weights = "diffusion_pytorch_model.safetensors"
    if (folder / weights).is_file() or (folder / f"{weights}.index.json").is_file():
        return folder
    try:
        source = find_checkpoint_source(folder)
    except UserError as error:
        raise UserError(f"init_from = {init_from}: {error}") from None
    return source.path / "transformer" if source.is_pipeline else source.path


def read_initial_model(source: str) -> Any:
    """Read the model of ``init_from``: a run, checkpoint, pipeline or model folder. Raises UserError."""
    return _read_model(find_initial_weights(source))


def _read_model(folder: Path) -> Any:
    """Read the model of a checkpoint or model folder."""
    from stdit.codecs.loading import explain_load_errors, local_weights
    from stdit.models.stdit import STDiT

    if is_checkpoint(folder):
        return load_transformer(folder, read_meta(folder), ema=True)[0]
    with explain_load_errors("init_from", local_weights(folder)):
        return STDiT.from_pretrained(folder, use_safetensors=True)


class AdapterBase(NamedTuple):
    """The model that an adapter is trained on, as checkpoints record it."""

    hash: str
    """Of its weights, with merged adapters."""
    path: str
    """Absolute; of a checkpoint or model folder, not of a run, which may have a newer one tomorrow."""
    merge: list[str]
    """Adapters that are merged into it first, FILE:weight, with absolute paths."""


def read_base(source: str, merge: Sequence[str], any_base: bool = True) -> tuple[Any, AdapterBase]:
    """Read the model that an adapter is trained on, and say what it is.

    Args:
        source: as ``init_from``.
        merge: adapters that are merged into it first, FILE[:weight].
        any_base: also those that say that they were trained on other weights.

    Raises:
        UserError: if it or an adapter cannot be read, or they do not fit.
    """
    from stdit.lora.config import parse_lora
    from stdit.lora.files import base_hash, merge_adapters

    folder, loras = find_initial_weights(source).resolve(), [parse_lora(text) for text in merge]
    model = _read_model(folder)
    merge_adapters(model, loras, any_base, "--lora.other_base")
    merged = [f"{lora.file.resolve()}:{lora.weight!r}" for lora in loras]
    return model, AdapterBase(base_hash(model), str(folder), merged)


def load_codec(source: CheckpointSource) -> Any:
    """Load the codec of a source alone."""
    from stdit.codecs.loading import explain_load_errors, local_weights, quiet
    from stdit.pipelines.pipeline import STDiTPipeline

    if source.is_pipeline:
        others = dict.fromkeys(("transformer", "text_encoder", "tokenizer", "scheduler"))
        with explain_load_errors("the pipeline", local_weights(source.path)), quiet("diffusers"):
            return STDiTPipeline.from_pretrained(source.path, **others).codec
    return _load_codec(_run_of(source), read_meta(source.path))


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


def pipeline_step(folder: Path) -> int | None:
    """Return the training step that an exported pipeline records."""
    return read_json(folder / MODEL_INDEX, "a pipeline").get("step")


def _weights(ema: bool) -> Any:
    """Return a filter for the files that sampling reads; the optimizer's need not be complete."""
    return lambda name: name.startswith("model/") or (ema and name.startswith("ema/"))


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a checkpoint of a run: the components of pipelines have manifests, too."""
    return (folder / META).is_file() and (folder / "model").is_dir()


def _is_small(name: str) -> bool:
    return not name.endswith(WEIGHTS)


def _from_checkpoint(source: CheckpointSource, ema: bool, text_states: str | None) -> tuple[Any, str]:
    from stdit.diffusion.config import PREDICTIONS, FlowConfig
    from stdit.diffusion.scheduler import RectifiedFlow
    from stdit.pipelines.pipeline import STDiTPipeline

    run, meta = _run_of(source), read_meta(source.path)
    transformer, used = load_transformer(source.path, meta, ema)
    text_encoder = _load_text_encoder(run, meta) if text_states is None else _stored(text_states)
    trained_with = meta.get("experiment", {}).get("text encoder's weights")
    if text_states is not None and trained_with not in (None, text_encoder.fingerprint()):
        raise UserError(
            f"text_states = {text_states}: these states are not of the encoder that {run} was trained with: "
            "encode the prompts with that one."
        )
    config = meta.get("config", {})
    flow = config.get("flow", {})
    PREDICTIONS.check(flow.get("prediction", FlowConfig.prediction), config.get("imports") or ())
    pipe = STDiTPipeline(
        transformer=transformer,
        vae=_load_codec(run, meta),
        text_encoder=text_encoder,
        tokenizer=None,
        scheduler=RectifiedFlow(),
        flow=flow,
        step=meta.get("step"),
        lineage=meta.get("lineage", []),
        **meta.get("pipeline", {}),
    )
    return pipe, weights_hash(meta, used)


def load_transformer(folder: Path, meta: dict[str, Any], ema: bool) -> tuple[Any, str]:
    """Load the STDiT of a verified checkpoint; return it and the folder of its weights, ema or model.

    A checkpoint of an adapter gives its base with the adapter merged into it.
    """
    from stdit.lora.adapters import merge_adapter
    from stdit.models.opensora import stdit_names
    from stdit.models.stdit import STDiT
    from stdit.parallel.processes.parameters import trained_state
    from stdit.parallel.processes.storage import StoredTensors

    has_average = any(name.startswith("ema/") for name in meta["files"])
    if ema and not has_average:
        logger.warning("checkpoint %s has no averaged weights: using the model's own", folder)
    used = "ema" if ema and has_average else "model"
    if "model/config.json" not in meta["files"]:
        raise UserError(f"checkpoint {folder} lacks model/config.json: use another checkpoint.")
    if "adapter" in meta:
        transformer = _load_base(folder, meta)
        StoredTensors(folder / used).read_into(trained_state(transformer))
        merge_adapter(transformer)
    else:
        transformer = STDiT.from_config(STDiT.load_config(folder / "model"))
        StoredTensors(folder / used, stdit_names(transformer.config)).read_into(transformer.state_dict())
    return transformer.eval(), used


def _load_base(folder: Path, meta: dict[str, Any]) -> Any:
    """Return the base of a checkpoint's adapter, and in it an adapter whose weights are still to be read.

    Raises:
        UserError: if it is missing, or has other weights than in training.
    """
    from peft import LoraConfig as PeftConfig

    base = meta["base"]
    if not Path(base["path"]).exists():
        raise UserError(
            f"checkpoint {folder}: holds an adapter, and {base['path']}, whose weights it was trained on, is no "
            "more: put it there again, or sample from a copy of it with --lora and the adapter."
        )
    model, found = read_base(base["path"], base["merge"])
    if found.hash != base["hash"]:
        raise UserError(
            f"checkpoint {folder}: its adapter was trained on the weights {base['hash']}, but {base['path']} has "
            f"{found.hash}: put the former there again, or give the adapter by --lora, with --lora_other_base."
        )
    model.requires_grad_(False)
    model.add_adapter(PeftConfig(**meta["adapter"]), "default")
    return model


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
