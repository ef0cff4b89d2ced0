"""Which videos of a sampling command exist already, by the metadata inside their files. Imports no torch."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stdit.codecs.config import DecodingConfig
from stdit.errors import UserError
from stdit.pipelines.config import PIPELINE_DEFAULTS
from stdit.pipelines.model_calls import ModelCalls

KINDS = ("mp4", "gif")
"""Endings of video files."""
_NOT_COMPARED = ("checkpoint", "checkpoint_step", "lineage", "stdit", "files", *ModelCalls().facts())
"""Metadata that may differ between equal videos: where the weights, known by their hash, were found, what is recorded
of their training, by which version they were sampled, and how many model calls that took."""
_NOT_IN_OLD_FILES = {
    "tile": DecodingConfig.tile,
    **{name: PIPELINE_DEFAULTS[name] for name in ("solver", "cache", "pab", "pab_timesteps")},
}
"""Settings that videos of earlier versions do not record, with the values that they had."""
_NAME = re.compile(r"(?P<stem>\d+-(?P<rest>.*-seed\d+)(-\d+)?)\.(mp4|gif|json)")


@dataclass
class Existing:
    """What a folder has of one video."""

    stem: str
    """Name of its files, without their endings."""
    files: dict[str, Path]
    """Its video files by kind; none if only the .json is left."""


@dataclass
class FinishedVideos:
    """Videos in a folder, each of which is matched once."""

    folder: Path
    others: dict[str, str] = field(default_factory=dict)
    """Files with the name of a video, but other contents, and what differs."""
    _stems: dict[str, list[str]] = field(default_factory=dict)
    """Of the files, by what follows the number of the prompt in their names."""
    _matched: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        names = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []
        for found in filter(None, map(_NAME.fullmatch, names)):
            stems = self._stems.setdefault(found["rest"], [])
            if found["stem"] not in stems:
                stems.append(found["stem"])

    def match(self, stem: str, metadata: Mapping[str, Any]) -> Existing | None:
        """Return the video with this metadata, if there is one; its prompt may have had another number.

        Args:
            stem: the name that it would get.
        """
        _, _, rest = stem.partition("-")
        same_number = sorted(self._stems.get(rest, []), key=lambda one: not one.startswith(stem))
        for candidate in same_number:
            if candidate in self._matched:
                continue
            paths = {kind: self.folder / f"{candidate}.{kind}" for kind in KINDS}
            files = {kind: path for kind, path in paths.items() if path.is_file()}
            there = files.values() or [self.folder / f"{candidate}.json"]
            reasons = {path.name: difference(path, metadata) for path in there}
            if not any(reasons.values()):
                self._matched.add(candidate)
                return Existing(candidate, files)
            if candidate.startswith(stem):
                self.others |= {name: reason for name, reason in reasons.items() if reason}
        return None


def difference(path: Path, metadata: Mapping[str, Any]) -> str:
    """Return how the metadata in a file differs, or that the file is damaged; empty if it is this video."""
    from stdit.checkpoint_files import read_json
    from stdit.pipelines.video_io import is_whole_video, read_metadata

    is_video = path.suffix != ".json"
    try:
        found = compared(read_metadata(path) if is_video else read_json(path, "metadata"))
        wanted = compared(metadata)
    except UserError:
        return "it has no metadata of stdit, or is damaged"
    differing = [name for name in (*wanted, *found) if found.get(name) != wanted.get(name)]
    if differing:
        name = differing[0]
        more = f", and {len(set(differing)) - 1} more" if len(set(differing)) > 1 else ""
        return f"{name} = {found.get(name)}, not {wanted.get(name)}{more}"
    return "it is cut short" if is_video and not is_whole_video(path) else ""


def is_readable_json(path: Path) -> bool:
    """Return whether the .json beside a video is there and whole."""
    from stdit.checkpoint_files import read_json

    try:
        read_json(path, "metadata")
    except UserError:
        return False
    return True


def compared(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata that equal videos share, in JSON's types, with the size that was generated.

    Files are compared by their hashes alone.
    """
    metadata = {**_NOT_IN_OLD_FILES, **metadata}
    values = json.loads(json.dumps({name: metadata[name] for name in metadata if name not in _NOT_COMPARED}))
    for lora in values.get("loras", []):
        lora.pop("file", None)
    if files := values.get("conditioning_files"):
        places = {name: str(place) for place, name in enumerate(files)}
        split = [text.rpartition("@") for text in values.get("conditions", [])]
        values |= {
            "conditioning_files": list(files.values()),
            "image": places.get(values.get("image"), values.get("image")),
            "conditions": [f"{places.get(name, name)}@{where}" for name, _, where in split],
        }
        for entry in values.get("mask_strategy", []):
            entry["source"] = places.get(entry["source"], entry["source"])
    return values | values.pop("padded_from", {})


def describe_finished(finished: int, total: int) -> str:
    """Return a line such as "3 of 8 videos are finished already: skipped"."""
    if finished == total:
        what = "the video is" if total == 1 else f"all {total} videos are"
        return f"{what} finished already"
    return f"{finished} of {total} videos {'is' if finished == 1 else 'are'} finished already: skipped"


def describe_others(folder: Path, others: Mapping[str, str]) -> str:
    """Return a line that says which files keep their names and why."""
    name, reason = next(iter(others.items()))
    more = f", and {len(others) - 1} more" if len(others) > 1 else ""
    return f"{folder / name} stays as it is ({reason}){more}: the new videos get a number at the end of their names"
