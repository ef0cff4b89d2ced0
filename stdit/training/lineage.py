"""What may change when a run resumes, what differs in words, and the record of it: the lineage of a run."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stdit.checkpoint_files import META, read_meta
from stdit.data.clip_list import ClipList
from stdit.errors import UserError
from stdit.hashing import hash_bytes
from stdit.models.config import with_current_names

CLIP_LIST = "clips.safetensors.gz"
"""File of a checkpoint: the clips that its run trained on."""
CLIPS = "clips"
"""Key of an experiment: the hash of its clips."""
FIXED = {
    "model.": "its weights are of another architecture",
    **dict.fromkeys(
        ("codec's", *(f"codec.{name}" for name in ("name", "dtype", "stride", "channels", "fit_clips"))),
        "its weights were trained on the latents of another codec",
    ),
    "text": "its weights were trained with another text encoder",
    "flow.prediction": "the output of its weights has another meaning",
    "optimizer.name": "its state is that of another optimizer",
    "base": "its adapter was trained on other weights",
    "teacher": "it learned from another one",
    **dict.fromkeys(("distill.guidance_scale", "distill.steps"), "it learned something else"),
    **dict.fromkeys(("lora.rank", "lora.targets", "lora.dora"), "its adapter is of another kind"),
}
"""Beginnings of the keys of an experiment that cannot change, and why."""
_REQUIRED = {"step": int, "experiment": dict, "nonfinite_in_a_row": int, "batch_splits": int}
"""Keys of the manifest that resuming reads, with their types."""


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run resumes from, and what the run does differently from then on."""

    checkpoint: Path
    meta: dict[str, Any]
    """The manifest of the checkpoint."""
    changes: list[str]
    """In words; empty if the run continues as it was."""

    def __str__(self) -> str:
        changes = f", with {'; '.join(self.changes)}" if self.changes else ""
        return f"resumed from step {self.meta['step']} ({self.checkpoint}){changes}"


def check_can_resume(checkpoint: Path, experiment: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of a checkpoint, if an experiment can continue with its weights and optimizer state.

    Keys that only one of the experiments has are not compared: some are known only when the components are built.

    Raises:
        UserError: naming the settings that differ and cannot change, or the keys that the manifest lacks.
    """
    meta = read_meta(checkpoint)
    for key, kind in _REQUIRED.items():
        if not isinstance(meta.get(key), kind):
            raise UserError(
                f"checkpoint {checkpoint}: {META} has no valid {key}: use another checkpoint, or delete this folder "
                "to resume from the one before it."
            )
    meta["experiment"] = with_current_names(meta["experiment"], "model.")
    for setting, what in (("lora.rank", "an adapter"), ("distill.guidance_scale", "a student")):
        had, has = (setting in one for one in (meta["experiment"], experiment))
        if had != has:
            no_kind = f"no {what.split()[1]}"
            holds, asks = (what, f"{setting} is not set") if had else (no_kind, f"{setting} is set")
            hint = "" if had else f" (and train {what} on its weights by --init_from {checkpoint})"
            raise UserError(
                f"checkpoint {checkpoint} holds {holds}, but {asks}: go back to its settings, or choose another "
                f"--name{hint}."
            )
    found = [
        f"{change} ({FIXED[start]})"
        for key, change in _differences(meta["experiment"], experiment)
        for start in FIXED
        if key.startswith(start)
    ]
    if found:
        same = meta["experiment"].get("model.blocks") == experiment.get("model.blocks")
        same &= "distill.guidance_scale" not in experiment  # no training begins with a student
        weights = f" and start from its weights by --init_from {checkpoint}, if they have the same shapes"
        raise UserError(
            f"checkpoint {checkpoint} cannot be resumed with {'; '.join(found)}. Go back to its settings, or choose "
            f"another --name{weights if same else ''}."
        )
    return meta


def resume(checkpoint: Path, experiment: Mapping[str, Any], clips: ClipList, allowed: bool) -> Resumed:
    """Compare an experiment with the one of a checkpoint.

    Args:
        experiment: settings, and the hash of the clips.
        clips: that hash is of.
        allowed: whether the run may continue with changes.

    Raises:
        UserError: naming what differs, if that cannot change or is not allowed to.
    """
    meta = check_can_resume(checkpoint, experiment)
    changes = [change for key, change in _differences(meta["experiment"], experiment) if key != CLIPS]
    if meta["experiment"].get(CLIPS, experiment[CLIPS]) != experiment[CLIPS]:
        changes = _clip_changes(checkpoint, clips) + changes
    if changes and not allowed:
        raise UserError(
            f"checkpoint {checkpoint} is of another experiment: {'; '.join(changes)}. Add --resume_changed to "
            f"continue from step {meta['step']} with that, go back to what it was, or choose another --name (and "
            f"start from its weights by --init_from {checkpoint})."
        )
    return Resumed(checkpoint, meta, changes)


def lineage(resumed: Resumed | None, experiment: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the changes of a run so far: step, what changed, and hashes of the experiment before and after."""
    if resumed is None:
        return []
    past: list[dict[str, Any]] = resumed.meta.get("lineage", [])
    if not resumed.changes:
        return past
    hashes = {"from": _hash(resumed.meta["experiment"]), "to": _hash(experiment)}
    return [*past, {"step": resumed.meta["step"], "changes": resumed.changes, **hashes}]


def unneeded(resume_changed: bool, init_from: str | None, resumed: Resumed | None) -> list[str]:
    """Return a line for each of these settings that has no effect at this start of a run."""
    lines = []
    if resume_changed and (resumed is None or not resumed.changes):
        why = "there is no checkpoint" if resumed is None else "nothing has changed"
        lines.append(f"resume_changed = true has no effect: {why}")
    other = resumed is not None and init_from not in (None, resumed.meta.get("config", {}).get("init_from"))
    frozen = resumed is not None and not {"base", "teacher"}.isdisjoint(resumed.meta)  # may have moved
    if resumed is not None and other and not frozen:
        lines.append(f"init_from = {init_from} has no effect: the run resumes from its own checkpoint")
    return lines


def same_batches(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two experiments have the same batch in each step; a setting that one lacks is newer than it."""
    keys = {key for key in one.keys() & other.keys() if key in ("seed", CLIPS) or key.startswith("data.")}
    return all(one[key] == other[key] for key in keys)


def _hash(experiment: Mapping[str, Any]) -> str:
    return hash_bytes(json.dumps(experiment, sort_keys=True).encode())


def _clip_changes(checkpoint: Path, clips: ClipList) -> list[str]:
    file = checkpoint / CLIP_LIST
    if not file.is_file():
        return [f"other clips ({file} is missing, which would tell the difference)"]
    return clips.changes_since(ClipList.read(file))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each key of two experiments whose values differ, with the change in words."""
    for key in new:
        if key in old and old[key] != new[key]:
            for change in _changes(key, old[key], new[key]):
                yield key, change


def _changes(key: str, old: Any, new: Any) -> Iterator[str]:
    """Yield in words how a value differs, entry by entry in groups and lists of groups."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(f"{key}.{name}", old.get(name), new.get(name)) for name in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and _are_groups(old + new):
        pairs = [(f"{key}[{place}]", *pair) for place, pair in enumerate(zip(old, new, strict=True))]
    else:
        yield f"{key} {_shown(old)} -> {_shown(new)}"
        return
    for name, before, after in pairs:
        if before != after:
            yield from _changes(name, before, after)


def _are_groups(values: list[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
