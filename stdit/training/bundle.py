"""Make the model that comes with stdit: averaged weights of a run as a small pipeline, with a record of training."""

import json
import logging
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import torch

import stdit
from stdit.checkpoint_files import META, newest_whole, read_json, read_meta, seal_folder, verify
from stdit.codecs.compact_weights import compact_folder
from stdit.data.clip_list import ClipList
from stdit.errors import UserError, listed
from stdit.hashing import hash_file
from stdit.pipelines.bundled import BUNDLED, ORIGIN
from stdit.pipelines.loading import load_pipeline
from stdit.pipelines.pipeline import STDiTPipeline
from stdit.pipelines.sources import CheckpointSource, find_checkpoint_source
from stdit.pipelines.untrained import words_of
from stdit.training.disk import folders_beside, replace_folder
from stdit.training.lineage import CLIP_LIST

logger = logging.getLogger(__name__)

MAX_BYTES = 12 * 10**6
"""Of a bundled pipeline, since everyone who installs stdit gets it."""
LOSS_STEPS = 100
"""The recorded loss is the mean of the losses of this many last steps."""
CODEC_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


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
    pipe.register_to_config(vocabulary=" ".join(vocabulary))
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
        for part in ("transformer", "vae"):
            compact_folder(aside / part)
        seal_folder(aside, pipe.components)
        reloaded, origin["weights"] = load_pipeline(aside)
        _check_fp32(reloaded)
        _check_packaged_codec(aside, folder)
        _write_origin(aside, origin)
        _check_size(aside)
        _check_nothing_lost(folder, aside)
    return origin


def record_scores(scores: Path, folder: Path) -> dict[str, Any]:
    """Write scores into the ``origin.json`` of a bundled pipeline, and return its content.

    Args:
        scores: what ``scripts/evaluate_adherence.py --output`` wrote.

    Raises:
        UserError: if the folder is no whole bundled pipeline, or the scores are of other weights.
    """
    folder = folder.absolute()
    rated = _read_scores(scores)
    if not (folder / ORIGIN).is_file():
        raise UserError(f"output {folder}: there is no bundled pipeline: make it first, with --checkpoint.")
    _check_beside(folder)
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


def _read_scores(file: Path) -> dict[str, Any]:
    """Return scores and weights. Raises UserError unless they are those of a model with its own settings."""
    if not file.is_file():
        raise UserError(
            f"scores {file}: there is no such file: give what evaluate_adherence.py --output wrote."
        )
    rated = read_json(file, "a file of scores")
    sets = rated.get("scores")
    if not (isinstance(sets, dict) and sets and all(map(_are_scores, sets.values()))):
        raise UserError(f"scores {file}: it has no scores: give what evaluate_adherence.py --output wrote.")
    if rated.get("weights") is None:
        raise UserError(
            f"scores {file}: these are not of a model, but of videos or of a codec: score the bundled pipeline, "
            "without --videos and --codec."
        )
    if changed := rated.get("changed_settings"):
        pairs = changed.items() if isinstance(changed, dict) else [("changed_settings", changed)]
        shown = ", ".join(f"{name} = {value}" for name, value in pairs)
        raise UserError(
            f"scores {file}: these were measured with {shown}: score the bundled pipeline with its own settings."
        )
    return rated


def _are_scores(scores: Any) -> bool:
    return isinstance(scores, dict) and all(
        type(value) in (int, float) and isfinite(value) for value in scores.values()
    )


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
    """Raise UserError if there is anything but an older bundled pipeline, which may lack files."""
    _check_beside(folder)
    if folder == BUNDLED or not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / ORIGIN).is_file()):
        raise UserError(f"output {folder} exists, and is no bundled pipeline: choose another --output.")


def _check_beside(folder: Path) -> None:
    """Raise UserError if folders lie beside this one that `replace_folder` would remove."""
    for beside in folders_beside(folder):
        if beside.exists():
            raise UserError(
                f"{beside} is in the way of output {folder}: remove it if it is left from an interrupted command, or "
                "choose another --output."
            )


def _check_nothing_lost(old: Path, new: Path) -> None:
    """Raise UserError if an older bundled pipeline has files that the one in its place does not have."""
    before, after = (
        {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        for folder in (old, new)
    )
    if lost := sorted(before - after):
        raise UserError(
            f"output {old} holds {listed(lost[:3], len(lost))}, which the new pipeline has not and which would be "
            "lost: move that away, or choose another --output."
        )


def _checkpoint_of_run(checkpoint: Path) -> CheckpointSource:
    """Return the newest checkpoint of a run, also if it has a pipeline: that has no list of captions."""
    source = find_checkpoint_source(checkpoint)
    if not source.is_pipeline:
        return source
    newest, passed_over = (
        (None, []) if source.run is None else newest_whole(source.run / "checkpoints", needed=_is_used)
    )
    for reason in passed_over:
        logger.warning("skipped checkpoint: %s", reason)
    if newest is None:
        why = f": {passed_over[0]}" if passed_over else ": give a run folder (outputs/NAME)."
        raise UserError(
            f"checkpoint {checkpoint}: only checkpoints tell how a model was trained and on which words, and there "
            f"is no complete one{why}"
        )
    return CheckpointSource(newest, source.run, False)


def _is_used(name: str) -> bool:
    """Return whether a file of a checkpoint goes into the pipeline: the optimizer's need not be whole."""
    return name.startswith(("model/", "ema/")) or name == CLIP_LIST


def _training_facts(source: CheckpointSource, step: int) -> dict[str, Any]:
    """Return hours, and losses at the end, from the first ``step`` lines of the run's metrics.jsonl.

    The hours are those of the steps and of waiting for data: without encoding, validation and saving.
    """
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
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}: line {number} is damaged ({error}): remove it.") from error
        if not (isinstance(record, dict) and record.keys() >= {"step", "loss", "seconds", "data_seconds"}):
            raise UserError(f"{file}: line {number} is not the record of a step: remove it.")
        yield record


def _commit() -> str | None:
    """Return the present commit of this clone, with "+changes" if files differ from it; None without clone or git."""
    clone = Path(stdit.__file__).parents[1]
    if not (clone / ".git").exists() or shutil.which("git") is None:
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
    for name, part in (("transformer", pipe.transformer), ("vae", pipe.vae)):
        other = [
            t.dtype for t in part.state_dict().values() if t.is_floating_point() and t.dtype != torch.float32
        ]
        if other:
            raise UserError(
                f"the {name} {type(part).__name__} computes in {other[0]} once its matrices are stored compactly: "
                "its load() must copy them into weights in fp32."
            )


def _check_packaged_codec(new: Path, folder: Path) -> None:
    """Raise UserError if the codec that comes with stdit, in ``folder``, would become another one.

    It is known by its hash in the manifest, so that a damaged or missing one can be replaced by itself.
    """
    if folder != BUNDLED or not (folder / META).is_file():
        return
    packaged = read_meta(folder, "the model that comes with stdit,")["files"].get(CODEC_WEIGHTS)
    if packaged is not None and packaged["hash"] != hash_file(new / CODEC_WEIGHTS):
        raise UserError(
            f"the run's codec is not the one in {folder / 'vae'}, which codec.name = tiny stands for: choose "
            "another --output, or train with that codec."
        )


def _check_size(folder: Path) -> None:
    parts = folder_sizes(folder)
    if (total := sum(parts.values())) > MAX_BYTES:
        shown = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sorted(parts.items()))
        raise UserError(
            f"the pipeline has {total / 1e6:.1f} MB ({shown}), but at most {MAX_BYTES / 1e6:.0f} MB come with stdit: "
            "train a smaller model or codec."
        )
