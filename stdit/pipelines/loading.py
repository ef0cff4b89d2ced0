"""A pipeline from what a user points at: a run folder, one of its checkpoints, or an exported pipeline."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stdit.checkpoint_files import hash_bytes, hash_file, newest_whole, read_meta, step_of, verify
from stdit.errors import UserError

MODEL_INDEX = "model_index.json"
WEIGHTS = ".safetensors"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where weights come from: an exported pipeline, or a checkpoint of a run."""

    path: Path
    run: Path | None
    """The run folder that it belongs to, if any."""
    is_pipeline: bool


def find_source(checkpoint: str | Path, ema: bool = True) -> Source:
    """Decide what ``checkpoint`` names, and check that it is whole. Loads no weights, imports little.

    Of a run folder, the newest whole checkpoint is taken, or its pipeline if that is at least as new.

    Raises:
        UserError: if there is nothing to sample from, or what there is is damaged.
    """
    if not str(checkpoint):
        raise UserError(
            "no checkpoint: add --checkpoint with a run folder (outputs/NAME) or a pipeline folder."
        )
    path = Path(checkpoint)
    if not path.exists():
        raise UserError(
            f"checkpoint {path}: there is no such folder. Give a run (outputs/NAME), a checkpoint, or a "
            "pipeline folder."
        )
    if (path / MODEL_INDEX).is_file():
        return Source(path, path.parent if (path.parent / "config.yaml").is_file() else None, True)
    if step_of(path) is not None or (path / "meta.json").is_file():
        verify(path, needed=_weights(ema))
        return Source(path, path.parent.parent, False)
    newest, passed_over = newest_whole(path / "checkpoints", needed=_weights(ema))
    for reason in passed_over:
        logger.warning("passed over: %s", reason)
    exported = path / "pipeline"
    has_pipeline = (exported / MODEL_INDEX).is_file()
    if has_pipeline and (newest is None or (pipeline_step(exported) or 0) >= (step_of(newest) or 0)):
        return Source(exported, path, True)
    if newest is None:
        raise UserError(
            f"checkpoint {path} holds neither a whole checkpoint (checkpoints/step-...) nor a pipeline: "
            + (f"{passed_over[0]}" if passed_over else "train first, or give another folder.")
        )
    return Source(newest, path, False)


def load_pipeline(
    checkpoint: str | Path | Source, ema: bool = True, text: str | None = None
) -> tuple[Any, str]:
    """Load a ready `STDiTPipeline`, in fp32 on the CPU, and the hash of the weights that it uses.

    Args:
        checkpoint: a run, checkpoint or pipeline folder, or what `find_source` made of it.
        ema: take the averaged weights of a checkpoint (an exported pipeline has those anyway).
        text: folder of stored text states, in place of the text encoder.

    Raises:
        UserError: as `find_source`; also if the weights are not those of the model beside them.
    """
    from stdit.pipelines.pipeline import STDiTPipeline

    source = checkpoint if isinstance(checkpoint, Source) else find_source(checkpoint, ema)
    if source.is_pipeline:
        weights = sorted((source.path / "transformer").glob("*.safetensors"))
        if not weights:
            raise UserError(f"pipeline {source.path}: transformer/ holds no .safetensors file.")
        replaced = {} if text is None else {"text_encoder": _stored(text)}
        return STDiTPipeline.from_pretrained(source.path, **replaced), hash_file(weights[0])
    return _from_checkpoint(source, ema, text)


def load_codec(source: Source) -> Any:
    """The codec of a source, without its models."""
    from stdit.codecs.base import VideoCodec

    if source.is_pipeline:
        return VideoCodec.from_pretrained(source.path / "codec")
    assert source.run is not None
    return _load_codec(source.run, _read_config(source.run))


def model_settings(source: Source) -> dict[str, Any]:
    """The settings of a source's STDiT; its weights are not read."""
    from stdit.codecs.loading import read_json

    return read_json(
        source.path / ("transformer" if source.is_pipeline else "model") / "config.json", "a model"
    )


def pipeline_settings(source: Source) -> dict[str, Any]:
    """What a source's pipeline does unless told otherwise, as far as it is recorded; nothing is loaded."""
    from stdit.codecs.loading import read_json

    if source.is_pipeline:
        return read_json(source.path / MODEL_INDEX, "a pipeline")
    return read_meta(source.path).get("pipeline", {})


def check_text(text: str, texts: Iterable[str], source: Source) -> None:
    """Raise UserError unless a folder has states of these texts, as wide as a source's model takes them."""
    stored, width = _stored(text), model_settings(source)["caption_channels"]
    if stored.channels != width:
        raise UserError(
            f"text = {text}: its states have {stored.channels} channels, but the model takes {width}: encode the "
            "prompts with the encoder that it was trained with."
        )
    stored.check(texts)


def pipeline_step(folder: Path) -> int | None:
    """The training step that an exported pipeline records."""
    from stdit.codecs.loading import read_json

    return read_json(folder / MODEL_INDEX, "a pipeline").get("step")


def _weights(ema: bool) -> Any:
    """Which files of a checkpoint sampling reads; the optimizer's need not be whole."""
    return lambda name: name.startswith("model/") or (ema and name.startswith("ema/"))


def _from_checkpoint(source: Source, ema: bool, text: str | None) -> tuple[Any, str]:
    from stdit.codecs.loading import explain_load_errors, local_weights
    from stdit.diffusion.flow import RectifiedFlow
    from stdit.pipelines.pipeline import STDiTPipeline

    assert source.run is not None
    meta = read_meta(source.path)
    transformer, used = load_transformer(source.path, meta, ema)
    config = _read_config(source.run)
    text_encoder = _load_text_encoder(source.run, config) if text is None else _stored(text)
    trained_with = meta.get("experiment", {}).get("text encoder's weights")
    if text is not None and trained_with not in (None, text_encoder.fingerprint()):
        raise UserError(
            f"text = {text}: its states are not of the encoder that {source.run} was trained with."
        )
    schedule = source.run / "scheduler"
    with explain_load_errors("the run's schedule", local_weights(schedule)):
        flow = RectifiedFlow.from_pretrained(schedule)
    pipe = STDiTPipeline(
        transformer=transformer,
        codec=_load_codec(source.run, config),
        text_encoder=text_encoder,
        scheduler=flow,
        step=meta.get("step"),
        **meta.get("pipeline", {}),
    )
    return pipe, weights_hash(meta, used)


def load_transformer(folder: Path, meta: dict[str, Any], ema: bool) -> tuple[Any, str]:
    """The STDiT of a verified checkpoint, and the part of it (ema or model) whose weights it has."""
    from stdit.models.stdit import STDiT
    from stdit.parallel.processes.storage import StoredTensors

    has_average = any(name.startswith("ema/") for name in meta["files"])
    if ema and not has_average:
        logger.warning("checkpoint %s has no averaged weights: using the model's own", folder)
    used = "ema" if ema and has_average else "model"
    if "model/config.json" not in meta["files"]:
        raise UserError(f"checkpoint {folder} lacks model/config.json: use another checkpoint.")
    transformer = STDiT.from_config(STDiT.load_config(folder / "model"))
    StoredTensors(folder / used).read_into(transformer.state_dict())
    return transformer.eval(), used


def weights_hash(meta: dict[str, Any], part: str) -> str:
    """That of the file of a part of a checkpoint; of several, a hash of theirs."""
    files = sorted(meta["files"].items())
    hashes = [
        entry["hash"] for name, entry in files if name.startswith(f"{part}/") and name.endswith(WEIGHTS)
    ]
    return hashes[0] if len(hashes) == 1 else hash_bytes("".join(hashes).encode())


def _read_config(run: Path) -> dict[str, Any]:
    import yaml

    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{run} is not a run: it has no config.yaml. Keep checkpoints inside their run's folder."
        )
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no settings")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}): write it anew.") from None
    return config


def _load_codec(run: Path, config: dict[str, Any]) -> Any:
    """The codec saved with the run, or the one that the run's config names."""
    from stdit.codecs import build_codec
    from stdit.codecs.base import VideoCodec
    from stdit.codecs.config import CodecConfig

    if (run / "codec").is_dir():
        return VideoCodec.from_pretrained(run / "codec")
    return build_codec(CodecConfig(**_tuples(config.get("codec", {}))))


def _load_text_encoder(run: Path, config: dict[str, Any]) -> Any:
    from stdit.codecs import build_text_encoder
    from stdit.codecs.config import TextEncoderConfig
    from stdit.codecs.text import TextEncoder

    if (run / "text_encoder").is_dir():
        return TextEncoder.from_pretrained(run / "text_encoder")
    return build_text_encoder(TextEncoderConfig(**_tuples(config.get("text_encoder", {}))))


def _stored(folder: str) -> Any:
    from stdit.codecs import build_text_encoder
    from stdit.codecs.config import TextEncoderConfig

    return build_text_encoder(TextEncoderConfig(name="stored", path=folder))


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """YAML has no tuples; the config dataclasses do."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
