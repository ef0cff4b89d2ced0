"""How a video of stdit was made, from its file, and whether it can be made again here."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel

from stdit.errors import UserError
from stdit.hashing import hash_file
from stdit.pipelines.conditions import parse_frame_condition
from stdit.pipelines.video_io import read_metadata
from stdit.serve.catalog import Catalog
from stdit.serve.errors import RequestError
from stdit.serve.places import ServerPlaces
from stdit.serve.submissions import replayable


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


def inspect_video(file: BinaryIO, name: str, catalog: Catalog, places: ServerPlaces) -> Inspection:
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
            metadata = read_metadata(copy)
        except UserError:
            shown = re.split(r"[\\/]", name)[-1][:120] or "the file"
            raise RequestError(
                f"{shown}: holds no metadata of stdit: drop an mp4 that sample.py or this page has made.",
                param="file",
                code="no_metadata",
            ) from None
    return inspect_metadata(metadata, catalog, places)


def inspect_metadata(metadata: Mapping[str, Any], catalog: Catalog, places: ServerPlaces) -> Inspection:
    """Return how a video was made, from the metadata of its file, and whether it can be made again here."""
    weights = metadata.get("checkpoint_hash")
    model = catalog.find_weights(weights) if isinstance(weights, str) and weights else None
    settings = replayable(metadata) | ({"any_size": True} if metadata.get("num_frames") else {})
    reasons = []
    missing = None
    if model is None:
        missing = (
            f"its checkpoint is not here: {str(metadata.get('checkpoint', 'unknown')):.200}, step "
            f"{metadata.get('checkpoint_step')}, weights {str(weights):.60}."
        )
        reasons.append(missing)
    else:
        settings["model"] = model
    try:
        conditions = _conditions(metadata, places)
        loras = _loras(metadata, catalog)
    except RequestError as error:
        conditions, loras = [], []
        reasons.append(str(error))
    settings |= ({"conditions": conditions} if conditions else {}) | ({"loras": loras} if loras else {})
    if metadata.get("mask_strategy"):
        reasons.append("its conditioning frames are in Open-Sora's notation, which requests do not have.")
    return Inspection(
        settings=settings,
        metadata=dict(metadata),
        model=model,
        missing=missing,
        reproducible=not reasons and bool(settings.get("prompt")),
        reason=" ".join(reasons) or None,
    )


def _conditions(metadata: Mapping[str, Any], places: ServerPlaces) -> list[dict[str, Any]]:
    """Return the conditioning frames of a video as a request has them; their files must be among the uploads."""
    texts = [text for text in metadata.get("conditions") or [] if isinstance(text, str)]
    if isinstance(image := metadata.get("image"), str):
        texts = [f"{image}@0:1", *texts]
    hashes = metadata.get("conditioning_files")
    wanted = hashes if isinstance(hashes, Mapping) else {}
    uploads = {hash_file(one): one.name for one in places.uploads.folder.glob("file_*")} if texts else {}
    found = []
    for text in texts:
        try:
            condition = parse_frame_condition(text)
        except UserError as error:
            raise RequestError(str(error)) from None
        upload = uploads.get(wanted.get(str(condition.source), ""))
        if upload is None:
            raise RequestError(
                f"its conditioning frames {Path(str(condition.source)).name} are not among the uploads: send that "
                "file, then drop the video again."
            )
        place = {"upload": upload, "frame": condition.frame_index, "length": condition.length}
        found.append(place | {"strength": condition.strength})
    return found


def _loras(metadata: Mapping[str, Any], catalog: Catalog) -> list[dict[str, Any]]:
    """Return the adapters of a video as a request has them."""
    entries = [one for one in metadata.get("loras") or [] if isinstance(one, Mapping)]
    known = {hash_file(file): name for name, file in catalog.adapters().items()} if entries else {}
    found = []
    for entry in entries:
        name = known.get(str(entry.get("hash")))
        if name is None:
            raise RequestError(f"its adapter {str(entry.get('file')):.200} is not here.")
        found.append({"id": name, "weight": entry.get("weight", 1.0)})
    return found
