"""Make the model that comes with stdit: averaged weights of a run as a small pipeline, with a record of training."""

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import stdit
from stdit.checkpoint_files import newest_whole, read_json, read_meta, seal_folder, verify
from stdit.codecs.base import VideoCodec
from stdit.codecs.compact_weights import compact_folder
from stdit.data.clip_list import ClipList
from stdit.errors import UserError
from stdit.pipelines.bundled import BUNDLED, ORIGIN
from stdit.pipelines.loading import CheckpointSource, find_checkpoint_source, load_pipeline
from stdit.pipelines.pipeline import STDiTPipeline
from stdit.pipelines.untrained import words_of
from stdit.training.disk import replace_folder
from stdit.training.lineage import CLIP_LIST

MAX_BYTES = 12 * 10**6
"""Of a bundled pipeline, since everyone who installs stdit gets it."""
LOSS_STEPS = 100
"""The recorded loss is the mean of as many last steps."""


def write_bundle(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Write the newest checkpoint of a run as a pipeline of at most `MAX_BYTES`; an older one is replaced.

    Matrices of transformer and codec are stored in bf16. The pipeline records the words of the captions,
    ``origin.json`` commit, settings, time and losses of the training.

    Args:
        checkpoint: a run, or one of its checkpoints.

    Returns:
        The content of ``origin.json``.

    Raises:
        UserError: if there is no checkpoint of a run, ``folder`` holds something else, another codec would come with
            stdit, or the pipeline is too large; nothing is written then.
    """
    source = _checkpoint_of_run(checkpoint)
    folder = folder.absolute()
    _check_replaceable(folder)
    meta = read_meta(source.path)
    pipe, _ = load_pipeline(source)
    texts = ClipList.read(source.path / CLIP_LIST).clips.texts
    vocabulary = sorted({word for index in range(len(texts)) for word in words_of(texts[index])})
    pipe.register_to_config(vocabulary=vocabulary)
    origin = {
        "parameters": sum(parameter.numel() for parameter in pipe.transformer.parameters()),
        "step": meta["step"],
        **_training_facts(source, meta["step"]),
        "commit": _commit(),
        "versions": meta["versions"],
        "scores": None,
        "lineage": meta.get("lineage", []),
        "config": meta["config"],
    }
    with replace_folder(f"bundle {folder}", folder, parents=True) as aside:
        pipe.save_pretrained(aside)
        for part in ("transformer", "codec"):
            compact_folder(aside / part)
        seal_folder(aside, pipe.components)
        reloaded, origin["weights"] = load_pipeline(aside)
        _check_fp32(reloaded)
        _check_packaged_codec(reloaded.codec, folder)
        _write_origin(aside, origin)
        _check_size(aside)
    return origin


def record_scores(scores: Path, folder: Path) -> dict[str, Any]:
    """Write scores into the ``origin.json`` of a bundled pipeline, and return its content.

    Args:
        scores: what ``scripts/evaluate_adherence.py --output`` wrote.

    Raises:
        UserError: if the folder is no whole bundled pipeline, or the scores are of other weights.
    """
    folder = folder.absolute()
    rated = read_json(scores, "a file of scores")
    if not isinstance(rated.get("scores"), dict) or "weights" not in rated:
        raise UserError(
            f"scores {scores}: it has no scores of a model: give what evaluate_adherence.py --output wrote."
        )
    verify(folder, kind="the bundled pipeline", way_out="make it again with --checkpoint")
    origin = read_json(folder / ORIGIN, "a bundled pipeline")
    if rated["weights"] != origin["weights"]:
        raise UserError(
            f"scores {scores}: are those of the weights {rated['weights']}, not of {origin['weights']} in {folder}: "
            "score that pipeline."
        )
    origin["scores"] = rated["scores"]
    with replace_folder(f"bundle {folder}", folder) as aside:
        shutil.copytree(folder, aside, dirs_exist_ok=True)
        _write_origin(aside, origin)
    return origin


def _write_origin(folder: Path, origin: Mapping[str, Any]) -> None:
    """Write ``origin.json`` into a pipeline folder and seal that anew."""
    text = json.dumps(origin, indent=1, ensure_ascii=False) + "\n"
    (folder / ORIGIN).write_text(text, encoding="utf-8")
    seal_folder(folder, (part.name for part in folder.iterdir() if part.is_dir()))


def folder_sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each subfolder of a pipeline folder, and of the files beside them (``.``)."""
    found: dict[str, int] = {}
    for file in folder.rglob("*"):
        if file.is_file():
            part = file.relative_to(folder).parts[0] if file.parent != folder else "."
            found[part] = found.get(part, 0) + file.stat().st_size
    return found


def _check_replaceable(folder: Path) -> None:
    """Raise UserError if there is something else than an older bundled pipeline, which may lack files."""
    if folder == BUNDLED or not folder.exists() or (folder / ORIGIN).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise UserError(f"output {folder} exists, and is no bundled pipeline: choose another --output.")


def _checkpoint_of_run(checkpoint: Path) -> CheckpointSource:
    """Return the newest checkpoint of a run, also if it has a pipeline: that has no list of captions."""
    source = find_checkpoint_source(checkpoint)
    if not source.is_pipeline:
        return source
    newest = None if source.run is None else newest_whole(source.run / "checkpoints")[0]
    if newest is None:
        raise UserError(
            f"checkpoint {checkpoint} is a pipeline without checkpoints, which tell how it was trained and on which "
            "words: give a run folder (outputs/NAME)."
        )
    return CheckpointSource(newest, source.run, False)


def _training_facts(source: CheckpointSource, step: int) -> dict[str, Any]:
    """Return hours, and losses at the end, from the first ``step`` lines of the run's metrics.jsonl."""
    assert source.run is not None
    lines = [line for line in _metrics(source.run / "metrics.jsonl") if line["step"] < step]
    seconds = [line["seconds"] + line["data_seconds"] for line in lines]
    losses = [line["loss"] for line in lines[-LOSS_STEPS:] if line["loss"] is not None]
    validation = [line["validation_loss"] for line in lines if line.get("validation_loss") is not None]
    return {
        "training_hours": round(sum(seconds) / 3600, 2) if lines else None,
        "loss": sum(losses) / len(losses) if losses else None,
        "validation_loss": validation[-1] if validation else None,
    }


def _metrics(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines but for an incomplete last one, which a killed run leaves. Raises UserError for a bad line."""
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True) if file.is_file() else [], 1):
        if not line.endswith(b"\n"):
            return
        try:
            yield json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}: line {number} is damaged ({error}): remove it.") from error


def _commit() -> str | None:
    """Return the present commit of this clone, with "+changes" if files differ from it; None outside of a clone."""
    clone = Path(stdit.__file__).parents[1]
    if not (clone / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(clone), *arguments], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the commit of {clone} is not known: git: {done.stderr.strip()}")
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + "+changes" * bool(changed)


def _check_fp32(pipe: STDiTPipeline) -> None:
    """Raise UserError unless a loaded pipeline computes in fp32."""
    for name, part in (("transformer", pipe.transformer), ("codec", pipe.codec)):
        other = [
            t.dtype for t in part.state_dict().values() if t.is_floating_point() and t.dtype != torch.float32
        ]
        if other:
            raise UserError(
                f"the {name} {type(part).__name__} computes in {other[0]} once its matrices are stored compactly: "
                "its load() must copy them into weights in fp32."
            )


def _check_packaged_codec(codec: VideoCodec, folder: Path) -> None:
    """Raise UserError if the codec that comes with stdit, in ``folder``, would become another one."""
    packaged = folder / "codec"
    if folder == BUNDLED and packaged.is_dir():
        if VideoCodec.from_pretrained(packaged).fingerprint() != codec.fingerprint():
            raise UserError(
                f"the run's codec is not the one in {packaged}, which codec.name = tiny stands for: choose another "
                "--output, or train with that codec."
            )


def _check_size(folder: Path) -> None:
    parts = folder_sizes(folder)
    if (total := sum(parts.values())) > MAX_BYTES:
        shown = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sorted(parts.items()))
        raise UserError(
            f"the pipeline has {total / 1e6:.1f} MB ({shown}), but at most {MAX_BYTES / 1e6:.0f} MB come with stdit: "
            "train a smaller model or codec."
        )
