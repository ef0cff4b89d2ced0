"""Video files: names, metadata, and the contact sheet of a folder. Imports no torch at module level."""

import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.atomic_files import write_json_atomic
from stdit.errors import UserError
from stdit.hashing import hash_bytes
from stdit.pipelines.config import Format
from stdit.pipelines.finished import KINDS, FinishedVideos, compared, is_readable_json
from stdit.pipelines.requests import Request
from stdit.pipelines.video_metadata import video_metadata

if TYPE_CHECKING:
    from stdit.pipelines.runner import SampledVideo


def _print_path(path: Path) -> None:
    print(path, flush=True)


@dataclass
class _Video:
    """A video that was asked for, and its files."""

    request: Request
    metadata: dict[str, Any]
    stem: str = ""
    """Name of its files, without their endings; empty: not chosen yet."""
    files: dict[str, Path] = field(default_factory=dict)
    """Its video files by kind."""
    row: Any = None
    """Of the contact sheet, if it was made just now."""

    def caption(self) -> str:
        """Return all prompts, one to a line, the seed, and the places of conditioning frames."""
        first, *others = [self.request.prompt, *self.request.segment_prompts]
        facts = [f"seed {self.request.seed}", *(one.place() for one in self.request.all_conditions())]
        first = f"{first}  ({', '.join(facts)})"
        if not others:
            return first
        return "\n".join(f"[{number}] {text}" for number, text in enumerate([first, *others], start=1))

    def contents(self) -> dict[str, Any]:
        """Return what the contact sheet says of it inside."""
        text = json.dumps(compared(self.metadata), sort_keys=True)
        return {
            "files": [path.name for path in self.files.values()],
            "prompt": self.request.prompt,
            "segment_prompts": list(self.request.segment_prompts),
            "seed": self.request.seed,
            "hash": hash_bytes(text.encode()),
        }


@dataclass
class VideoWriter:
    """Write videos and their metadata into a folder, which is created, without replacing any video."""

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
    _videos: list[_Video] = field(default_factory=list)
    _pending: deque[_Video] = field(default_factory=deque)
    _hashes: dict[str, str] = field(default_factory=dict)

    def skip_finished(self, requests: Sequence[Request]) -> tuple[list[int], dict[str, str]]:
        """Find the videos that the folder has already; `write` then expects the others, in order.

        A video is finished if files of all formats are whole and have its metadata: prompts, seed, settings,
        conditioning files, hash of the weights. With png alone there is only the sheet, so all are, or none.

        Returns:
            positions of the requests that are to be made, and files that have the name of a video but other contents,
            each with the difference.
        """
        found = FinishedVideos(self.folder)
        self._videos = [self._new_video(request) for request in requests]
        for video in self._videos:
            existing = found.match(_stem(video.request), video.metadata) if self._kinds else None
            if existing is not None:
                video.stem, video.files = existing.stem, existing.files
        pending = [position for position, video in enumerate(self._videos) if self._lacking(video)]
        if not self._kinds and not self._has_sheet():
            pending = list(range(len(requests)))
        for position in sorted(set(range(len(requests))) - set(pending)):
            video = self._videos[position]
            if video.stem and not is_readable_json(self.folder / f"{video.stem}.json"):
                self._write_json(video)
        self._pending = deque(self._videos[position] for position in pending)
        return pending, found.others

    def write(self, videos: Iterable["SampledVideo"]) -> None:
        """Write each video in all formats, and its metadata in a .json beside it.

        Raises:
            UserError: if the disk is full or not writable; no partial file is left.
        """
        from stdit.pipelines import contact_sheet, video_io

        for request, frames, calls in videos:
            if self._pending:
                video = self._pending.popleft()
            else:
                video = self._new_video(request)
                self._videos.append(video)
            video.metadata |= calls.facts()
            video.stem = video.stem or free_stem(self.folder, _stem(request))
            with explain_disk_errors(self.folder), created_folder(self.folder):
                for kind in self._lacking(video):
                    path = self.folder / f"{video.stem}.{kind}"
                    write = video_io.write_mp4 if kind == "mp4" else video_io.write_gif
                    write(path, frames, video.metadata["fps"], video.metadata)
                    video.files[kind] = path
                    self._add(path)
                self._write_json(video)
            if "png" in self.formats:
                video.row = contact_sheet.sheet_row(frames, video.caption())

    def finish(self) -> list[Path]:
        """Write the contact sheet of all videos, if any; return all files written.

        Raises:
            UserError: if the disk is full or not writable, or a finished video cannot be read.
        """
        from stdit.pipelines import contact_sheet, video_io

        if "png" in self.formats and self._videos and not self._has_sheet():
            rows = [
                video.row
                or contact_sheet.sheet_row(
                    video_io.read_frames(next(iter(video.files.values()))), video.caption()
                )
                for video in self._videos
            ]
            with explain_disk_errors(self.folder), created_folder(self.folder):
                sheet = self.folder / f"{free_stem(self.folder, 'sheet')}.png"
                contact_sheet.write_rows(sheet, rows, [video.contents() for video in self._videos])
            self._add(sheet)
        return self.written

    @property
    def _kinds(self) -> list[str]:
        return [kind for kind in KINDS if kind in self.formats]

    def _lacking(self, video: _Video) -> list[str]:
        """Return the kinds of files that are still to be written."""
        return [kind for kind in self._kinds if kind not in video.files]

    def _new_video(self, request: Request) -> _Video:
        return _Video(request, video_metadata(request, self.defaults, self.provenance, self._hashes))

    def _write_json(self, video: _Video) -> None:
        from stdit.pipelines.video_io import read_metadata

        inside = read_metadata(video.files["mp4"]) if "mp4" in video.files else video.metadata
        path = self.folder / f"{video.stem}.json"
        write_json_atomic(path, {**inside, "files": [file.name for file in video.files.values()]})
        self._add(path)

    def _has_sheet(self) -> bool:
        """Return whether the folder has a contact sheet of just these videos."""
        from stdit.pipelines.contact_sheet import read_contents

        contents = [video.contents() for video in self._videos]
        return any(read_contents(path) == contents for path in sorted(self.folder.glob("sheet*.png")))

    def _add(self, path: Path) -> None:
        self.written.append(path)
        self.report(path)


def _stem(request: Request) -> str:
    return f"{request.index:03d}-{slug(request.prompt)}-seed{request.seed}"


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


def check_writable(
    folder: Path, setting: str = "output", way_out: str = "choose another with --output"
) -> None:
    """Test that files can be written in a folder, before time is spent on videos; a new folder is removed again.

    Args:
        setting: that names the folder, for messages.
        way_out: what to do about it, for messages.

    Raises:
        UserError: if it cannot be created or written.
    """
    probe = folder / ".stdit-write-test"
    try:
        with created_folder(folder, keep=False):
            probe.write_bytes(b"")
            probe.unlink()
    except OSError as error:
        raise UserError(f"{setting} {folder} cannot be written ({error.strerror}): {way_out}.") from None


def check_output_file(file: Path, example: str) -> None:
    """Test that a file can be written, before time is spent on its content.

    Raises:
        UserError: if it is a folder, of which ``example`` names a file, or cannot be written.
    """
    if file.is_dir():
        raise UserError(f"output {file} is a folder: name a file, such as {file / example}")
    check_writable(file.absolute().parent)


@contextmanager
def created_folder(folder: Path, keep: bool = True) -> Iterator[None]:
    """Create a folder and its parents; after an error, or unless ``keep``, remove the new ones that are empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        keep = False
        raise
    finally:
        for path in [] if keep else new:
            with suppress(OSError):  # not empty: it is not ours alone
                path.rmdir()


@contextmanager
def explain_disk_errors(folder: Path) -> Iterator[None]:
    """Raise a UserError for a full disk and the like, when videos are written to ``folder``."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"output {folder}: {error.strerror or error}. Free some space or choose another --output; "
            "the files listed above are complete."
        ) from error
