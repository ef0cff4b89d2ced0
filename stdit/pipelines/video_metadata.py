"""What the file of a video says of how it was made: all that makes it again, and no folder of the machine.

Files are known by their hashes, wherever they lie. Imports no torch.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import stdit
from stdit.hashing import hash_file
from stdit.lora.config import LoRASpec
from stdit.pipelines.config import SampleConfig
from stdit.pipelines.requests import Request


def recorded_path(path: str | Path, names: int = 1) -> str:
    """Return a path relative to the working folder; of one outside it, the last ``names`` names."""
    whole = Path(os.path.abspath(path))
    working = Path.cwd()
    return str(whole.relative_to(working) if whole.is_relative_to(working) else Path(*whole.parts[-names:]))


def provenance(
    config: SampleConfig, checkpoint: Path, weights: str, recorded: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what made the videos of a command: precision, and the checkpoint with its step, lineage and hash.

    Args:
        checkpoint: a pipeline, or a checkpoint of a run.
        weights: their hash.
        recorded: settings of the pipeline.
    """
    # with the name of its run, by which people know it
    names = 3 if checkpoint.parent.name == "checkpoints" else 2 if checkpoint.name == "pipeline" else 1
    return {
        "dtype": config.dtype,
        "tile": config.codec.tile,
        "checkpoint": recorded_path(checkpoint, names),
        "checkpoint_hash": weights,
        "checkpoint_step": recorded["step"],
        "lineage": recorded["lineage"] or [],
        "stdit": stdit.__version__,
    }


def video_metadata(
    request: Request, defaults: Mapping[str, Any], origin: Mapping[str, Any], hashes: dict[str, str]
) -> dict[str, Any]:
    """Return what is needed to make a video again: prompt, seed, settings, files with their hashes, and its origin.

    Args:
        defaults: settings that apply where the request has none.
        origin: see `provenance`.
        hashes: of conditioning files by path, those that are known; others are added.
    """
    sources = [one.source for one in request.all_conditions()]
    sources += [one.source for one in request.mask_entries]
    paths = [str(source) for source in sources if isinstance(source, str | Path)]
    for path in paths:
        if path not in hashes:
            hashes[path] = hash_file(Path(path))
    names = _names(paths, hashes)

    def named(source: Any) -> Any:
        return names[str(source)] if isinstance(source, str | Path) else source

    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        **request.settings.resolved(defaults),
        "image": None if request.image is None else str(named(request.image)),
        "conditions": [str(replace(one, source=named(one.source))) for one in request.conditions],
        "mask_strategy": [asdict(one) | {"source": named(one.source)} for one in request.mask_entries],
        "segments": request.segments.count,
        "segment_prompts": list(request.segment_prompts),
        "overlap": request.segments.overlap,
        "loop": request.segments.loop,
        **origin,
        **({"loras": [_lora_facts(lora) for lora in request.loras]} if request.loras else {}),
        **({"extra": request.extra} if request.extra else {}),
        **({"conditioning_files": {names[path]: hashes[path] for path in paths}} if paths else {}),
    }


def _lora_facts(lora: LoRASpec) -> dict[str, Any]:
    return {"file": recorded_path(lora.file), "weight": lora.weight, "hash": lora.hash}


def _names(paths: Sequence[str], hashes: Mapping[str, str]) -> dict[str, str]:
    """Return what files are called in metadata, by path: two of the same name are told apart by their hashes."""
    names = dict[str, str]()
    for path in paths:
        name = recorded_path(path)
        others = {hashes[other] for other, taken in names.items() if taken == name}
        names[path] = f"{hashes[path]}/{name}" if others - {hashes[path]} else name
    return names
