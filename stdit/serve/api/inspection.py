"""How a video of stdit was made, from its file, and whether it can be made again here."""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel

from stdit.errors import UserError
from stdit.hashing import hash_file
from stdit.pipelines.conditions import parse_frame_condition
from stdit.pipelines.config import VIDEO_SETTINGS
from stdit.serve.errors import RequestError
from stdit.serve.json_values import sendable
from stdit.serve.metadata_reader import read_hostile_metadata
from stdit.serve.queue.catalog import Catalog
from stdit.serve.queue.uploads import Uploads, shown_name


class Inspection(BaseModel):
    """How a video was made."""

    settings: dict[str, Any]
    """A request that makes it again."""
    metadata: dict[str, Any]
    model: str | None
    """The model with its weights; None: it is not here."""
    missing: str | None
    """Which weights are not here."""
    reproducible: bool
    reason: str | None
    """Why it cannot be made again."""


@dataclass
class Inspector:
    """How videos were made, as their files say.

    Args:
        check: raises UserError for a request that would be refused.
    """

    catalog: Catalog
    uploads: Uploads
    check: Callable[[Mapping[str, Any]], object]
    _hashes: dict[Any, str] = field(default_factory=dict)
    """Hashes of files, as the metadata of videos has them, by what changes with the file."""

    def sent_file(self, file: BinaryIO, name: str) -> Inspection:
        """Read how a video was made from a file that a client sent.

        Raises:
            RequestError: if it is no video of stdit.
        """
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "video"
            with open(copy, "wb") as kept:
                shutil.copyfileobj(file, kept)
            try:
                return self.file(copy)
            except UserError:
                shown = shown_name(name) or "the file"
                raise RequestError(
                    f"{shown}: holds no metadata of stdit: drop an mp4 that sample.py or this page has made.",
                    param="file",
                    code="no_metadata",
                ) from None

    def file(self, video: Path) -> Inspection:
        """Read how a video was made. Raises UserError if its file holds no metadata that can be sent."""
        found = read_hostile_metadata(video)
        if found is None:
            raise UserError(f"{video.name} holds no metadata of stdit: choose a video that it has made.")
        try:
            metadata = sendable(found)
        except ValueError as error:
            raise UserError(f"{video.name}: its metadata cannot be shown ({error}).") from None
        return self.metadata(metadata)

    def metadata(self, metadata: Mapping[str, Any]) -> Inspection:
        """Return how a video was made, from the metadata of its file, and whether it can be made again here."""
        weights = metadata.get("checkpoint_hash")
        model = self.catalog.find_weights(weights) if isinstance(weights, str) and weights else None
        missing = None
        if model is None:
            missing = (
                f"its checkpoint is not here: {str(metadata.get('checkpoint', 'unknown')):.200}, step "
                f"{str(metadata.get('checkpoint_step')):.20}, weights {str(weights):.60}."
            )
        settings, reason = dict(_replayable(metadata)), missing
        try:
            settings = self._request(metadata)
            if model is not None:
                settings["model"] = model
                self.check(settings)
        except UserError as error:
            reason = missing or str(error)
        return Inspection(
            settings=settings,
            metadata=dict(metadata),
            model=model,
            missing=missing,
            reproducible=reason is None,
            reason=reason,
        )

    def _request(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return the request for a video: as the server has recorded it, or from the settings of a command line."""
        if isinstance(asked := metadata.get("request"), Mapping):
            return dict(asked)
        if metadata.get("mask_strategy"):
            raise RequestError(
                "its conditioning frames are in Open-Sora's notation, which requests do not have."
            )
        found = {"conditions": self._conditions(metadata), "loras": self._loras(metadata)}
        settings = dict(_replayable(metadata)) | {"any_size": True}
        return settings | {name: entries for name, entries in found.items() if entries}

    def _conditions(self, metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the conditioning frames of a video as a request has them; their files must be among the uploads."""
        texts = [text for text in _entries(metadata, "conditions") if isinstance(text, str)]
        if isinstance(image := metadata.get("image"), str):
            texts = [f"{image}@0:1", *texts]
        hashes = metadata.get("conditioning_files")
        wanted = hashes if isinstance(hashes, Mapping) else {}
        known = self._named({one.name: one for one in self.uploads.folder.glob("file_*")} if texts else {})
        found = []
        for text in texts:
            condition = parse_frame_condition(text)
            upload = known.get(str(wanted.get(str(condition.source))))
            if upload is None:
                raise RequestError(
                    f"its conditioning frames {Path(str(condition.source)).name} are not among the uploads: send "
                    "that file, then drop the video again."
                )
            place = {"upload": upload, "frame": condition.frame_index, "length": condition.length}
            found.append(place | {"strength": condition.strength})
        return found

    def _loras(self, metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the adapters of a video as a request has them."""
        entries = [one for one in _entries(metadata, "loras") if isinstance(one, Mapping)]
        known = self._named(self.catalog.adapters() if entries else {})
        found = []
        for entry in entries:
            name = known.get(str(entry.get("hash")))
            if name is None:
                raise RequestError(f"its adapter {str(entry.get('file')):.200} is not here.")
            found.append({"id": name, "weight": entry.get("weight", 1.0)})
        return found

    def _named(self, files: Mapping[str, Path]) -> dict[str, str]:
        """Return the names of files by the hashes of their content, each of which is computed once."""
        found = dict[str, str]()
        for name, file in files.items():
            try:
                status = file.stat()
                state = (
                    name,
                    status.st_size,
                    0 if file.parent == self.uploads.folder else status.st_mtime_ns,
                )
                if state not in self._hashes:
                    self._hashes[state] = hash_file(file)
            except OSError:
                continue  # it has just been removed
            found[self._hashes[state]] = name
        return found


def _entries(metadata: Mapping[str, Any], name: str) -> list[Any]:
    entries = metadata.get(name)
    return entries if isinstance(entries, list) else []


def _replayable(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a request for a video from the metadata in its file, without model and conditions."""
    names = [
        "prompt",
        "seed",
        *VIDEO_SETTINGS,
        "negative_prompt",
        "segments",
        "segment_prompts",
        "overlap",
        "loop",
    ]
    found = {name: metadata[name] for name in names if metadata.get(name) not in (None, [], "")}
    padded_from = metadata.get("padded_from")
    found |= padded_from if isinstance(padded_from, Mapping) else {}
    if found.get("segments") == 1:
        found = {name: value for name, value in found.items() if name not in ("segments", "overlap", "loop")}
    resolved = {name: found.get(name) for name in VIDEO_SETTINGS}
    return {name: value for name, value in found.items() if _has_effect(name, resolved)}


def _has_effect(name: str, settings: Mapping[str, Any]) -> bool:
    """Return whether a recorded setting has an effect beside the others: what has none would be refused."""
    if name in ("refine_level", "refine_guidance_scale"):
        return bool(settings["refine_pairs"])
    if name == "guidance_interval":
        return settings["guidance_schedule"] == "interval"
    if name == "pab_timesteps":
        return bool(settings["pab"])
    return True
