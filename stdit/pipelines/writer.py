"""Video files: names, metadata, and the contact sheet of a folder. Imports no torch at module level."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.errors import UserError
from stdit.pipelines.config import Format
from stdit.pipelines.requests import Request

if TYPE_CHECKING:
    import numpy as np


def _print_path(path: Path) -> None:
    print(path, flush=True)


@dataclass
class VideoWriter:
    """Write videos and their metadata into a folder, which is created, without replacing any file."""

    folder: Path
    formats: Sequence[Format]
    """mp4 and gif: a file per video; png: a contact sheet of all videos."""
    defaults: Mapping[str, Any]
    """Settings that apply where a request has none: ``pipe.config``."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Facts written to the metadata of every video, such as the hash of the weights."""
    report: Callable[[Path], None] = _print_path
    """Called with each file once it is complete."""
    written: list[Path] = field(default_factory=list)
    """Files so far, in order."""
    _rows: list[Any] = field(default_factory=list)

    def write(self, videos: Iterable[tuple[Request, "np.ndarray"]]) -> None:
        """Write each video in all formats, and its metadata in a .json beside it.

        Raises:
            UserError: if the disk is full or not writable; no partial file is left.
        """
        from stdit.pipelines import video_io

        for request, frames in videos:
            metadata = request_metadata(request, self.defaults, self.provenance)
            stem = free_stem(self.folder, f"{request.index:03d}-{slug(request.prompt)}-seed{request.seed}")
            names = [f"{stem}.{kind}" for kind in ("mp4", "gif") if kind in self.formats]
            with _explain_disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                for name in names:
                    write = video_io.write_mp4 if name.endswith(".mp4") else video_io.write_gif
                    write(self.folder / name, frames, metadata["fps"], metadata)
                video_io.write_json_atomic(self.folder / f"{stem}.json", {**metadata, "files": names})
            for name in (*names, f"{stem}.json"):
                self._add(self.folder / name)
            if "png" in self.formats:
                self._rows.append(video_io.sheet_row(frames, f"{request.prompt}  (seed {request.seed})"))

    def finish(self) -> list[Path]:
        """Write the contact sheet, if any; return all files written.

        Raises:
            UserError: if the disk is full or not writable.
        """
        from stdit.pipelines import video_io

        if self._rows:
            sheet = self.folder / f"{free_stem(self.folder, 'sheet')}.png"
            with _explain_disk_errors(self.folder):
                video_io.write_rows(sheet, self._rows)
            self._add(sheet)
        return self.written

    def _add(self, path: Path) -> None:
        self.written.append(path)
        self.report(path)


def request_metadata(
    request: Request, defaults: Mapping[str, Any], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what is needed to make a video again: prompt, seed, settings, conditions, and the provenance."""
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        **request.settings.resolved(defaults),
        "image": None if request.image is None else str(request.image),
        "conditions": [str(condition) for condition in request.conditions],
        "mask_strategy": [asdict(entry) for entry in request.mask_entries],
        "segments": request.segments.count,
        "segment_prompts": list(request.segment_prompts),
        "overlap": request.segments.overlap,
        "loop": request.segments.loop,
        **provenance,
        **({"extra": request.extra} if request.extra else {}),
    }


def slug(prompt: str, length: int = 40) -> str:
    """Return a prompt as part of a file name: letters and digits of any alphabet, joined by dashes."""
    return "-".join(re.findall(r"\w+", prompt.lower()))[:length].strip("-_") or "video"


def free_stem(folder: Path, stem: str) -> str:
    """Return ``stem``, with the first number that makes it new if a file of that name exists."""
    number, name = 1, stem
    while any((folder / f"{name}.{kind}").exists() for kind in ("mp4", "gif", "png", "json")):
        number += 1
        name = f"{stem}-{number}"
    return name


def make_writable_folder(folder: Path) -> Path:
    """Create a folder and test that files can be written there, before time is spent on videos.

    Raises:
        UserError: if it cannot be created or written.
    """
    probe = folder / ".stdit-write-test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"output {folder} cannot be written ({error.strerror}): choose another with --output."
        ) from None
    return folder


@contextmanager
def _explain_disk_errors(folder: Path) -> Iterator[None]:
    """Raise a UserError for a full disk and the like."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"output {folder}: {error.strerror or error}. Free some space or choose another --output; "
            "the files listed above are complete."
        ) from error
