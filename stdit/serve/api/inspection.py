"""How a video of stdit was made, from its file, and whether it can be made again here."""

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel

from stdit.errors import UserError
from stdit.hashing import hash_file
from stdit.pipelines.conditions import parse_frame_condition
from stdit.pipelines.video_io import read_metadata
from stdit.serve.errors import RequestError
from stdit.serve.json_values import sendable
from stdit.serve.queue.catalog import Catalog
from stdit.serve.queue.submissions import replayable
from stdit.serve.queue.uploads import Uploads


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
    """Reads how videos were made.

    Args:
        check: raises UserError for a request that would be refused.
    """

    catalog: Catalog
    uploads: Uploads
    check: Callable[[Mapping[str, Any]], object]

    def sent_file(self, file: BinaryIO, name: str) -> Inspection:
        """Read how a video was made from a file that a client sent.

        Raises:
            RequestError: if it is no video of stdit.
        """
        with tempfile.TemporaryDirectory() as folder:
            ending = ".gif" if file.read(4) == b"GIF8" else ".mp4"
            copy = Path(folder) / f"video{ending}"
            file.seek(0)
            copy.write_bytes(file.read())
            try:
                return self.file(copy)
            except UserError:
                shown = re.split(r"[\\/]", name)[-1][:120] or "the file"
                raise RequestError(
                    f"{shown}: holds no metadata of stdit: drop an mp4 that sample.py or this page has made.",
                    param="file",
                    code="no_metadata",
                ) from None

    def file(self, video: Path) -> Inspection:
        """Read how a video was made. Raises UserError if its file holds no metadata that can be sent."""
        try:
            metadata = sendable(read_metadata(video))
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
        settings, reason = dict(replayable(metadata)), missing
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
        settings = dict(replayable(metadata)) | {"any_size": True}
        return settings | {name: entries for name, entries in found.items() if entries}

    def _conditions(self, metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the conditioning frames of a video as a request has them; their files must be among the uploads."""
        texts = [text for text in metadata.get("conditions") or [] if isinstance(text, str)]
        if isinstance(image := metadata.get("image"), str):
            texts = [f"{image}@0:1", *texts]
        hashes = metadata.get("conditioning_files")
        wanted = hashes if isinstance(hashes, Mapping) else {}
        known = {hash_file(one): one.name for one in self.uploads.folder.glob("file_*")} if texts else {}
        found = []
        for text in texts:
            condition = parse_frame_condition(text)
            upload = known.get(wanted.get(str(condition.source), ""))
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
        entries = [one for one in metadata.get("loras") or [] if isinstance(one, Mapping)]
        known = {hash_file(file): name for name, file in self.catalog.adapters().items()} if entries else {}
        found = []
        for entry in entries:
            name = known.get(str(entry.get("hash")))
            if name is None:
                raise RequestError(f"its adapter {str(entry.get('file')):.200} is not here.")
            found.append({"id": name, "weight": entry.get("weight", 1.0)})
        return found
